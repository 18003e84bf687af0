"""What a run prints: a table a suite, and a line for whatever went wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparseflow.report import milliseconds, percent

from .records import Absent, Metric, Point, Results, Scope
from .suites import Row

_WIDTH = 130


def console() -> Console:
    """On the standard error output; what is not a terminal has room for a row of :func:`table`."""
    found = Console(stderr=True)
    return found if found.is_terminal else Console(stderr=True, width=_WIDTH)


def table(suite: str, results: Results) -> Table:
    """A suite, exact methods before others: a row for every case, kernel and density, losing ones like any other.

    It is over the honest baseline; where there is none, over the one that leaves the least gain, dim and tagged. All
    baselines are in the results file.
    """
    points = [point for point in results.points if point.suite == suite]
    found = Table(title=suite, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for name in ("case", "kernel", "density", "ours", "baseline", "", "speedup", "tag"):
        found.add_column(name, justify="left" if name in ("case", "kernel", "baseline", "tag") else "right")
    for point in sorted(shown(points), key=lambda point: list(Scope).index(point.scope)):
        cells = (point.case, point.kernel, percent(point.rho), *_figures(point), tag(point))
        found.add_row(*map(Text, cells), style="red" if not point.gate.green else "" if point.honest else "dim")
    return found


def shown(points: Iterable[Point]) -> list[Point]:
    """One of the points that differ in nothing but the baseline."""
    groups: dict[Any, list[Point]] = {}
    for point in points:
        config = tuple(sorted((key, str(value)) for key, value in point.config.items()))
        key = (point.case, point.kernel, point.metric, point.device, point.precision, point.rho, config)
        groups.setdefault(key, []).append(point)
    return [min(group, key=lambda point: (not point.honest, point.speedup or 0.0)) for group in groups.values()]


def _figures(point: Point) -> tuple[str, str, str, str]:
    speedup = point.speedup
    over = "-" if speedup is None else f"{speedup:.2f}x"
    return _figure(point.value, point.metric), point.baseline, _figure(point.baseline_value, point.metric), over


def _figure(value: tuple[float, float, float] | None, metric: Metric) -> str:
    return "-" if value is None else f"{milliseconds(value[1])} {metric.unit}"


def tag(point: Point) -> str:
    """What has to be known of a speedup before it is believed."""
    if not point.gate.green:
        return "red gate: " + "; ".join(point.gate.why)
    words = ["honest" if point.honest else "not honest"]
    return ", ".join([*words, *([point.scope.value] if point.scope is not Scope.EXACT else [])])


def lines(rows: Iterable[Row]) -> Iterator[Text]:
    """A line for each red gate and for what could not be run."""
    for row in rows:
        if isinstance(row, Point) and not row.gate.green:
            yield Text(f"{row.suite}: {row.case}, {row.kernel}: {tag(row)}", style="red")
        elif isinstance(row, Absent):
            yield Text(f"{row.name}: not run: {row.error}", style="yellow")
