"""Layers at several densities: every sparse kernel against the strongest dense way, in turn, behind a gate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layers import EFFICIENCY, HEADLINE, LINEAR, PRUNED, PRUNED_LINEAR, LayerShape, resnet18, resnet50
from .problem import DenseLayer, Problem, SparseWay
from .records import Gate, LayerRow, Quantiles, RedGate, Row, Skipped
from .runner import Cell, is_fatal
from .spikes import CLUSTERED, INDEPENDENT, PERSISTENT
from .timing import Sampler, Timer, alternate

Point = tuple[str, float]
DISPATCHED = "dispatched"
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
    alone against eager float32), labelled; ``dispatched`` the layer as users get it.
    """

    stage: str
    layer: LayerShape
    steps_times_batch: int
    dtype: torch.dtype
    points: tuple[Point, ...]
    compiled: bool = False
    as_published: bool = False
    dispatched: bool = False

    @property
    def name(self) -> str:
        """Unique name of the cell."""
        return f"{self.stage}: {self.layer.name}, T*N {self.steps_times_batch}, {short(self.dtype)}"


def short(dtype: torch.dtype) -> str:
    """``"float16"`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


def run(sweep: Sweep, timer: Timer, device: torch.device) -> list[Row]:
    """All rows of one sweep; what is wrong or does not run has no row but says so."""
    with torch.no_grad():
        problem = Problem.of(sweep.layer, sweep.steps_times_batch, sweep.dtype, device)
        rows: list[Row] = []
        ways: dict[str, SparseWay] = {}
        for kernel in problem.kernels():
            best, refused = best_way(sweep, problem, kernel, timer)
            rows += refused
            if best is not None:
                ways[f"{kernel.path} {best.variant}"] = best
        dense = problem.dense_layers(compiled=sweep.compiled)
        rivals = Rivals(dense, problem.dispatched() if sweep.dispatched else None, ways)
        for point in sweep.points:
            rows += at_point(sweep, problem, rivals, point, timer)
        return rows


@dataclasses.dataclass(frozen=True)
class Rivals:
    """What takes turns at every point of a sweep; sparse ways by their label."""

    dense: dict[str, DenseLayer]
    dispatched: nn.Module | None
    ways: dict[str, SparseWay]

    def at(self, density: float) -> dict[str, Callable[[Tensor], Tensor]]:
        """The sparse ones worth timing at ``density``."""
        few = density <= _EVENT_LIMIT
        found: dict[str, Callable[[Tensor], Tensor]] = {}
        found.update((label, way) for label, way in self.ways.items() if few or way.kernel.axis != "density")
        if self.dispatched is not None:
            found[DISPATCHED] = self.dispatched
        return found


def best_way(sweep: Sweep, problem: Problem, kernel: Any, timer: Timer) -> tuple[SparseWay | None, list[Row]]:
    """The kernel with its fastest variant among those that are right, and what was wrong with the others."""
    xs = problem.spikes(*_VARIANT_POINT[kernel.axis] if problem.layer.size else (INDEPENDENT, 0.05))
    ways: dict[str, SparseWay] = {}
    samplers: dict[str, Sampler] = {}
    refused: list[Row] = []
    for variant in kernel.variants():
        try:
            way = SparseWay.of(kernel, variant, problem.weights)
            problem.gate(way, xs)
            samplers[variant] = timer.prepare(way.whole(xs), len(xs))
        except Exception as error:  # one that does not compile or is wrong leaves the others standing
            if is_fatal(error):
                raise
            refused.append(_refusal(sweep, f"{kernel.path} {variant}", error))
        else:
            ways[variant] = way
    if not ways:
        return None, refused
    times = alternate(samplers, _VARIANT_REPEATS)
    return ways[min(times, key=lambda name: times[name][1])], refused


def _refusal(sweep: Sweep, what: str, error: Exception) -> Skipped:
    return Skipped(sweep.stage, f"{sweep.name}, {what}", f"{type(error).__name__}: {error}"[:500])


def at_point(sweep: Sweep, problem: Problem, rivals: Rivals, point: Point, timer: Timer) -> Iterator[Row]:
    """Rows of one pattern and density."""
    xs = problem.spikes(*point)
    if rivals.dispatched is not None:
        problem.settle(rivals.dispatched, xs)
    gates: dict[str, Gate] = {}
    for label, way in rivals.at(point[1]).items():
        try:
            gates[label] = problem.gate(way, xs)
        except RedGate as wrong:
            yield _refusal(sweep, f"{point[0]} {point[1]:g}, {label}", wrong)
    times = alternate(prepared(sweep, problem, rivals, gates.keys(), xs, timer), _REPEATS)
    row = RowMaker(sweep, problem, point, times)
    for label, gate in gates.items():
        if label == DISPATCHED:
            yield row.of_dispatched(gate, xs[0])
        else:
            yield from row.of_way(label, rivals.ways[label], gate, xs[0])


def prepared(
    sweep: Sweep, problem: Problem, rivals: Rivals, right: Collection[str], xs: list[Tensor], timer: Timer
) -> dict[str, Sampler]:
    """Everything that takes turns at one point: dense, and the sparse ways that were ``right``."""
    ready = functools.partial(timer.prepare, inputs=len(xs))
    samplers = {name: ready(problem.dense(layer, xs)) for name, layer in rivals.dense.items()}
    samplers["eager float32"] = ready(problem.eager_float32(xs), graphed=False)
    layer = rivals.dispatched
    if layer is not None and DISPATCHED in right:
        samplers[DISPATCHED] = ready(lambda i: layer(xs[i]))
    for label, way in rivals.ways.items():
        if label not in right:
            continue
        samplers[label] = ready(way.whole(xs))
        samplers[f"{label} prescan"] = ready(way.prescan(xs))
        if sweep.as_published:
            samplers[f"{label} compute"] = ready(way.compute(xs))
    return samplers


@dataclasses.dataclass(frozen=True)
class RowMaker:
    """Turns the times of one point into rows."""

    sweep: Sweep
    problem: Problem
    point: Point
    times: dict[str, Quantiles]

    def of_way(self, label: str, way: SparseWay, gate: Gate, x: Tensor) -> Iterator[LayerRow]:
        """A kernel against the strongest dense way, and the labelled rows beside it."""
        pairs = [(label, self.strongest), (label, "eager float32")]
        if self.sweep.as_published:
            pairs.append((f"{label} compute", "eager float32"))
        found = way.counted(x)
        for ours, theirs in pairs:
            yield self.row(
                ours,
                theirs,
                path=str(way.kernel.path),
                variant=way.variant,
                axis=way.kernel.axis,
                load=found.load(way.kernel.axis),
                density=found.load("density"),
                prescan_ms=self.times[f"{label} prescan"][1],
                includes_prescan=ours == label,
                gate=gate,
            )

    def of_dispatched(self, gate: Gate, x: Tensor) -> LayerRow:
        """The layer as users get it, against the strongest dense way."""
        density = float((x != 0).float().mean())
        return self.row(
            DISPATCHED,
            self.strongest,
            path=DISPATCHED,
            variant="",
            axis="density",
            load=density,
            density=density,
            prescan_ms=None,
            includes_prescan=True,
            gate=gate,
        )

    @property
    def strongest(self) -> str:
        """The fastest dense way."""
        return min((name for name in self.times if name.startswith("dense")), key=lambda name: self.times[name][1])

    def row(self, ours: str, theirs: str, **fields: Any) -> LayerRow:
        """One row: ``ours`` against ``theirs``."""
        return LayerRow(
            stage=self.sweep.stage,
            layer=self.sweep.layer.name,
            dtype=short(self.sweep.dtype),
            steps_times_batch=self.sweep.steps_times_batch,
            pattern=self.point[0],
            target=self.point[1],
            ms=self.times[ours],
            baseline=_BASELINES[theirs],
            baseline_ms=self.times[theirs],
            speedup=self.times[theirs][1] / self.times[ours][1],
            cold=self.problem.cold,
            **fields,
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
    some = tuple((CLUSTERED, density) for density in (0.0, 0.015, 0.08, 0.2))
    for layer in PRUNED:
        yield 3, Sweep("pruned", layer, 128, half, some, dispatched=True)
    for layer in PRUNED_LINEAR:
        yield 3, Sweep("pruned", layer, 512, half, LINEAR_SWEEP, dispatched=True)
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
                yield priority, Sweep("sweep", layer, batch, dtype, SWEEP, compiled, dispatched=True)
