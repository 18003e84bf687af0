"""The native CPU engine of another commit against this tree's, both loaded into one process and called in turn.

    python -m benchmarks.engines BASE [--out benchmarks/results/engines.json] [--isa avx2]

Times the fused 3x3 blocks of a ResNet-18 at 64 pixels (T = 4, batch norm, LIF) on independent random spikes, in the
best of the variants the planner would measure, and whole networks at level 2. Only the C++ sources come from BASE;
its engine must have this one's interface. A block has figures only if both engines give the same bits (its weights are
multiples of 2^-8, so that sums are exact in any order), a network only if both give every image the same class.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import io
import json
import pathlib
import statistics
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import sparseflow
from sparseflow.bench.compare import alternate, quantiles
from sparseflow.bench.suites import models
from sparseflow.bench.suites.baselines import Call
from sparseflow.env import environment
from sparseflow.kernels.blocks.records import Dynamics, Epilogue, State
from sparseflow.kernels.blocks.spikes import PackedSpikes
from sparseflow.kernels.cpu import build, engine, loader
from sparseflow.kernels.cpu.blocks import NativeBlockOps
from sparseflow.kernels.geometry import ConvGeometry
from sparseflow.neuron import Charge, Reset, ResetTiming

_ROOT = pathlib.Path(__file__).parents[1]
STEPS = 4
LAYERS = ((64, 16), (128, 8), (256, 4), (512, 2))  # channels, side of the map
BATCHES = (1, 8)
DENSITIES = (0.0, 0.01, 0.05, 0.1, 0.2)
NETS = (
    "spiking_resnet18 @64, batch 1",
    "spiking_resnet18 @64, batch 8",
    "digits resnet18 @32, batch 8",
    "snnTorch convnet @28, T = 25, batch 8",
)
_CALLS = 5  # of a block in one turn; the first of a turn finds the caches as the other engine left them
_LIF = Dynamics(Charge.LEAK_INPUT, ">=", Reset.HARD, ResetTiming.SAME_STEP, reset_value=0.0, threshold=1.0, decay=2.0)

Engines = Mapping[str, ctypes.CDLL]


def engine_of(sources: pathlib.Path, folder: pathlib.Path, isa: str) -> ctypes.CDLL:
    """Build and load the engine from ``sources``. Raises ``SystemExit`` if its interface is another one."""
    path = folder / build.LIBRARY_NAME
    with mock.patch.object(build, "SOURCE_DIR", sources):
        build.build(path)
    library = loader.open_library(path)
    if library is None:
        raise SystemExit(f"the engine of {sources} has another interface")
    loader.select(library, isa)
    return library


def sources_of(commit: str, folder: pathlib.Path) -> pathlib.Path:
    """The engine's C++ sources at ``commit``, written below ``folder``."""
    where = build.SOURCE_DIR.relative_to(_ROOT)
    archive = subprocess.run(["git", "archive", commit, str(where)], cwd=_ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder / where


@contextlib.contextmanager
def using(library: ctypes.CDLL) -> Iterator[None]:
    """Everything calls this engine."""
    with mock.patch.object(engine, "_load", return_value=(library, "")):
        yield


@dataclasses.dataclass(frozen=True)
class Block:
    """A fused block and its input."""

    channels: int
    side: int
    batch: int
    density: float

    @property
    def geometry(self) -> ConvGeometry:
        x, weight = (STEPS * self.batch, self.channels, self.side, self.side), (self.channels, self.channels, 3, 3)
        return ConvGeometry.from_call(x, weight, (1, 1), (1, 1), (1, 1), 1)

    def runs(self) -> dict[str, Callable[[], PackedSpikes | Tensor]]:
        """A call in every variant, with what the engine in use needs for it."""
        generator = torch.Generator().manual_seed(0)
        shape = (STEPS, self.batch, self.channels, self.side, self.side)
        spikes = (torch.rand(shape, generator=generator) < self.density).float()
        weight = torch.randint(-16, 24, (self.channels, self.channels, 3, 3), generator=generator) / 256
        ops, geometry = NativeBlockOps(), self.geometry
        x = ops.pack(spikes, 2)
        assert x is not None
        epilogue = Epilogue(torch.ones(self.channels), torch.full((self.channels,), -0.25))

        def run(variant: str) -> Callable[[], PackedSpikes | Tensor]:
            packed = ops.pack_weight(weight, geometry, variant)
            state = State(torch.zeros(self.batch, self.side**2, self.channels))
            return lambda: ops.conv(x, packed, geometry, variant, epilogue, _LIF, state, STEPS)

        return {variant: run(variant) for variant in ops.variants(geometry, STEPS)}


def block_row(block: Block, engines: Engines, repeats: int) -> dict[str, Any] | None:
    """Figures of a block, each engine in its best variant; ``None`` if their spikes are not the same."""
    runs: dict[str, Callable[[], object]] = {}
    bits = []
    for name, library in engines.items():
        with using(library):
            calls = block.runs()
            bits += [run().bits.clone() for run in calls.values()]  # type: ignore[union-attr]
        runs |= {f"{name} {variant}": _turn(library, call, _CALLS) for variant, call in calls.items()}
    if any(not torch.equal(bits[0], other) for other in bits[1:]):
        return None
    times = alternate(runs, repeats)
    best = {name: min((t for k, t in times.items() if k.startswith(name)), key=statistics.median) for name in engines}
    return {**dataclasses.asdict(block), "steps": STEPS, **_figures(best, _CALLS)}


def net_row(name: str, engines: Engines, repeats: int) -> dict[str, Any] | None:
    """Figures of a network at level 2; ``None`` if the engines do not agree about the class of every image."""
    workload = dict(models.everything())[name]()
    runs, classes = {}, []
    with torch.no_grad():
        for engine_name, library in engines.items():
            with using(library):
                call = Call(sparseflow.accelerate(workload.build(), workload.inputs[0]), workload)
                for _ in range(3):
                    call()
                classes.append([workload.readout(call()).argmax(-1).tolist() for _ in workload.inputs])
            runs[engine_name] = _turn(library, call, 1)
        if classes[0] != classes[1]:
            return None
        alternate(runs, 3)
        return {"net": name, **_figures(alternate(runs, repeats), 1)}


def _turn(library: ctypes.CDLL, call: Callable[[], object], calls: int) -> Callable[[], None]:
    def turn() -> None:
        with using(library):
            for _ in range(calls):
                call()

    return turn


def _figures(times: Mapping[str, list[float]], calls: int) -> dict[str, Any]:
    """Quantiles in ms of a call, and the median of the ratios of neighbouring turns."""
    per_call = {name: [t / calls for t in values] for name, values in times.items()}
    ratio = statistics.median(a / b for a, b in zip(per_call["base"], per_call["this"], strict=True))
    return {f"{name}_ms": quantiles(values) for name, values in per_call.items()} | {"speedup": round(ratio, 3)}


def measured(engines: Engines, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """All rows; what is not equal is named and left out."""
    found: dict[str, list[dict[str, Any]]] = {"blocks": [], "nets": []}
    blocks = (Block(*layer, batch, density) for layer in LAYERS for batch in BATCHES for density in DENSITIES)
    cases = [("blocks", str(b), lambda b=b: block_row(b, engines, repeats)) for b in blocks]
    cases += [("nets", name, lambda name=name: net_row(name, engines, repeats)) for name in NETS]
    for kind, name, row in cases:
        figures = row()
        print(name, "not equal" if figures is None else f"{figures['speedup']:.2f}x", flush=True)
        if figures is not None:
            found[kind].append(figures)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="commit whose engine to compare with")
    parser.add_argument("--out", type=pathlib.Path, default=_ROOT / "benchmarks/results/engines.json")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--isa", default="", help="instruction set of both, by default the best one here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    commit = subprocess.run(["git", "rev-parse", options.base], cwd=_ROOT, capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory() as folder:
        base, this = pathlib.Path(folder, "base"), pathlib.Path(folder, "this")
        engines = {
            "base": engine_of(sources_of(options.base, base), base, options.isa),
            "this": engine_of(build.SOURCE_DIR, this, options.isa),
        }
        rows = measured(engines, options.repeats)
        with using(engines["this"]):
            about = {"schema": 1, "environment": environment(), "base": commit.stdout.strip()}
    options.out.write_text(json.dumps(about | rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
