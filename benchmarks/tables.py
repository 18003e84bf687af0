"""Write the tables of README.md and docs/benchmarks.md from the committed results, so that they cannot drift.

    python -m benchmarks.tables            rewrite the tables
    python -m benchmarks.tables --check    exit 1 if a table is not what the results say

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import re
import statistics
import sys

from benchmarks.gpu.summary import GOALS

_ROOT = pathlib.Path(__file__).parents[1]
_FILES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/block-sparse.md",
    "docs/peers.md",
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


_DENSE = ("eager", "eager channels_last", "compiled fp32", "compiled bf16")
_BEST = "best dense fp32"
Cases = dict[tuple, dict[str, dict]]


def _points(file: str, suite: str, *keys: str) -> Cases:
    """Points of a suite by case (and ``keys`` of their configuration), each by kernel and baseline."""
    cases: Cases = {}
    for point in _load(file)["points"]:
        if point["suite"] == suite:
            case = (point["case"], *(point["config"][key] for key in keys))
            cases.setdefault(case, {})[f"{point['kernel']} over {point['baseline']}"] = point
    return cases


def _median(point: dict | None, field: str = "value", digits: int = 1) -> str:
    return f"{point[field][1]:.{digits}f}" if point and point[field] else ""


def _over(point: dict | None, digits: int = 2) -> str:
    if point is None:
        return ""
    if not point["gate"]["green"]:
        return "red gate"
    return f"{point['baseline_value'][1] / point['value'][1]:.{digits}f}x"


def networks() -> str:
    """Whole networks: medians of every variant, and level 2 over the strongest dense fp32 of the run."""
    head = [
        "network; ms a call",
        "activity",
        "density",
        *_DENSE,
        "level 1",
        "level 2",
        "over eager",
        "over compiled fp32",
    ]
    return _table(head, [_network(name, found) for (name,), found in _points("networks.json", "models").items()])


def _network(name: str, found: dict[str, dict]) -> list[str]:
    point = found["level 2 over eager"]
    dense = [_median(found.get(f"level 2 over {baseline}"), "baseline_value") for baseline in _DENSE]
    ours = [_median(found[f"{level} over eager"]) for level in ("level 1", "level 2")]
    eager = [found[key] for key in ("level 2 over eager", "level 2 over eager channels_last") if key in found]
    over = min(map(_over, eager), key=lambda text: float(text.rstrip("x")) if text[0].isdigit() else 0.0)
    compiled = _over(found.get("level 2 over compiled fp32"))
    return [name, point["config"]["activity"], f"{point['rho']:.1%}", *dense, *ours, over, compiled]


def memory() -> str:
    """Resident memory of networks with their packed weights and of a call, in MB."""
    head = ["network; MB", "eager", "level 1", "level 2", "level 2 over eager"]
    body = []
    for (name,), found in _points("networks.json", "memory").items():
        point = found.get("level 2 over eager")
        if point and point["value"]:
            share = f"{point['value'][1] / point['baseline_value'][1]:.2f}x"
            values = [_median(point, "baseline_value"), _median(found.get("level 1 over eager")), _median(point)]
            body.append([name, *values, share])
    return _table(head, body)


def growth() -> str:
    """Level 2 over the strongest dense fp32 variant as one size grows, and by which power of it either time does."""
    axes: dict[str, list[dict]] = {}
    for point in _load("networks.json")["points"]:
        if point["suite"] == "scaling" and point["honest"] and point["value"]:
            axes.setdefault(point["case"].rsplit(" ", 1)[0], []).append(point)
    head = ["network, size that grows", "size: level 2 / dense ms = times as fast", "level 2 grows as", "dense as"]
    return _table(head, [_growth(axis, points) for axis, points in axes.items() if len(points) > 1])


def _growth(axis: str, points: list[dict]) -> list[str]:
    sized = sorted((float(point["case"].rsplit(" ", 1)[1]), point) for point in points)
    cells = [f"{size:.0f}: {_median(p)} / {_median(p, 'baseline_value')} = {_over(p)}" for size, p in sized]
    sizes = [size for size, _ in sized]
    powers = [_power(sizes, [point[key][1] for _, point in sized]) for key in ("value", "baseline_value")]
    return [axis, "; ".join(cells), *(f"size^{power:.2f}" for power in powers)]


def _power(sizes: list[float], times: list[float]) -> float:
    """Slope of the times over the sizes, both as logarithms."""
    return statistics.linear_regression(list(map(math.log, sizes)), list(map(math.log, times))).slope


def startup() -> str:
    """What has to be waited for before the first answer."""
    body = []
    for (name,), found in _points("networks.json", "startup").items():
        for key, point in found.items():
            what, baseline = key.split(" over ", 1)
            body.append([name, what, _median(point, digits=0), baseline, _median(point, "baseline_value", 0)])
    head = ["network", "what", "ms", "against", "ms"]
    return _table(head, body) if body else "Not measured yet on a quiet machine.\n"


def peers() -> str:
    """Products of spikes and a matrix: every contender's time by density."""
    found: dict[tuple[str, str], dict[float, str]] = {}
    densities: dict[float, None] = {}
    for point in _load("networks.json")["points"]:
        if point["suite"] == "peers" and point["value"] and "x" in point["case"].split(",")[0]:
            density = point["config"].get("density", point["rho"])
            densities[density] = None
            found.setdefault((point["case"], point["kernel"]), {})[density] = _median(point, digits=3)
    head = ["product", "contender; ms", *(f"{density:.0%} spikes" for density in densities)]
    body = [[*names, *(times.get(density, "") for density in densities)] for names, times in found.items()]
    return _table(head, body) if body else "Not measured yet on a quiet machine.\n"


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


