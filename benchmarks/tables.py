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

from benchmarks.gpu.summary import GOALS

_ROOT = pathlib.Path(__file__).parents[1]
_FILES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/block-sparse.md",
    "docs/cpu-kernels.md",
    "docs/gpu-kernels.md",
    "docs/gpu-benchmarks.md",
)
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SHOWN = (0.01, 0.1, 0.3, 0.5, 1.0)


def _load(name: str) -> dict:
    return json.loads((_ROOT / "benchmarks" / "results" / name).read_text())


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


_FUSED_RUNS = ("eager", "eager channels_last", "compiled fp32", "compiled bf16", "level 1", "level 2")


def fused() -> str:
    """Whole models, dense and at both levels: medians, and level 2 over the better eager and over the compiled one."""
    rows = _load("fused.json")["rows"]
    head = [
        "network; ms a call",
        "activity",
        "density",
        *_FUSED_RUNS,
        "over eager",
        "over compiled fp32",
        "memory",
        "same class",
    ]
    return _table(head, [_fused_row(row) for row in rows])


def fused_flips() -> str:
    """Spikes that differ from the float64 network, and how far its membrane was from the threshold there."""
    rows = [row for row in _load("fused.json")["rows"] if row["green"]]
    decades = list(rows[0]["gate"]["level 2"]["distances"])
    shown = [decade for decade in decades if any(_flips(row, name)[decade] for row in rows for name in _JUDGED)]
    head = ["network", "run", "spikes compared", "flips", *shown]
    return _table(head, [_flip_row(row, name, shown) for row in rows for name in _JUDGED])


_JUDGED = ("dense", "level 2")


def _flips(row: dict, name: str) -> dict[str, int]:
    return row["gate"][name]["distances"]


def _flip_row(row: dict, name: str, decades: list[str]) -> list[str]:
    gate = row["gate"][name]
    counts = [str(gate["distances"][decade] or "") for decade in decades]
    outputs, flips = sum(gate["outputs"].values()), sum(gate["flips"].values())
    return [row["case"], name, f"{outputs:,}", f"{flips:,}", *counts]


def fused_machine() -> str:
    """Where the fused networks were measured."""
    return _environment("fused.json")


def _fused_row(row: dict) -> list[str]:
    times = [f"{row['ms'][name][1]:.1f}" if name in row["ms"] else "" for name in _FUSED_RUNS]
    ms = {name: times[1] for name, times in row["ms"].items()}
    eager = f"{min(ms['eager'], ms['eager channels_last']) / ms['level 2']:.2f}x" if ms else "red gate"
    compiled = f"{ms['compiled fp32'] / ms['level 2']:.2f}x" if "compiled fp32" in ms else ""
    memory = {name: mb["resident"] + mb["call"] for name, mb in row.get("memory_mb", {}).items()}
    share = f"{memory['level 2'] / memory['eager']:.2f}x" if memory.get("eager") else ""
    agreement = row["gate"]["level 2"]["agreement"]
    return [
        row["case"],
        row["activity"],
        f"{row['mean_density']:.1%}",
        *times,
        eager,
        compiled,
        share,
        f"{agreement:.1%}",
    ]


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
    """What the other figures were measured on."""
    return _environment("density_sweep.json")


def _environment(results: str) -> str:
    env = _load(results)["environment"]
    names = ("cpu", "cores", "threads", "engine", "torch", "spikingjelly", "python", "sparseflow", "commit")
    return _table(["", "value"], [[name, str(env.get(name, ""))] for name in names])


def _block_sparse(network: bool) -> list[dict]:
    """Points of pruned networks or layers, one a case and spike density, with the speedup over every baseline."""
    path = _ROOT / "benchmarks" / "results" / "block_sparse.json"
    points = json.loads(path.read_text())["points"] if path.exists() else []
    cases: dict[tuple, dict] = {}
    for point in points:
        if ("accuracy" in point["config"]) == network:
            case = cases.setdefault((point["case"], point["rho"]), {**point, "over": {}})
            both = point["baseline_value"] and point["value"]
            case["over"][point["baseline"]] = f"{both[1] / point['value'][1]:.2f}x" if both else "red gate"
    return list(cases.values())


_BLOCK_BASELINES = ("compiled fp32, same pruned net", "level 2 of the unpruned net")


