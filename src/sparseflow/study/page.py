"""Write a study as one HTML page that loads nothing from elsewhere.

What has to be read first (the findings, how many networks there are, how good the predictions are, the machine) is
HTML; charts and the other tables are drawn in the browser from the data inside the page: ``assets/*.js`` here and in
``sparseflow``. The same study gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sparseflow import offline
from sparseflow.report import percent

from .effects import PARAMETERS, Outcome, effects, pareto, value_name
from .findings import Finding, Verdict, findings
from .predictor import Error, held_out_error, prediction_error
from .records import Net, Status, Study

_AXES = (Outcome.ACCELERATED, Outcome.DENSE, Outcome.CYCLES, Outcome.SPIKES)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """How far predictions of a path's latency are off on a dataset.

    ``error`` is that of the recorded predictions, by costs which were fitted to other measurements. ``calibrated`` is
    that of costs fitted to the dataset's own networks, each configuration predicted by the others; ``None`` where there
    are fewer than two.
    """

    dataset: str
    path: str
    error: Error
    calibrated: Error | None


def write(study: Study, path: Path) -> None:
    """Write the page, about 5 MB with plotly.js inside.

    Raises:
        ValueError: a figure is infinite or not a number.
        OSError: ``path`` cannot be written.
    """
    _check(study.nets)
    judged, predicted = findings(study), predictions(study)
    html = offline.page(
        "sparseflow.study",
        ("data.js", "charts.js", "nets.js", "main.js"),
        _data(study, judged, predicted),
        study=study,
        findings=judged,
        verdicts={verdict: sum(finding.verdict is verdict for finding in judged) for verdict in Verdict},
        statuses={status: sum(net.status is status for net in study.nets) for status in Status},
        chosen={name: _values(study.nets, name) for name in ("dataset", *PARAMETERS, "seed")},
        predictions=predicted,
        measured=measured,
        percent=percent,
    )
    Path(path).write_text(html, encoding="utf-8")


def predictions(study: Study) -> list[Prediction]:
    """For every dataset and path that was both predicted and measured.

    >>> predictions(Study({}, ()))
    []
    """
    found = []
    for dataset in dict.fromkeys(net.choice.dataset for net in study.nets):
        part = Study({}, tuple(net for net in study.nets if net.choice.dataset == dataset))
        recorded, calibrated = prediction_error(part), held_out_error(part)
        found += [Prediction(dataset, path, error, calibrated.get(path)) for path, error in recorded.items()]
    return found


def _values(nets: Iterable[Net], name: str) -> str:
    """What was chosen, as text: every value once, in the order of the networks."""
    return ", ".join(dict.fromkeys(value_name(getattr(net.choice, name)) for net in nets))


def measured(finding: Finding) -> tuple[str, str]:
    """Estimate and interval as text.

    >>> measured(Finding("", "", "", -8.123, (-10.0, -6.02), "%", 0, Verdict.UNDECIDED, ""))
    ('-8.1 %', '-10.0 to -6.0')
    """
    digits = 2 if finding.unit == "rank correlation" else 1
    if finding.estimate is None:
        return "-", ""
    unit = "" if finding.unit == "rank correlation" else f" {finding.unit}"
    interval = "" if finding.interval is None else " to ".join(f"{end:+.{digits}f}" for end in finding.interval)
    return f"{finding.estimate:+.{digits}f}{unit}", interval


def _check(nets: Sequence[Net]) -> None:
    for net in nets:
        if not all(math.isfinite(figure) for figure in _figures(net)):
            raise ValueError(f"{net.choice.name}: a figure is not finite; None means not measured")


def _figures(net: Net) -> Iterator[float]:
    single = [net.accuracy, net.spikes, net.cycles, *net.predicted.values()]
    single += [figure for quantiles in net.latency.values() for figure in quantiles]
    for layer in net.layers:
        single += [layer.spikes, layer.density, layer.cycles, layer.predicted_ms]
    return (figure for figure in single if figure is not None)


def _data(study: Study, judged: Sequence[Finding], predicted: Sequence[Prediction]) -> dict[str, Any]:
    fronts = _fronts(study.nets)
    return {
        "nets": [_net(net, [cost for cost in _AXES if net.choice.name in fronts[cost]]) for net in study.nets],
        "findings": [dataclasses.asdict(finding) for finding in judged],
        "effects": [dataclasses.asdict(effect) for effect in effects(study.nets)],
        "outcomes": [{"name": outcome, "unit": outcome.unit} for outcome in (Outcome.ACCURACY, *_AXES)],
        "predictions": [dataclasses.asdict(prediction) for prediction in predicted],
        "parameters": list(PARAMETERS),
        "palette": list(offline.OKABE_ITO.values()),
        "grey": offline.GREY,
    }


def _fronts(nets: Sequence[Net]) -> dict[Outcome, set[str]]:
    """Names of the networks that no other of the same dataset beats, by cost."""
    datasets = {net.choice.dataset for net in nets}
    return {
        cost: {
            net.choice.name
            for dataset in datasets
            for net in pareto([net for net in nets if net.choice.dataset == dataset], cost)
        }
        for cost in _AXES
    }


def _net(net: Net, fronts: list[Outcome]) -> dict[str, Any]:
    """What the page needs of a network: its choices as text, its outcomes by name, and what it is best at."""
    choices = {name: value_name(getattr(net.choice, name)) for name in ("dataset", *PARAMETERS)}
    outcomes = {outcome.value: outcome.of(net) for outcome in Outcome}
    layers = [{"name": layer.shape.name, "density": layer.density, "spikes": layer.spikes} for layer in net.layers]
    training = {"seed": net.choice.seed, "status": net.status, "epochs": net.epochs, "error": net.error}
    call = {"steps": net.steps, "batch": net.batch, "latency": net.latency, "predicted": net.predicted}
    return choices | outcomes | training | call | {"layers": layers, "fronts": fronts}