def layers() -> str:
    """Single layers: speedup over the best dense fp32 by density, crossovers, and the same over bf16."""
    head = ["layer", *(f"{density:.0%}" for density in _SHOWN), "crossover", "dispatcher's", "over bf16 at 1%"]
    points = _points("layers.json", "layers", "density set")
    crossovers = {row["case"]: row for row in _load("layers.json")["crossovers"]}
    body = []
    for name in dict.fromkeys(case for case, _ in points):
        cells = [_over(points[name, density][f"sparse over {_BEST}"], 1) for density in _SHOWN]
        met = [f"{crossovers[name][key]:.0%}" for key in ("measured", "used")]
        body.append([name, *cells, *met, _over(points[name, 0.01]["sparse over best dense bf16"], 1)])
    return _table(head, body)


def predecessor() -> str:
    """The predecessor's two headline layers, its way and the honest way."""
    head = ["layer", "what runs", "scope", "ms", "over eager", "over best dense fp32"]
    body = []
    for (name,), found in _points("layers.json", "predecessor").items():
        for point in found.values():
            if point["baseline"] == "eager":
                best = found[f"{point['kernel']} over {_BEST}"]
                row = [name, point["kernel"], point["scope"], _median(point, digits=2), _over(point), _over(best)]
                body.append(row)
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
    """What the networks were measured on."""
    return _environment("networks.json")


def _environment(results: str) -> str:
    env = _load(results)["environment"]
    names = ("cpu", "cores", "threads", "engine", "torch", "spikingjelly", "snntorch", "python", "sparseflow", "commit")
    return _table(["", "value"], [[name, str(env.get(name, ""))] for name in names])


def pruned_networks() -> str:
    """Networks pruned in blocks: accuracy on the way, and what skipping blocks brings."""
    stages = {"accuracy": "before", "accuracy_pruned": "pruned", "accuracy_fine_tuned": "fine-tuned"}
    over = ("eager", "compiled fp32", "level 2 before pruning")
    head = ["network", *(f"accuracy {name}" for name in stages.values()), *(f"over {name}" for name in over)]
    body = []
    for (name,), found in _points("pruned.json", "pruned").items():
        point = next(iter(found.values()))
        if "accuracy" in point["config"]:
            accuracies = [f"{point['config'][key]:.1%}" for key in stages]
            body.append([name, *accuracies, *(_over(found.get(f"level 2, pruned over {base}")) for base in over)])
    return _table(head, body)


def pruned_layers() -> str:
    """Single layers with zero blocks: over dense, and over the sparse layer with all its weights."""
    over = (_BEST, "sparse layer with all its weights")
    cases: dict[tuple, dict[str, dict]] = {}
    for point in _load("pruned.json")["points"]:
        if point["suite"] == "pruned" and "density set" in point["config"]:
            cases.setdefault((point["case"], point["rho"]), {})[point["baseline"]] = point
    head = ["layer", "spike density", *(f"over {name}" for name in over)]
    return _table(head, [[n, f"{rho:.0%}", *(_over(f.get(b)) for b in over)] for (n, rho), f in cases.items()])


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
    "cpu_kernels": cpu_kernels,
    "fused_machine": fused_machine,
    "fused_flips": fused_flips,
    "growth": growth,
    "layers": layers,
    "machine": machine,
    "memory": memory,
    "networks": networks,
    "occupancy": occupancy,
    "peers": peers,
    "predecessor": predecessor,
    "pruned_layers": pruned_layers,
    "pruned_networks": pruned_networks,
    "gpu_goals": gpu_goals,
    "roofline_float16": roofline_float16,
    "roofline_float32": roofline_float32,
    "startup": startup,
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
