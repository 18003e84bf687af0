"""Tables of the study, its predictor and its simulator."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from .records import ROOT, load, table

if TYPE_CHECKING:
    from sparseflow.study.effects import Effect
    from sparseflow.study.findings import Finding
    from sparseflow.study.page import Prediction
    from sparseflow.study.records import Study


def _predictor() -> dict[str, dict]:
    """The fitted models of ``src/sparseflow/study/predictor.json`` by name."""
    record = json.loads((ROOT / "src" / "sparseflow" / "study" / "predictor.json").read_text())
    names = ("dense_layer", "sparse_layer", "dense_net", "accelerated_net")
    return {name.replace("_", " ").replace("net", "network"): record[name] for name in names}


def predictor_errors() -> str:
    """How far the latency predictor is off on what was held out of its fit."""
    head = ["model", "median error", "90 % below", "held-out cases", "times compared", "median, architecture held out"]
    return table(head, [[name, *_error_cells(model["error"])] for name, model in _predictor().items()])


def _error_cells(error: dict) -> list[str]:
    other = error["architecture_median"]
    shares = f"{error['median']:.1%}", f"{error['p90']:.1%}"
    return [*shares, str(error["cases"]), str(error["points"]), "" if other is None else f"{other:.1%}"]


def predictor_costs() -> str:
    """What a unit of every term costs."""
    models = _predictor().items()
    body = [[name, term, f"{1e6 * cost:.4g}"] for name, model in models for term, cost in model["costs"].items()]
    return table(["model", "term", "ns a unit"], body)


def simulated_cycles() -> str:
    """Cycles of the accelerator by formula over simulated ones."""
    ratios: dict[str, dict[float, str]] = {}
    for row in load("simulated_cycles.json")["rows"]:
        cell = f"{row['formula']:.0f} / {row['simulated']} = {row['formula'] / row['simulated']:.2f}"
        ratios.setdefault(row["layer"], {})[row["density"]] = cell
    densities = list(next(iter(ratios.values())))
    head = ["layer; formula / simulated", *(f"{density:.0%} spikes" for density in densities)]
    return table(head, [[layer, *cells.values()] for layer, cells in ratios.items()])


def _of_study(table: Callable[[Study], str]) -> Callable[[], str]:
    """A table of the committed study."""

    @functools.wraps(table)
    def made() -> str:
        study = _study()
        return "Not run yet on a quiet machine.\n" if study is None else table(study)

    return made


@functools.cache
def _study() -> Study | None:
    path = ROOT / "benchmarks" / "results" / "study.json"
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
    return table(["", "value"], [["networks", ended], *about])


@_of_study
def study_findings(study: Study) -> str:
    """Every published finding with its verdict, then each in words."""
    from sparseflow.study.findings import findings

    found = findings(study)
    head = ["finding", "dataset", "published", "here", "95 % interval", "verdict"]
    sentences = [f"- {each.name} ({each.dataset}): *{each.verdict}*. {each.sentence}\n" for each in found]
    return table(head, [_finding_row(each) for each in found]) + "\n" + "".join(sentences)


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
    return table(head, [[*key, *(cells.get(outcome, "") for outcome in outcomes)] for key, cells in rows.items()])


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
    return table(["network", "accuracy", "accelerated ms", "dense ms", "cycles", "spikes"], body)


@_of_study
def study_predictions(study: Study) -> str:
    """Errors of predicted latencies."""
    from sparseflow.study.page import predictions

    head = ["dataset", "path", "networks", "median error", "90 % below", "median, calibrated"]
    return table(head, [_prediction_row(found) for found in predictions(study)])


def _prediction_row(found: Prediction) -> list[str]:
    shares = f"{found.error.median:.1%}", f"{found.error.p90:.1%}"
    calibrated = "" if found.calibrated is None else f"{found.calibrated.median:.1%}"
    return [found.dataset, found.path, str(found.error.points), *shares, calibrated]


TABLES = {
    table.__name__: table
    for table in (
        predictor_errors,
        predictor_costs,
        simulated_cycles,
        study_about,
        study_findings,
        study_effects,
        study_front,
        study_predictions,
    )
}
