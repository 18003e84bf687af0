"""Write the tables of README.md and docs/benchmarks.md from the committed results, so that they cannot drift.

    python -m benchmarks.tables            rewrite the tables
    python -m benchmarks.tables --check    exit 1 if a table is not what the results say

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import pathlib
import re
import statistics
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from benchmarks.gpu.summary import GOALS

if TYPE_CHECKING:
    from sparseflow.study.effects import Effect
    from sparseflow.study.findings import Finding
    from sparseflow.study.page import Prediction
    from sparseflow.study.records import Study

_ROOT = pathlib.Path(__file__).parents[1]
_FILES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/block-sparse.md",
    "docs/peers.md",
    "docs/cpu-kernels.md",
    "docs/gpu-kernels.md",
    "docs/gpu-benchmarks.md",
    "docs/predict.md",
    "docs/study.md",
    "docs/temporal.md",
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
    cases = {name: found for (name,), found in _points("networks.json", "models").items()}
    return _table(head, [_network(name, cases[name]) for name in sorted(cases, key=_natural)])


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts numbers in names by their size."""
    parts = re.split(r"(\d+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


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
    """Level 2 over the fastest dense fp32 variant as one size grows, and by which power of it either time does."""
    axes: dict[str, dict[float, list[dict]]] = {}
    for point in _load("networks.json")["points"]:
        if point["suite"] == "scaling" and point["value"]:
            axis, size = point["case"].rsplit(" ", 1)
            axes.setdefault(axis, {}).setdefault(float(size), []).append(point)
    head = [
        "network, size that grows",
        "dense",
        "size: level 2 / dense ms = times as fast",
        "level 2 grows as",
        "dense as",
    ]
    return _table(head, [_growth(axis, sizes) for axis, sizes in axes.items() if len(sizes) > 1])


def _growth(axis: str, sizes: dict[float, list[dict]]) -> list[str]:
    compiled = all(any(point["honest"] for point in points) for points in sizes.values())
    sized = [(size, _fastest_dense(sizes[size], compiled)) for size in sorted(sizes)]
    cells = [f"{size:.0f}: {_median(p)} / {_median(p, 'baseline_value')} = {_over(p)}" for size, p in sized]
    times = ([point[key][1] for _, point in sized] for key in ("value", "baseline_value"))
    powers = [f"size^{_power([size for size, _ in sized], ms):.2f}" for ms in times]
    return [axis, "compiled or eager" if compiled else "eager", "; ".join(cells), *powers]


def _fastest_dense(points: list[dict], compiled: bool) -> dict:
    """Where some sizes were not compiled, none is: otherwise the baseline would change along the line."""
    dense = [point for point in points if compiled or not point["baseline"].startswith("compiled")]
    return min(dense, key=lambda point: point["baseline_value"][1])


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


def engines() -> str:
    """This engine over an earlier one: fused blocks by density of their input, and whole networks."""
    found = _load("engines.json")
    densities = sorted({row["density"] for row in found["blocks"]})
    cells = {(row["channels"], row["side"], row["batch"], row["density"]): row["speedup"] for row in found["blocks"]}
    body = [
        [
            f"{channels} at {side} x {side}, batch {batch}",
            *(f"{cells[channels, side, batch, d]:.2f}x" for d in densities),
        ]
        for channels, side, batch in dict.fromkeys(key[:3] for key in cells)
    ]
    blocks = _table(["fused 3x3 block", *(f"{density:.0%}" for density in densities)], body)
    nets = [
        [row["net"], *(f"{row[k][1]:.2f}" for k in ("base_ms", "this_ms")), f"{row['speedup']:.2f}x"]
        for row in found["nets"]
    ]
    return blocks + "\n" + _table(["network, level 2", f"ms, {found['base'][:7]}", "ms", ""], nets)


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


def _predictor() -> dict[str, dict]:
    """The fitted models of ``src/sparseflow/study/predictor.json`` by name."""
    record = json.loads((_ROOT / "src" / "sparseflow" / "study" / "predictor.json").read_text())
    names = ("dense_layer", "sparse_layer", "dense_net", "accelerated_net")
    return {name.replace("_", " ").replace("net", "network"): record[name] for name in names}


def predictor_errors() -> str:
    """How far the latency predictor is off on what was held out of its fit."""
    head = ["model", "median error", "90 % below", "held-out cases", "times compared", "median, architecture held out"]
    return _table(head, [[name, *_error_cells(model["error"])] for name, model in _predictor().items()])


def _error_cells(error: dict) -> list[str]:
    other = error["architecture_median"]
    shares = f"{error['median']:.1%}", f"{error['p90']:.1%}"
    return [*shares, str(error["cases"]), str(error["points"]), "" if other is None else f"{other:.1%}"]


def predictor_costs() -> str:
    """What a unit of every term costs."""
    models = _predictor().items()
    body = [[name, term, f"{1e6 * cost:.4g}"] for name, model in models for term, cost in model["costs"].items()]
    return _table(["model", "term", "ns a unit"], body)


def simulated_cycles() -> str:
    """Cycles of the accelerator by formula over simulated ones."""
    ratios: dict[str, dict[float, str]] = {}
    for row in _load("simulated_cycles.json")["rows"]:
        cell = f"{row['formula']:.0f} / {row['simulated']} = {row['formula'] / row['simulated']:.2f}"
        ratios.setdefault(row["layer"], {})[row["density"]] = cell
    densities = list(next(iter(ratios.values())))
    head = ["layer; formula / simulated", *(f"{density:.0%} spikes" for density in densities)]
    return _table(head, [[layer, *cells.values()] for layer, cells in ratios.items()])


def _of_study(table: Callable[[Study], str]) -> Callable[[], str]:
    """A table of the committed study."""

    @functools.wraps(table)
    def made() -> str:
        study = _study()
        return "Not run yet on a quiet machine.\n" if study is None else table(study)

    return made


@functools.cache
def _study() -> Study | None:
    path = _ROOT / "benchmarks" / "results" / "study.json"
    if not path.exists():
        return None
    from sparseflow.study import storage

    return storage.load(path)


@_of_study
def study_about(study: Study) -> str:
    """Where the study ran, and of how many networks it is."""
    statuses = [net.status for net in study.nets]
    ended = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    names = ("cpu", "threads", "torch", "spikingjelly", "snntorch", "optuna", "sparseflow", "commit")
    about = [[name, str(study.environment.get(name, ""))] for name in names]
    return _table(["", "value"], [["networks", ended], *about])


@_of_study
def study_findings(study: Study) -> str:
    """Every published finding with its verdict, then each in words."""
    from sparseflow.study.findings import findings

    found = findings(study)
    head = ["finding", "dataset", "published", "here", "95 % interval", "verdict"]
    sentences = [f"- {each.name} ({each.dataset}): *{each.verdict}*. {each.sentence}\n" for each in found]
    return _table(head, [_finding_row(each) for each in found]) + "\n" + "".join(sentences)


def _finding_row(finding: Finding) -> list[str]:
    from sparseflow.study.page import measured

    return [finding.name, finding.dataset, finding.published, *measured(finding), finding.verdict]


@_of_study
def study_effects(study: Study) -> str:
    """What each value of each choice changes."""
    from sparseflow.study.effects import Outcome, effects

    outcomes = (Outcome.ACCURACY, Outcome.SPIKES, Outcome.CYCLES, Outcome.ACCELERATED)
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for effect in effects(study.nets, outcomes):
        rows.setdefault((effect.dataset, effect.parameter, effect.value), {})[effect.outcome] = _change(effect)
    head = ["dataset", "choice", "value", *outcomes]
    return _table(head, [[*key, *(cells.get(outcome, "") for outcome in outcomes)] for key, cells in rows.items()])


def _change(effect: Effect) -> str:
    if effect.change is None:
        return ""
    ends = effect.change_interval
    interval = f" ({ends[0]:+.1f} to {ends[1]:+.1f})" if ends else ""
    return f"{effect.change:+.1f} {effect.outcome.change_unit}{interval}"


@_of_study
def study_front(study: Study) -> str:
    """The networks that no other beats in accuracy at their accelerated latency."""
    from sparseflow.study.effects import pareto

    body = []
    for dataset in dict.fromkeys(net.choice.dataset for net in study.nets):
        for net in pareto([net for net in study.nets if net.choice.dataset == dataset]):
            dense, ours = (net.latency[path][1] for path in ("dense", "accelerated"))
            figures = [f"{net.accuracy:.1%}", f"{ours:.3f}", f"{dense:.3f}", f"{net.cycles:,.0f}", f"{net.spikes:,.0f}"]
            body.append([net.choice.name, *figures])
    return _table(["network", "accuracy", "accelerated ms", "dense ms", "cycles", "spikes"], body)


@_of_study
def study_predictions(study: Study) -> str:
    """Errors of predicted latencies."""
    from sparseflow.study.page import predictions

    head = ["dataset", "path", "networks", "median error", "90 % below", "median, calibrated"]
    return _table(head, [_prediction_row(found) for found in predictions(study)])


def _prediction_row(found: Prediction) -> list[str]:
    shares = f"{found.error.median:.1%}", f"{found.error.p90:.1%}"
    calibrated = "" if found.calibrated is None else f"{found.calibrated.median:.1%}"
    return [found.dataset, found.path, str(found.error.points), *shares, calibrated]


_NOT_MEASURED = "Not measured yet on a quiet machine.\n"


def _temporal(part: str) -> list[dict]:
    """Rows of a part of the benchmark of temporal aggregation; none where it has not run."""
    path = _ROOT / "benchmarks" / "results" / "temporal.json"
    return json.loads(path.read_text()).get(part, []) if path.exists() else []


def temporal_speed() -> str:
    """A training step and an inference call, over both baselines."""
    rows = {row["method"]: row for row in _temporal("speed")}
    if not rows:
        return _NOT_MEASURED
    head = [
        "method, K",
        "training step, ms",
        "over T calls",
        "over one call",
        "inference, ms",
        "over T calls",
        "over one call",
    ]
    return _table(
        head,
        [[name, *_speeds(row, rows, "training ms"), *_speeds(row, rows, "inference ms")] for name, row in rows.items()],
    )


def _speeds(row: dict, rows: dict[str, dict], key: str) -> list[str]:
    if row[key] is None:
        return ["", "", ""]
    baselines = (rows["T calls"][key][1], rows["one batched call"][key][1])
    return [f"{row[key][1]:.1f}", *(f"{ms / row[key][1]:.2f}x" for ms in baselines)]


def temporal_accuracy() -> str:
    """Test accuracy of networks trained with every method and K, mean over seeds and the extremes."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for part in ("rate", "events", "motion"):
        for row in _temporal(part):
            cell = found.setdefault((row["method"], row["K"]), {}).setdefault(row["data"], [])
            cell.append(row["accuracy"])
    return _by_data(found, ["trained as", "K"]) if found else _NOT_MEASURED


def temporal_conversions() -> str:
    """Test accuracy of exact networks that were aggregated after training."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in _temporal("converted"):
        if row["asked"] != "auto":
            size = max(layer["K"] for layer in row["layers"])
            found.setdefault((row["asked"], size), {}).setdefault(row["data"], []).append(row["accuracy"])
    return _by_data(found, ["converted", "K"]) if found else _NOT_MEASURED


def _by_data(found: dict[tuple[str, int], dict[str, list[float]]], keys: list[str]) -> str:
    data = list(dict.fromkeys(name for cells in found.values() for name in cells))
    rows = [[*map(str, key), *(_spread(cells.get(name, [])) for name in data)] for key, cells in found.items()]
    return _table([*keys, *data], rows)


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1%} - {max(values):.1%})"


