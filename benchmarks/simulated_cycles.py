"""The accelerator's formulas against its cycle-by-cycle simulation, on layers of usual sizes with random spikes.

    python -m benchmarks.simulated_cycles [--out benchmarks/results/simulated_cycles.json]

Nothing here is measured: both sides count cycles. docs/predict.md shows the table.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import torch

from sparseflow.study.hardware import Accelerator, cycles
from sparseflow.study.records import LayerShape
from sparseflow.study.simulator import simulate

RESULTS = pathlib.Path(__file__).parent / "results" / "simulated_cycles.json"
STEPS = 4
DENSITIES = (0.01, 0.05, 0.2)
ACCELERATOR = Accelerator(neuron_units=8)


def _conv(inputs: int, outputs: int, size: int, kernel: int = 3) -> LayerShape:
    name, padding = f"{kernel}x{kernel} {inputs}->{outputs} @{size}", kernel // 2
    pairs = {"kernel": kernel, "padding": padding, "in_size": size, "out_size": size}
    return LayerShape(name, inputs, outputs, **{key: (value, value) for key, value in pairs.items()})


LAYERS = (
    _conv(2, 16, 34),
    _conv(16, 32, 17),
    _conv(32, 32, 8),
    _conv(64, 16, 4),
    _conv(16, 16, 16, kernel=5),
    _conv(16, 16, 16, kernel=1),
    LayerShape("linear 512->128", 512, 128),
    LayerShape("linear 128->10", 128, 10),
)


def rows() -> Iterator[dict[str, Any]]:
    """Cycles of one image over all steps, by formula and simulated."""
    generator = torch.Generator().manual_seed(0)
    for shape in LAYERS:
        for density in DENSITIES:
            size = (shape.in_channels,) if shape.linear else (shape.in_channels, *shape.in_size)
            spikes = (torch.rand(STEPS, *size, generator=generator) < density).float()
            counts = spikes.reshape(STEPS, shape.in_channels, -1).sum(2)[None]
            formula, run = cycles(shape, counts, ACCELERATOR).item(), simulate(shape, spikes, ACCELERATOR)
            shares = {
                "overlapped": round(run.overlapped / run.cycles, 4),
                "waiting": round(run.waiting / run.cycles, 4),
            }
            yield {"layer": shape.name, "density": density, "formula": formula, "simulated": run.cycles, **shares}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    found = list(rows())
    for row in found:
        ratio = row["formula"] / row["simulated"]
        print(f"{row['layer']:20} {row['density']:6.1%} {row['formula']:10.0f} {row['simulated']:10} {ratio:6.3f}")
    record = {"schema": 1, "steps": STEPS, "neuron_units": ACCELERATOR.neuron_units, "rows": found}
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
