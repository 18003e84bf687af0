"""What a run prints: a table a suite, and a line for whatever went wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich import box
from rich.table import Table
from rich.text import Text

from sparseflow.report import percent

from .records import Absent, Metric, Point, Results, Scope
from .suites import Row

HONEST = "strongest dense"
_DIGITS = 3


def table(suite: str, results: Results) -> Table:
    """Every point of a suite, exact methods before others. Losing ones are shown like any other, and baselines that
    are not the strongest dense path of their precision are dim."""
    points = [point for point in results.points if point.suite == suite]
    found = Table(title=suite, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for name in ("case", "kernel", "density", "ours", "baseline", "", "speedup", "tag"):
        found.add_column(name, justify="left" if name in ("case", "kernel", "baseline", "tag") else "right")
    for point in sorted(points, key=lambda point: list(Scope).index(point.scope)):
        cells = (point.case, point.kernel, percent(point.rho), *_figures(point), tag(point))
        found.add_row(*map(Text, cells), style="red" if not point.gate.green else "" if point.honest else "dim")
    return found


def _figures(point: Point) -> tuple[str, str, str, str]:
    speedup = point.speedup
    over = "-" if speedup is None else f"{speedup:.2f}x"
    return _figure(point.value, point.metric), point.baseline, _figure(point.baseline_value, point.metric), over


def _figure(value: tuple[float, float, float] | None, metric: Metric) -> str:
    return "-" if value is None else f"{value[1]:.{_DIGITS}g} {metric.unit}"


def tag(point: Point) -> str:
    """What has to be known of a speedup before it is believed."""
    if not point.gate.green:
        return "red gate: " + "; ".join(point.gate.why)
    words = [HONEST if point.honest else "not the strongest baseline"]
    return ", ".join([*words, *([point.scope.value] if point.scope is not Scope.EXACT else [])])


def lines(rows: Iterable[Row]) -> Iterator[Text]:
    """A line for each red gate and for what could not be run."""
    for row in rows:
        if isinstance(row, Point) and not row.gate.green:
            yield Text(f"{row.suite}: {row.case}, {row.kernel}: {tag(row)}", style="red")
        elif isinstance(row, Absent):
            yield Text(f"{row.name}: not run: {row.error}", style="yellow")
