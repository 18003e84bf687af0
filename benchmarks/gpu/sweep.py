"""Layers at several densities: every sparse kernel against the strongest dense way, in turn, behind a gate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .layers import EFFICIENCY, HEADLINE, LINEAR, LayerShape, resnet18, resnet50
from .problem import Problem, SparseWay
from .records import Gate, LayerRow, Quantiles, RedGate, Row, Skipped
from .runner import Cell
from .spikes import CLUSTERED, INDEPENDENT, PERSISTENT
from .timing import Sampler, Timer, alternate

Point = tuple[str, float]
_REPEATS = 15
_VARIANT_REPEATS = 5
_VARIANT_POINT = {"occupancy": (CLUSTERED, 0.1), "density": (INDEPENDENT, 0.005)}
_EVENT_LIMIT = 0.1  # above it the event kernels are far beyond their crossover, and slow to time
SWEEP: tuple[Point, ...] = (
    *((CLUSTERED, density) for density in (0.0, 0.015, 0.05, 0.1, 0.2, 0.3)),
    (PERSISTENT, 0.05),
    *((INDEPENDENT, density) for density in (0.001, 0.005, 0.02, 0.1)),
)
LINEAR_SWEEP: tuple[Point, ...] = tuple((INDEPENDENT, density) for density in (0.0, 0.01, 0.05, 0.1, 0.2))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One layer, batch and dtype, and the points to measure it at.

    ``compiled`` adds ``torch.compile`` to the dense ways; ``as_published`` the predecessor's comparison (second stage
    alone against eager float32), labelled.
    """

    stage: str
    layer: LayerShape
    steps_times_batch: int
    dtype: torch.dtype
    points: tuple[Point, ...]
    compiled: bool = False
    as_published: bool = False

    @property
    def name(self) -> str:
        """Unique name of the cell."""
        return f"{self.stage}: {self.layer.name}, T*N {self.steps_times_batch}, {short(self.dtype)}"


