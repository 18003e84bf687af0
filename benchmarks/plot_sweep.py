"""Draw the density sweep: speedup over the best dense fp32 of every shape, with the crossover the dispatcher uses.

python -m benchmarks.plot_sweep [benchmarks/results/density_sweep.json] [docs/images/density_sweep.png]
"""

from __future__ import annotations

import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

_COLUMNS = 5
_LINES = {"sparse": "#0072b2", "dispatched": "#d55e00", "bf16": "#999999"}


def panel(axis, name: str, rows: list[dict]) -> None:
    """One shape: speedups over the best dense fp32 against density."""
    densities = [100 * row["density"] for row in rows]
    for key, colour in _LINES.items():
        axis.plot(densities, [row["best_dense_ms"] / row["ms"][key][1] for row in rows], color=colour, label=key)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.axvline(100 * rows[0]["crossover_used"], color="black", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", yscale="log", title=name)
    axis.title.set_size(9)


def main(source: str = "benchmarks/results/density_sweep.json", target: str = "docs/images/density_sweep.png") -> None:
    """Read ``source``, write ``target``."""
    rows = [row for row in json.loads(pathlib.Path(source).read_text())["rows"] if row["correct"]]
    names = list(dict.fromkeys(row["shape"] for row in rows))
    lines = -(-len(names) // _COLUMNS)
    figure, axes = plt.subplots(lines, _COLUMNS, figsize=(3.2 * _COLUMNS, 2.6 * lines), sharex=True, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        panel(axis, name, [row for row in rows if row["shape"] == name])
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.supxlabel("input density (%); dotted: the crossover the dispatcher uses")
    figure.supylabel("speedup over the best dense fp32")
    figure.tight_layout()
    pathlib.Path(target).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
