"""Write the tables of README.md and docs/benchmarks.md from the committed results, so that they cannot drift.

    python -m benchmarks.tables            rewrite the tables
    python -m benchmarks.tables --check    exit 1 if a table is not what the results say

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys

_ROOT = pathlib.Path(__file__).parents[1]
_FILES = ("README.md", "docs/benchmarks.md", "docs/cpu-kernels.md", "docs/gpu-kernels.md")
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SHOWN = (0.01, 0.1, 0.3, 0.5, 1.0)


def _load(name: str) -> dict:
    return json.loads((_ROOT / "benchmarks" / "results" / name).read_text())


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


_RUNS = ("eager", "eager channels_last", "compiled fp32", "compiled bf16", "sparseflow", "sparseflow compiled")


def end_to_end() -> str:
    """Whole models: median time of every run, and what acceleration gains over the same way to run dense."""
    rows = _load("end_to_end.json")["rows"]
    head = ["network, T = 4; ms a call", "activity", *_RUNS, "over eager", "over compiled fp32", "same class"]
    body = []
    for row in rows:
        ms = {name: value[1] for name, value in row["ms"].items()}
        eager = min(ms["eager"], ms["eager channels_last"]) / ms["sparseflow"]
        compiled = f"{ms['compiled fp32'] / ms['sparseflow compiled']:.2f}x" if "compiled fp32" in ms else ""
        cells = [f"{ms[name]:.1f}" if name in ms else "" for name in _RUNS]
        body.append([row["case"], row["activity"], *cells, f"{eager:.2f}x", compiled, f"{row['agreement']:.1%}"])
    return _table(head, body)


def density_sweep() -> str:
    """Single layers: speedup over the best dense fp32 by density, and the crossover."""
    rows = _load("density_sweep.json")["rows"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    head = ["layer", *(f"{density:.0%}" for density in _SHOWN), "crossover", "over bf16 at 1%"]
    body = []
    for shape in shapes:
        mine = {row["density"]: row for row in rows if row["shape"] == shape}
        cells = [f"{mine[density]['sparse_over_best_dense']:.1f}x" for density in _SHOWN]
        used = f"{next(iter(mine.values()))['crossover_used']:.0%}"
        body.append([shape, *cells, used, f"{mine[0.01]['sparse_over_bf16']:.1f}x"])
    return _table(head, body)


def cpu_kernels() -> str:
    """The engine alone: speedup over the best dense fp32, warm and cold, and over bf16."""
    rows = _load("cpu_kernels.json")["rows"]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    densities = (0.01, 0.05, 0.1, 0.2, 0.35, 0.5)
    head = ["layer", *(f"{density:.0%}" for density in densities), "cold, 1%", "cold, 10%", "over bf16, 1%"]
    body = []
    for layer in layers:
        mine = {row["density"]: row for row in rows if row["layer"] == layer}
        cells = [_with_goal(mine[density]) for density in densities]
        extra = (mine[0.01]["speedup_cold"], mine[0.1]["speedup_cold"], mine[0.01]["speedup_bf16"])
        body.append([layer, *cells, *(f"{ratio:.1f}x" for ratio in extra)])
    return _table(head, body)


def _with_goal(row: dict) -> str:
    goal = f" (goal {row['goal']:g})" if row["goal"] else ""
    return f"{row['speedup']:.1f}x{goal}"


def occupancy() -> str:
    """What each way of skipping leaves over, one column a net."""
    rows = _load("occupancy.json")["rows"]
    kept = {key: None for row in rows.values() for key in row}
    return _table(["share", *rows], [[key, *(f"{row[key]:.1%}" for row in rows.values())] for key in kept])


def machine() -> str:
    """What the figures were measured on."""
    env = _load("density_sweep.json")["environment"]
    names = ("cpu", "cores", "threads", "engine", "torch", "spikingjelly", "python", "sparseflow", "commit")
    return _table(["", "value"], [[name, str(env.get(name, ""))] for name in names])


TABLES = {
    "cpu_kernels": cpu_kernels,
    "end_to_end": end_to_end,
    "density_sweep": density_sweep,
    "machine": machine,
    "occupancy": occupancy,
}


def rendered(text: str) -> str:
    """``text`` with every table as the results say."""
    return _BLOCK.sub(lambda match: match[1] + "\n" + TABLES[match[2]]() + "\n" + match[3], text)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = []
    for name in _FILES:
        path = _ROOT / name
        text = path.read_text()
        if rendered(text) != text:
            stale.append(name)
            if not options.check:
                path.write_text(rendered(text))
    print(("stale: " if options.check else "rewritten: ") + (", ".join(stale) or "none"))
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
