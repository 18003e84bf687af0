"""Write the results of a benchmark as one HTML page that loads nothing from elsewhere.

What has to be read first (the verdict, the machine, red gates, peers that could not be run) is HTML; charts and tables
are drawn in the browser from the results inside the page: ``assets/*.js`` here and in ``sparseflow``. The same results
give the same bytes.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sparseflow import offline
from sparseflow.report import milliseconds

from .records import Metric, Point, Quantiles, Results, Scope

_MEASURED = "measured"


@dataclasses.dataclass(frozen=True)
class Row:
    """How many comparisons of one suite, scope, metric, device and precision are faster, level and slower.

    A point is *faster* (for memory: smaller) where its 80 % quantile is below the baseline's 20 % quantile, *slower*
    the other way round, and *level* where the two ranges overlap.
    """

    suite: str
    scope: Scope
    metric: Metric
    device: str
    precision: str
    faster: int
    level: int
    slower: int
    worst: float
    median: float
    best: float

    @property
    def points(self) -> int:
        """All of them."""
        return self.faster + self.level + self.slower

    @classmethod
    def of(cls, points: Sequence[Point]) -> Row:
        """Of points with a speedup, all of one group."""
        verdicts = Counter(map(_verdict, points))
        speedups = [point.speedup for point in points if point.speedup is not None]
        worst, median, best = min(speedups), statistics.median(speedups), max(speedups)
        first = points[0]
        return cls(
            *(first.suite, first.scope, first.metric, first.device, first.precision),
            *(verdicts["faster"], verdicts["level"], verdicts["slower"]),
            *(worst, median, best),
        )


def write(results: Results, path: str | Path) -> Path:
    """Write the page, about 5 MB with plotly.js inside, and return its path.

    Raises:
        ValueError: a figure is infinite or not a number.
        OSError: ``path`` cannot be written.
    """
    path = Path(path)
    path.write_text(_html(results), encoding="utf-8")
    return path


def summary(points: Iterable[Point]) -> list[Row]:
    """A row per suite, scope, metric, device and precision, in the order of the points, of what is honest and measured.

    Approximate methods are left out: their results are other results, so their times are not compared with exact ones.
    """
    groups: dict[tuple[str, ...], list[Point]] = {}
    for point in points:
        compared = point.honest and point.source == _MEASURED and point.speedup is not None
        if compared and point.scope is not Scope.APPROXIMATE:
            key = (point.suite, point.scope, point.metric, point.device, point.precision)
            groups.setdefault(key, []).append(point)
    return [Row.of(group) for group in groups.values()]


def speedup_range(point: Point) -> Quantiles | None:
    """``(low, median, high)`` of the speedup: the ends put the best of one against the worst of the other,
    baseline p20 / our p80 and baseline p80 / our p20, so that they are wider than a 20 % to 80 % range of the ratio.

    >>> from .records import Gate
    >>> speedup_range(Point("layers", "conv", "events", "event-driven", Scope.EXACT, {}, 0.05, Metric.LATENCY,
    ...                     (1.0, 2.0, 4.0), "best dense fp32", (4.0, 6.0, 8.0), True, Gate(True, "budget")))
    (1.0, 3.0, 8.0)
    """
    if point.value is None or point.baseline_value is None or point.speedup is None:
        return None
    ours, theirs = point.value, point.baseline_value
    return theirs[0] / ours[2], point.speedup, theirs[2] / ours[0]


def _verdict(point: Point) -> str:
    spread = speedup_range(point)
    if spread is None:
        raise ValueError(f"{point.case}, {point.kernel}: no speedup to judge")
    low, _, high = spread
    return "faster" if low > 1 else "slower" if high < 1 else "level"


def _html(results: Results) -> str:
    return offline.page(
        "sparseflow.bench",
        ("data.js", "charts.js", "points.js", "main.js"),
        _data(results),
        results=results,
        rows=summary(results.points),
        red=[point for point in results.points if not point.gate.green],
        gates=Counter(point.gate.what for point in results.points if point.gate.green),
        baselines=_baselines(results.points),
        figure=milliseconds,
        published=sum(point.source != _MEASURED for point in results.points),
    )


def _baselines(points: Iterable[Point]) -> list[tuple[str, bool, int]]:
    """Every baseline: its name, whether it is honest, and how many speedups are over it; honest ones first."""
    counts = Counter((point.baseline, point.honest) for point in points if point.speedup is not None)
    return [(name, honest, count) for (name, honest), count in sorted(counts.items(), key=lambda item: not item[0][1])]


def _data(results: Results) -> dict[str, Any]:
    return {
        "points": [_point(point) for point in results.points],
        "layers": [dataclasses.asdict(layer) for layer in results.layers],
        "phases": [dataclasses.asdict(phase) for phase in results.phases],
        "crossovers": [dataclasses.asdict(crossover) for crossover in results.crossovers],
        "palette": list(offline.OKABE_ITO.values()),
        "grey": offline.GREY,
    }


def _point(point: Point) -> dict[str, Any]:
    """What the page needs of a point. ``network``: the density is an outcome of a network and not a setting."""
    figures = [point.rho, *(point.value or ()), *(point.baseline_value or ())]
    if not all(figure is None or math.isfinite(figure) for figure in figures):
        raise ValueError(f"{point.case}, {point.kernel}: a figure is not finite: {figures}; None means not measured")
    fields = dataclasses.asdict(point)
    del fields["densities"]
    spread = speedup_range(point)
    return fields | {"unit": point.metric.unit, "speedup": spread, "network": bool(point.densities)}
