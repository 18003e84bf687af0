"""What ran, why, and what it cost: records of a report, a profile and a benchmark, and their text and HTML forms.

Pure data and rendering: whoever measures fills these records in, and nothing here touches a module or a kernel.
Times are milliseconds, densities and occupancies shares in 0..1; ``None`` means not measured.
"""

from __future__ import annotations

import dataclasses
import html
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import offline

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from rich.console import JustifyMethod, RenderableType
    from rich.table import Table

    from .plan import LayerPlan

WIDTH = 100
DENSE = "dense"
UNKNOWN = "-"
_DENSITY, _OCCUPANCY = "density", "occupancy"

_SPARSE_COLOUR = offline.OKABE_ITO["blue"]
_DENSE_COLOUR = offline.GREY
_CROSSOVER_COLOUR = offline.OKABE_ITO["vermillion"]


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One convolution or linear layer: the path it runs, why, and the figures behind the choice.

    ``sparse_ms`` is the time at the observed load, prescan included; ``crossover`` the load above which dense is
    faster. ``axis`` says which load these follow: ``"density"`` or ``"occupancy"``. ``calls`` counts the forward calls
    each path served.
    """

    name: str
    kind: str
    provenance: str
    path: str
    reason: str
    detail: str = ""
    density: float | None = None
    occupancy: float | None = None
    dense_ms: float | None = None
    sparse_ms: float | None = None
    crossover: float | None = None
    axis: str = _DENSITY
    calls: dict[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_plan(cls, layer: LayerPlan, calls: dict[str, int]) -> LayerReport:
        """The record of one planned layer; the sparse time is read off the measured curve at the layer's load."""
        measured = layer.crossover
        load = layer.occupancy if measured and measured.axis == _OCCUPANCY else layer.density
        return cls(
            name=layer.name,
            kind=layer.kind,
            provenance=layer.provenance.name.lower(),
            path=layer.path.value,
            reason=layer.reason.value,
            detail=layer.detail,
            density=layer.density,
            occupancy=layer.occupancy,
            dense_ms=measured.dense_ms if measured else None,
            sparse_ms=measured.sparse_ms_at(load) if measured and load is not None else None,
            crossover=measured.density if measured else None,
            axis=measured.axis if measured else _DENSITY,
            calls=calls,
        )

    @property
    def load(self) -> float | None:
        """The observed density or occupancy, whichever the crossover is stated in."""
        return self.occupancy if self.axis == _OCCUPANCY else self.density

    @property
    def sparse(self) -> bool:
        """Whether the layer is on a sparse path."""
        return self.path != DENSE

    @property
    def explanation(self) -> str:
        """The reason, with its detail where there is one."""
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`sparseflow.accelerate` did to a model, layer by layer.

    >>> fed = LayerReport("conv2", "Conv2d", "binary", "event", "sparse measured faster", density=0.05)
    >>> stem = LayerReport("conv1", "Conv2d", "dense", "dense", "input is not a spike tensor")
    >>> report = Report("Net", "cpu", "fx", (stem, fed), environment={})
    >>> report.accelerated
    1
    >>> report.summary
    '1 of 2 layers run sparse; dense: 1 (input is not a spike tensor)'
    """

    model: str
    backend: str
    method: str
    layers: tuple[LayerReport, ...]
    environment: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def accelerated(self) -> int:
        """Number of layers on a sparse path."""
        return sum(layer.sparse for layer in self.layers)

    @property
    def summary(self) -> str:
        """One line: how many layers run sparse, and why the others do not."""
        reasons = Counter(layer.reason for layer in self.layers if not layer.sparse)
        line = f"{self.accelerated} of {len(self.layers)} layers run sparse"
        if not reasons:
            return line
        return f"{line}; dense: " + ", ".join(f"{n} ({reason})" for reason, n in reasons.most_common())

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers, with the summary beside the fields."""
        return {"summary": self.summary, "accelerated": self.accelerated, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        """JSON text of :meth:`to_dict`."""
        return json.dumps(self.to_dict(), indent=1)

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained HTML page (it loads nothing from elsewhere) and return its path.

        Raises ``OSError`` where ``path`` cannot be written.
        """
        path = Path(path)
        path.write_text(_report_html(self), encoding="utf-8")
        return path

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        return Group(*self._parts())

    def _parts(self) -> tuple[RenderableType, ...]:
        from rich.text import Text

        head = (f"{self.model}: {self.summary}", f"backend {self.backend}, spikes followed by {self.method}")
        tail = (*_reason_lines(self), *(f"note: {note}" for note in self.notes))
        return *map(Text, head), _layer_table(self), *map(Text, tail)

    def __str__(self) -> str:
        return render(*self._parts())


@dataclasses.dataclass(frozen=True)
class LayerProfile:
    """Time spent in one module: ``paths`` counts calls per path, ``density`` is that of the module's input."""

    name: str
    kind: str
    total_ms: float
    calls: int
    density: float | None = None
    paths: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ProfileResult:
    """Where the time of some forward calls went. ``total_ms`` is that of the whole model, so that
    ``total_ms`` minus the layers is what runs between modules (additions, copies, Python).

    >>> result = ProfileResult((LayerProfile("conv", "conv", 3.0, 1), LayerProfile("lif", "neuron", 1.0, 1)), 5.0)
    >>> result.by_kind
    {'conv': 3.0, 'neuron': 1.0, 'between modules': 1.0}
    """

    layers: tuple[LayerProfile, ...]
    total_ms: float

    @property
    def by_kind(self) -> dict[str, float]:
        """Milliseconds per kind of module, largest first, with the time between modules last."""
        totals: dict[str, float] = {}
        for layer in self.layers:
            totals[layer.kind] = totals.get(layer.kind, 0.0) + layer.total_ms
        between = max(0.0, self.total_ms - sum(totals.values()))
        return dict(sorted(totals.items(), key=lambda item: -item[1])) | {"between modules": between}

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        return {**dataclasses.asdict(self), "by_kind": self.by_kind}

    def __str__(self) -> str:
        return render(f"{self.total_ms:.2f} ms in {len(self.layers)} modules", _profile_table(self), _kind_table(self))


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """Dense against accelerated, timed in alternation: ``(p20, p50, p80)`` of each in milliseconds.

    ``max_error`` is the largest absolute difference of the outputs from the dense ones and ``matches`` says whether
    the outputs passed the correctness gate (described by ``gate``).

    >>> result = BenchResult((9.0, 10.0, 12.0), (4.0, 5.0, 6.0), 1e-7, True, "error budget 1e-6", repeats=20)
    >>> result.speedup
    2.0
    """

    dense_ms: tuple[float, float, float]
    sparse_ms: tuple[float, float, float]
    max_error: float
    matches: bool
    gate: str
    repeats: int

    @property
    def speedup(self) -> float | None:
        """Ratio of the medians, or ``None`` when the outputs differ: the time of a wrong answer means nothing."""
        return self.dense_ms[1] / self.sparse_ms[1] if self.matches else None

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers; the times are left out when the outputs differ."""
        fields = dataclasses.asdict(self)
        if not self.matches:
            del fields["dense_ms"], fields["sparse_ms"]
        return {**fields, "speedup": self.speedup}

    def __str__(self) -> str:
        error = f"largest output difference {self.max_error:.3g} ({self.gate})"
        if self.speedup is None:
            return f"no speedup to report, the outputs differ: {error}"
        lines = [f"{name} {_spread(times)}" for name, times in (("dense ", self.dense_ms), ("sparse", self.sparse_ms))]
        return "\n".join([*lines, f"speedup {self.speedup:.2f}x over {self.repeats} alternations; {error}"])


def render(*parts: RenderableType, width: int = WIDTH) -> str:
    """Plain text of ``rich`` renderables, one below the other, without colours and trailing blanks."""
    from rich.console import Console

    plain: dict[str, Any] = {
        "no_color": True,
        "highlight": False,
        "markup": False,
        "force_terminal": False,
        "force_jupyter": False,
    }
    console = Console(width=width, **plain)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def milliseconds(value: float | None) -> str:
    """``value`` with three significant digits, or a dash.

    >>> milliseconds(0.01234), milliseconds(1234.6), milliseconds(None)
    ('0.0123', '1235', '-')
    """
    if value is None:
        return UNKNOWN
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def percent(value: float | None) -> str:
    """A share in 0..1 as a percentage, or a dash.

    >>> percent(0.0431), percent(1.0), percent(None)
    ('4.3 %', '100.0 %', '-')
    """
    return UNKNOWN if value is None else f"{100 * value:.1f} %"


def _spread(times: tuple[float, float, float]) -> str:
    low, middle, high = map(milliseconds, times)
    return f"{middle} ms (p20 {low}, p80 {high})"


def _table(*columns: tuple[str, JustifyMethod]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, (header, justify) in enumerate(columns):
        table.add_column(header, justify=justify, no_wrap=index == 0 or justify == "right", overflow="fold")
    return table


def _add_row(table: Table, *cells: str, dim: bool = False) -> None:
    from rich.text import Text

    # Text, not str: rich would read square brackets in a str as markup and drop them.
    table.add_row(*map(Text, cells), style="dim" if dim else "")


def _layer_table(report: Report) -> Table:
    table = _table(
        ("layer", "left"), ("density", "right"), ("occup.", "right"), ("cross.", "right"), ("dense ms", "right"),
        ("sparse ms", "right"), ("path", "left"), ("why", "left"),
    )  # fmt: skip
    numbers = _reason_numbers(report)
    for layer in report.layers:
        why = f"[{numbers[layer.reason]}] {layer.detail}".rstrip()
        _add_row(table, layer.name, *_figure_cells(layer), _path_with_calls(layer), why, dim=not layer.sparse)
    return table


def _figure_cells(layer: LayerReport) -> tuple[str, ...]:
    marked = layer.crossover is not None and layer.axis == _OCCUPANCY
    crossover = f"{percent(layer.crossover)}{' occ.' if marked else ''}"
    shares = percent(layer.density), percent(layer.occupancy), crossover
    return *shares, milliseconds(layer.dense_ms), milliseconds(layer.sparse_ms)


def _reason_numbers(report: Report) -> dict[str, int]:
    counts = Counter(layer.reason for layer in report.layers)
    return {reason: number for number, (reason, _) in enumerate(counts.most_common(), start=1)}


def _reason_lines(report: Report) -> list[str]:
    lines = []
    for reason, number in _reason_numbers(report).items():
        count = sum(layer.reason == reason for layer in report.layers)
        lines.append(f"[{number}] {reason} ({count} layer{'s' if count > 1 else ''})")
    return lines


def _path_with_calls(layer: LayerReport) -> str:
    # A layer whose density moves across its crossover is served by more than one path: only then do the counts matter.
    served = {path: n for path, n in layer.calls.items() if n}
    if set(served) <= {layer.path}:
        return layer.path
    return ", ".join(f"{path} {n}x" for path, n in served.items())


def _profile_table(result: ProfileResult) -> Table:
    table = _table(
        ("module", "left"), ("kind", "left"), ("ms", "right"), ("share", "right"), ("calls", "right"),
        ("density", "right"), ("paths", "left"),
    )  # fmt: skip
    for layer in result.layers:
        paths = ", ".join(f"{path} {n}x" for path, n in layer.paths.items())
        share = percent(layer.total_ms / result.total_ms if result.total_ms else None)
        cells = (milliseconds(layer.total_ms), share, str(layer.calls), percent(layer.density))
        _add_row(table, layer.name, layer.kind, *cells, paths)
    return table


def _kind_table(result: ProfileResult) -> Table:
    table = _table(("kind", "left"), ("ms", "right"), ("share", "right"))
    for kind, total in result.by_kind.items():
        _add_row(table, kind, milliseconds(total), percent(total / result.total_ms if result.total_ms else None))
    return table


def _report_html(report: Report) -> str:
    figures = [_figure_html(figure) for figure in (_density_figure(report), _time_figure(report))]
    rows = [(layer, _figure_cells(layer), _path_with_calls(layer)) for layer in report.layers]
    template = offline.source("sparseflow", "report.html.j2")
    return offline.render(template, report=report, rows=rows, figures=figures)


def _figure_html(figure: go.Figure) -> str:
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False})


def _density_figure(report: Report) -> go.Figure:
    import plotly.graph_objects as go

    layers = report.layers
    names = _labels(report)
    colours = [_SPARSE_COLOUR if layer.sparse else _DENSE_COLOUR for layer in layers]
    bars = go.Bar(x=names, y=_percentages(layers, "load"), name="density or occupancy", marker_color=colours)
    marker = {"symbol": "line-ew-open", "size": 18, "color": _CROSSOVER_COLOUR, "line": {"width": 3}}
    cross = go.Scatter(x=names, y=_percentages(layers, "crossover"), name="crossover", mode="markers", marker=marker)
    title = "Density (for tile kernels occupancy) of the input, and the crossover above which dense wins"
    return _styled(go.Figure([bars, cross]), title, "%")


def _time_figure(report: Report) -> go.Figure:
    import plotly.graph_objects as go

    names = _labels(report)
    dense = [layer.dense_ms for layer in report.layers]
    sparse = [layer.sparse_ms for layer in report.layers]
    bars = [
        go.Bar(x=names, y=dense, name="dense", marker_color=_DENSE_COLOUR),
        go.Bar(x=names, y=sparse, name="sparse, at the observed load", marker_color=_SPARSE_COLOUR),
    ]
    return _styled(go.Figure(bars), "Measured time of each layer", "ms")


def _labels(report: Report) -> list[str]:
    # Plotly reads labels as HTML, so a name in angle brackets would vanish.
    return [html.escape(layer.name) for layer in report.layers]


def _percentages(layers: tuple[LayerReport, ...], field: str) -> list[float | None]:
    return [None if (share := getattr(layer, field)) is None else 100 * share for layer in layers]


def _styled(figure: go.Figure, title: str, unit: str) -> go.Figure:
    figure.update_layout(
        title=title, yaxis_title=unit, template="plotly_white", height=380, legend={"orientation": "h", "y": 1.12},
        xaxis={"tickangle": -45, "type": "category"},
    )  # fmt: skip
    return figure