def short(dtype: torch.dtype) -> str:
    """``"float16"`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


def run(sweep: Sweep, timer: Timer, device: torch.device) -> list[Row]:
    """All rows of one sweep; a kernel that is wrong somewhere has no row there but says so."""
    with torch.no_grad():
        problem = Problem.of(sweep.layer, sweep.steps_times_batch, sweep.dtype, device)
        ways = [way for kernel in problem.kernels() if (way := best_way(problem, kernel, timer)) is not None]
        rows: list[Row] = []
        for point in sweep.points:
            rows += at_point(sweep, problem, ways, point, timer)
        return rows


def best_way(problem: Problem, kernel, timer: Timer) -> SparseWay | None:
    """The kernel with its fastest variant among those that are right; ``None`` if none is."""
    xs = problem.spikes(*_VARIANT_POINT[kernel.axis] if problem.layer.size else (INDEPENDENT, 0.05))
    ways: dict[str, SparseWay] = {}
    samplers: dict[str, Sampler] = {}
    for variant in kernel.variants():
        way = SparseWay.of(kernel, variant, problem.weights)
        try:
            problem.gate(way, xs)
        except RedGate:
            continue  # at_point would find it wrong again; the others may be right
        ways[variant], samplers[variant] = way, timer.prepare(way.whole(xs), len(xs))
    if not ways:
        return None
    times = alternate(samplers, _VARIANT_REPEATS)
    return ways[min(times, key=lambda name: times[name][1])]


def at_point(sweep: Sweep, problem: Problem, ways: Sequence[SparseWay], point: Point, timer: Timer) -> Iterator[Row]:
    """Rows of one pattern and density."""
    xs = problem.spikes(*point)
    green: dict[str, tuple[SparseWay, Gate]] = {}
    for way in ways:
        label = f"{way.kernel.path} {way.variant}"
        if way.kernel.axis == "density" and point[1] > _EVENT_LIMIT and problem.layer.size:
            continue
        try:
            green[label] = way, problem.gate(way, xs)
        except RedGate as wrong:
            yield Skipped(sweep.stage, f"{sweep.name}, {point[0]} {point[1]:g}, {label}", str(wrong))
    samplers = prepared(sweep, problem, {label: way for label, (way, _) in green.items()}, xs, timer)
    times = alternate(samplers, _REPEATS)
    for label, (way, gate) in green.items():
        yield from rows_of(sweep, problem, way, gate, point, xs[0], times, label)


def prepared(
    sweep: Sweep, problem: Problem, ways: dict[str, SparseWay], xs: list[Tensor], timer: Timer
) -> dict[str, Sampler]:
    """Everything that takes turns at one point."""
    ready = functools.partial(timer.prepare, inputs=len(xs))
    samplers = {"dense": ready(problem.dense(xs)), "eager float32": ready(problem.eager_float32(xs), graphed=False)}
    if sweep.compiled:
        samplers["dense compiled"] = ready(problem.compiled(xs))
    for label, way in ways.items():
        samplers[label] = ready(way.whole(xs))
        samplers[f"{label} prescan"] = ready(way.prescan(xs))
        if sweep.as_published:
            samplers[f"{label} compute"] = ready(way.compute(xs))
    return samplers


def rows_of(
    sweep: Sweep,
    problem: Problem,
    way: SparseWay,
    gate: Gate,
    point: Point,
    x: Tensor,
    times: dict[str, Quantiles],
    label: str,
) -> Iterator[LayerRow]:
    """The row against the strongest dense way, and the labelled ones beside it."""
    strongest = min((name for name in times if name.startswith("dense")), key=lambda name: times[name][1])
    pairs = [(label, strongest), (label, "eager float32")]
    if sweep.as_published:
        pairs.append((f"{label} compute", "eager float32"))
    found = way.counted(x)
    for ours, theirs in pairs:
        yield LayerRow(
            stage=sweep.stage,
            layer=sweep.layer.name,
            dtype=short(sweep.dtype),
            steps_times_batch=sweep.steps_times_batch,
            pattern=point[0],
            target=point[1],
            density=found.load("density"),
            path=str(way.kernel.path),
            variant=way.variant,
            axis=way.kernel.axis,
            load=found.load(way.kernel.axis),
            ms=times[ours],
            prescan_ms=times[f"{label} prescan"][1],
            includes_prescan=ours == label,
            baseline=_BASELINES.get(theirs, theirs),
            baseline_ms=times[theirs],
            speedup=times[theirs][1] / times[ours][1],
            cold=problem.cold,
            gate=gate,
        )


_BASELINES = {
    "dense": "dense, same dtype, channels-last, graphed",
    "dense compiled": "dense, same dtype, channels-last, compiled, graphed",
    "eager float32": "eager float32 without TF32, contiguous, not graphed",
}


def cells(timer: Timer, device: torch.device) -> Iterator[Cell]:
    """All sweeps as cells, with what they are expected to take in seconds."""
    # Networks share layers; what comes up twice is measured where it matters more.
    unique = {sweep.name: (priority, sweep) for priority, sweep in sorted(planned(), key=lambda item: -item[0])}
    for priority, sweep in reversed(unique.values()):
        seconds = 6.0 + 0.5 * len(sweep.points) + (6.0 if sweep.compiled else 0.0)
        yield Cell(sweep.name, priority, seconds, functools.partial(run, sweep, timer, device))


def planned() -> Iterator[tuple[int, Sweep]]:
    """What is measured, and how much it matters."""
    half, bfloat, single = torch.float16, torch.bfloat16, torch.float32
    for layer, density in HEADLINE:
        points = ((CLUSTERED, density), (INDEPENDENT, density))
        yield 1, Sweep("headline", layer, 128, half, points, compiled=True, as_published=True)
    for layer in EFFICIENCY:
        yield 1, Sweep("full occupancy", layer, 128, half, ((INDEPENDENT, 0.9),), compiled=True, as_published=True)
    gather = tuple((INDEPENDENT, density) for density in (0.001, 0.0025, 0.005, 0.01, 0.02))
    for layer in (EFFICIENCY[0], EFFICIENCY[3]):
        yield 1, Sweep("gather", layer, 128, half, gather)
    for rows in (1, 4, 32):
        for layer in LINEAR:
            yield 1, Sweep("linear", layer, rows, half, LINEAR_SWEEP, compiled=rows == 1)
    small, large = resnet18(224), [layer for layer in resnet50(224) if layer not in resnet18(224)]
    yield from _grid(2, small, (128,), (half,), compiled=True)
    yield from _grid(4, small, (128,), (single,))
    yield from _grid(5, small, (4,), (half, single))
    yield from _grid(6, large, (128,), (half,))
    yield from _grid(7, small, (32, 256), (half,))
    yield from _grid(8, small, (128,), (bfloat,))
    yield from _grid(8, large, (4,), (half,))
    yield from _grid(9, resnet18(32), (4, 128), (half, single))
    yield from _grid(9, resnet50(32), (128,), (half,))


def _grid(
    priority: int, layers: Iterable[LayerShape], batches: Sequence[int], dtypes: Sequence[torch.dtype], compiled=False
) -> Iterator[tuple[int, Sweep]]:
    for layer in layers:
        for batch in batches:
            for dtype in dtypes:
                yield priority, Sweep("sweep", layer, batch, dtype, SWEEP, compiled)