def block_sparse() -> str:
    """Networks pruned in blocks: accuracy on the way, and what skipping blocks brings."""
    stages = {"accuracy": "before", "accuracy_pruned": "pruned", "accuracy_fine_tuned": "fine-tuned"}
    head = [
        "network",
        *(f"accuracy {name}" for name in stages.values()),
        *(f"over {name}" for name in _BLOCK_BASELINES),
    ]
    body = []
    for case in _block_sparse(network=True):
        accuracies = [f"{case['config'][key]:.1%}" for key in stages]
        body.append([case["case"], *accuracies, *(case["over"].get(name, "") for name in _BLOCK_BASELINES)])
    return _table(head, body or [["not measured yet", *[""] * (len(head) - 1)]])


_BLOCK_LAYER_BASELINES = ("best dense fp32", "events, blocks not skipped")


def block_sparse_layers() -> str:
    """Single layers with zero blocks: speedup over dense and over event kernels that do not look at blocks."""
    head = ["layer", "spike density", *(f"over {name}" for name in _BLOCK_LAYER_BASELINES)]
    body = []
    for case in _block_sparse(network=False):
        over = [case["over"].get(name, "") for name in _BLOCK_LAYER_BASELINES]
        body.append([case["case"], f"{case['rho']:.0%}", *over])
    return _table(head, body or [["not measured yet", *[""] * (len(head) - 1)]])


_OCCUPANCIES, _EVENT_DENSITIES = (0.0, 0.1, 0.34, 0.56, 1.0), (0.001, 0.01)


def _gpu() -> dict:
    """What a GPU measured; empty before the first run."""
    path = _ROOT / "benchmarks" / "results" / "gpu.json"
    return json.loads(path.read_text()) if path.exists() else {"rows": [], "goals": []}


def gpu_goals() -> str:
    """The project's goals on the GPU, and what the committed run says of each."""
    told = {goal["goal"]: goal["measured"] for goal in _gpu()["goals"]}
    rows = [[goal.text, f"{goal.at_least:g}x", told.get(goal.text, "not measured yet")] for goal in GOALS]
    return _table(["over the strongest dense way, prescan included", "goal", "measured"], rows)


def roofline_float16() -> str:
    """Predicted time of layers on an H200, and what was measured."""
    return _roofline("float16")


def roofline_float32() -> str:
    """The same for float32 without TF32."""
    return _roofline("float32")


def _roofline(dtype: str) -> str:
    rows = [row for row in _load("roofline.json")["rows"] if row["dtype"] == dtype]
    head = ["layer, T*N", "dense, predicted ms", *(f"tile, {share:.0%} occupied" for share in _OCCUPANCIES)]
    head += [*(f"event, {density:.1%}" for density in _EVENT_DENSITIES), "measured: dense ms", "measured: best at 10 %"]
    body = []
    for layer, batch in dict.fromkeys((row["layer"], row["steps_times_batch"]) for row in rows):
        mine = [row for row in rows if row["layer"] == layer]
        ratios = {(row["path"], row["load"]): f"{row['speedup']:.2f}x" for row in mine}
        cells = [ratios["tile", share] for share in _OCCUPANCIES]
        cells += [ratios["event", density] for density in _EVENT_DENSITIES if ("event", density) in ratios]
        dense = f"{mine[0]['ms']:.4f} ({mine[0]['bound']})"
        body.append([f"{layer}, {batch}", dense, *cells, *_measured(layer, batch, dtype)])
    return _table(head, body)


def _measured(layer: str, steps_times_batch: int, dtype: str) -> tuple[str, str]:
    """Dense ms of a layer, and the best ratio over it at 10 % density, prescan included."""
    case = {"layer": layer, "steps_times_batch": steps_times_batch, "dtype": dtype, "includes_prescan": True}
    rows = [row for row in _gpu()["rows"] if row["kind"] == "layer" and case.items() <= row.items()]
    rows = [row for row in rows if row["baseline"].startswith("dense")]
    ratios = [row["speedup"] for row in rows if row["target"] == 0.1]
    dense = f"{rows[0]['baseline_ms'][1]:.4f}" if rows else "none yet"
    return dense, f"{max(ratios):.2f}x" if ratios else "none yet"


TABLES = {
    "block_sparse": block_sparse,
    "block_sparse_layers": block_sparse_layers,
    "cpu_kernels": cpu_kernels,
    "fused": fused,
    "fused_machine": fused_machine,
    "fused_flips": fused_flips,
    "density_sweep": density_sweep,
    "machine": machine,
    "occupancy": occupancy,
    "gpu_goals": gpu_goals,
    "roofline_float16": roofline_float16,
    "roofline_float32": roofline_float32,
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
