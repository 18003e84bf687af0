"""Tables of single layers, products and kernels."""

from __future__ import annotations

import json

from benchmarks.gpu.summary import GOALS

from .records import BEST, NOT_MEASURED, ROOT, by_case, load, median, speedup, table

_SHOWN = (0.01, 0.1, 0.3, 0.5, 1.0)
_OCCUPANCIES, _EVENT_DENSITIES = (0.0, 0.1, 0.34, 0.56, 1.0), (0.001, 0.01)


def layers() -> str:
    """Single layers: speedup over the best dense fp32 by density, crossovers, and the same over bf16."""
    head = ["layer", *(f"{density:.0%}" for density in _SHOWN), "crossover", "dispatcher's", "over bf16 at 1%"]
    points = by_case("layers.json", "layers", "density set")
    crossovers = {row["case"]: row for row in load("layers.json")["crossovers"]}
    body = []
    for name in dict.fromkeys(case for case, _ in points):
        cells = [speedup(points[name, density][f"sparse over {BEST}"], 1) for density in _SHOWN]
        met = [f"{crossovers[name][key]:.0%}" for key in ("measured", "used")]
        body.append([name, *cells, *met, speedup(points[name, 0.01]["sparse over best dense bf16"], 1)])
    return table(head, body)


def predecessor() -> str:
    """The predecessor's two headline layers, its way and the honest way."""
    head = ["layer", "what runs", "scope", "ms", "over eager", "over best dense fp32"]
    body = []
    for (name,), found in by_case("layers.json", "predecessor").items():
        for point in found.values():
            if point["baseline"] == "eager":
                best = found[f"{point['kernel']} over {BEST}"]
                row = [name, point["kernel"], point["scope"], median(point, digits=2), speedup(point), speedup(best)]
                body.append(row)
    return table(head, body)


def peers() -> str:
    """Products of spikes and a matrix: every contender's time by density."""
    found: dict[tuple[str, str], dict[float, str]] = {}
    densities: dict[float, None] = {}
    for point in load("networks.json")["points"]:
        if point["suite"] == "peers" and point["value"] and "x" in point["case"].split(",")[0]:
            density = point["config"].get("density", point["rho"])
            densities[density] = None
            found.setdefault((point["case"], point["kernel"]), {})[density] = median(point, digits=3)
    head = ["product", "contender; ms", *(f"{density:.0%} spikes" for density in densities)]
    body = [[*names, *(times.get(density, "") for density in densities)] for names, times in found.items()]
    return table(head, body) if body else NOT_MEASURED


def pruned_layers() -> str:
    """Single layers with zero blocks: over dense, and over the sparse layer with all its weights."""
    over = (BEST, "sparse layer with all its weights")
    cases: dict[tuple, dict[str, dict]] = {}
    for point in load("pruned.json")["points"]:
        if point["suite"] == "pruned" and "density set" in point["config"]:
            cases.setdefault((point["case"], point["rho"]), {})[point["baseline"]] = point
    head = ["layer", "spike density", *(f"over {name}" for name in over)]
    return table(head, [[n, f"{rho:.0%}", *(speedup(f.get(b)) for b in over)] for (n, rho), f in cases.items()])


def cpu_kernels() -> str:
    """The engine alone: speedup over the best dense fp32, warm and cold, and over bf16."""
    rows = load("cpu_kernels.json")["rows"]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    densities = (0.01, 0.05, 0.1, 0.2, 0.35, 0.5)
    head = ["layer", *(f"{density:.0%}" for density in densities), "cold, 1%", "cold, 10%", "over bf16, 1%"]
    body = []
    for layer in layers:
        mine = {row["density"]: row for row in rows if row["layer"] == layer}
        cells = [_with_goal(mine[density]) for density in densities]
        extra = (mine[0.01]["speedup_cold"], mine[0.1]["speedup_cold"], mine[0.01]["speedup_bf16"])
        body.append([layer, *cells, *(f"{ratio:.1f}x" for ratio in extra)])
    return table(head, body)


def _with_goal(row: dict) -> str:
    goal = f" (goal {row['goal']:g})" if row["goal"] else ""
    return f"{row['speedup']:.1f}x{goal}"


def engines() -> str:
    """This engine over an earlier one: fused blocks by density of their input, and whole networks."""
    found = load("engines.json")
    densities = sorted({row["density"] for row in found["blocks"]})
    cells = {(row["channels"], row["side"], row["batch"], row["density"]): row["speedup"] for row in found["blocks"]}
    body = [
        [
            f"{channels} at {side} x {side}, batch {batch}",
            *(f"{cells[channels, side, batch, d]:.2f}x" for d in densities),
        ]
        for channels, side, batch in dict.fromkeys(key[:3] for key in cells)
    ]
    blocks = table(["fused 3x3 block", *(f"{density:.0%}" for density in densities)], body)
    nets = [
        [row["net"], *(f"{row[k][1]:.2f}" for k in ("base_ms", "this_ms")), f"{row['speedup']:.2f}x"]
        for row in found["nets"]
    ]
    return blocks + "\n" + table(["network, level 2", f"ms, {found['base'][:7]}", "ms", ""], nets)


def occupancy() -> str:
    """What each way of skipping leaves over, one column a net."""
    rows = load("occupancy.json")["rows"]
    kept = {key: None for row in rows.values() for key in row}
    return table(["share", *rows], [[key, *(f"{row[key]:.1%}" for row in rows.values())] for key in kept])


def _gpu() -> dict:
    """What a GPU measured; empty before the first run."""
    path = ROOT / "benchmarks" / "results" / "gpu.json"
    return json.loads(path.read_text()) if path.exists() else {"rows": [], "goals": []}


def gpu_goals() -> str:
    """The project's goals on the GPU, and what the committed run says of each."""
    told = {goal["goal"]: goal["measured"] for goal in _gpu()["goals"]}
    rows = [[goal.text, f"{goal.at_least:g}x", told.get(goal.text, "not measured yet")] for goal in GOALS]
    return table(["over the strongest dense way, prescan included", "goal", "measured"], rows)


def roofline_float16() -> str:
    """Predicted time of layers on an H200, and what was measured."""
    return _roofline("float16")


def roofline_float32() -> str:
    """The same for float32 without TF32."""
    return _roofline("float32")


def _roofline(dtype: str) -> str:
    rows = [row for row in load("roofline.json")["rows"] if row["dtype"] == dtype]
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
    return table(head, body)


def _measured(layer: str, steps_times_batch: int, dtype: str) -> tuple[str, str]:
    """Dense ms of a layer, and the best ratio over it at 10 % density, prescan included."""
    case = {"layer": layer, "steps_times_batch": steps_times_batch, "dtype": dtype, "includes_prescan": True}
    rows = [row for row in _gpu()["rows"] if row["kind"] == "layer" and case.items() <= row.items()]
    rows = [row for row in rows if row["baseline"].startswith("dense")]
    ratios = [row["speedup"] for row in rows if row["target"] == 0.1]
    dense = f"{rows[0]['baseline_ms'][1]:.4f}" if rows else "none yet"
    return dense, f"{max(ratios):.2f}x" if ratios else "none yet"


TABLES = {
    table.__name__: table
    for table in (
        layers,
        predecessor,
        peers,
        pruned_layers,
        cpu_kernels,
        engines,
        occupancy,
        gpu_goals,
        roofline_float16,
        roofline_float32,
    )
}