def temporal_auto() -> str:
    """What mode="auto" did with every trained network."""
    rows = [row for row in _temporal("converted") if row["asked"] == "auto"]
    if not rows:
        return _NOT_MEASURED
    head = ["data, seed", "in time", "shuffling costs", "mode", "K by layer", "exact", "aggregated", "spikes", "speed"]
    return _table(head, [_auto_row(row) for row in rows])


def _auto_row(row: dict) -> list[str]:
    layers = [layer for layer in row["layers"] if layer["layer"]]
    drift = ", ".join("" if layer["drift"] is None else f"{layer['drift']:.2f}x" for layer in layers)
    shares = [f"{row[key]:.0%}" for key in ("time share", "order drop")]
    accuracies = [f"{row[key]:.1%}" for key in ("exact accuracy", "accuracy")]
    sizes = ", ".join(str(layer["K"]) for layer in layers)
    return [
        f"{row['data']}, {row['seed']}",
        *shares,
        row["mode"],
        sizes,
        *accuracies,
        drift,
        f"{row['ms'][0] / row['ms'][1]:.2f}x",
    ]


def temporal_decisions() -> str:
    """What mode="auto" decides by the frames of variants that nothing was tuned on."""
    rows = _temporal("decisions")
    if not rows:
        return _NOT_MEASURED
    body = [
        [row["data"], f"{row['time share']:.0%}", row["mode"], "" if row["mode"] == row["right"] else "wrong"]
        for row in rows
    ]
    return _table(["data", "in time", "mode", ""], body)


TABLES = {
    "cpu_kernels": cpu_kernels,
    "engines": engines,
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
    "predictor_costs": predictor_costs,
    "predictor_errors": predictor_errors,
    "pruned_layers": pruned_layers,
    "pruned_networks": pruned_networks,
    "gpu_goals": gpu_goals,
    "roofline_float16": roofline_float16,
    "roofline_float32": roofline_float32,
    "simulated_cycles": simulated_cycles,
    "study_about": study_about,
    "study_effects": study_effects,
    "study_findings": study_findings,
    "study_front": study_front,
    "study_predictions": study_predictions,
    "temporal_accuracy": temporal_accuracy,
    "temporal_auto": temporal_auto,
    "temporal_conversions": temporal_conversions,
    "temporal_decisions": temporal_decisions,
    "temporal_speed": temporal_speed,
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
