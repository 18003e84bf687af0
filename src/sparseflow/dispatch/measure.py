"""Measure where sparse stops winning: dense against two-stage over a sweep of inputs, prescan inside the timer."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from sparseflow.config import MeasureBudget
from sparseflow.kernels.base import DENSITY, Call, Kernel, LinearCall, counts
from sparseflow.plan import Crossover

from .progress import compile_budget
from .spikes import clustered_spikes, synthetic_spikes

try:
    import resource
except ImportError:  # not a Unix system
    resource = None

DENSITIES = (0.01, 0.04, 0.12, 0.3, 0.6, 1.0)
DEFERRED_DENSITIES = (0.0, 0.001, 0.005, 0.02, 0.08, 0.3, 1.0)
VARIANT_DENSITY = 0.08
HOPELESS = 1.3
_WARM_UP = 3
_SWEEP_BYTES = 8 << 20
_MIN_ROUNDS = 3
_MAX_ROUNDS = 60
_Key = TypeVar("_Key", bound=Hashable)


class Sample(NamedTuple):
    """One timed run in ms, and whether other work disturbed it."""

    ms: float
    disturbed: bool


def _time_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e6


def crossing(dense_ms: float, loads: Sequence[float], sparse_ms: Sequence[float]) -> float:
    """The load at which the sparse time reaches ``dense_ms``; 0 if sparse never wins, the last load if it always does.

    >>> round(crossing(2.0, (0.1, 0.3), (1.0, 3.0)), 6)
    0.2
    """
    if sparse_ms[0] >= dense_ms:
        return 0.0
    points = list(zip(loads, sparse_ms, strict=True))
    for (d0, t0), (d1, t1) in itertools.pairwise(points):
        if t1 >= dense_ms:
            return d0 + (d1 - d0) * (dense_ms - t0) / (t1 - t0)
    return points[-1][0]


def curve(points: Iterable[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Loads in ascending order and their times, from ``(load, ms)`` pairs; of equal loads the longer time.

    >>> curve([(0.5, 2.0), (0.1, 1.0), (0.5, 3.0)])
    ((0.1, 0.5), (1.0, 3.0))
    """
    longest: dict[float, float] = {}
    for load, ms in sorted(points):
        longest[load] = max(ms, longest.get(load, 0.0))
    return tuple(longest), tuple(longest.values())


class UnusableKernelError(RuntimeError):
    """A kernel that does not compile or run here."""


class Bench:
    """Dense and sparse runs of one layer, and the inputs of a sweep."""

    def __init__(self, kernel: Kernel, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call):
        self.kernel, self.call, self.like = kernel, call, x
        self.weight = weight.detach().to(x.dtype)
        self.bias = None if bias is None else bias.detach().to(x.dtype)

    @property
    def densities(self) -> tuple[float, ...]:
        """Densities of the sweep: down to silence on a GPU, where layers that lose at 1 % may win below."""
        return DEFERRED_DENSITIES if self.kernel.deferred else DENSITIES

    def spikes(self, density: float, seed: int = 1) -> Tensor:
        """An input of the sweep: independent spikes, or clustered ones where the time follows the occupancy."""
        if self.kernel.axis == DENSITY:
            return synthetic_spikes(self.like, density, seed)
        rows = self.like.flatten(0, -2) if isinstance(self.call, LinearCall) else self.like
        return clustered_spikes(rows, density, seed).view_as(self.like)

    def load(self, x: Tensor, density: float, variant: str) -> float:
        """The load of ``x``, made with ``density``, as the kernel counts it."""
        if not self.kernel.deferred:
            return density
        return counts(self.kernel.prescan(x, variant)).load(self.kernel.axis)

    def dense(self, x: Tensor) -> None:
        """One dense run."""
        self.call.dense(x, self.weight, self.bias)

    def prescan(self, x: Tensor, variant: str) -> None:
        """One first stage."""
        self.kernel.prescan(x, variant)

    def sparse(self, x: Tensor, packed: Any, variant: str) -> None:
        """One two-stage run, prescan included."""
        self.kernel.compute(x, self.kernel.prescan(x, variant), packed, self.bias, variant)

    def prepared(self, x: Tensor, budget: MeasureBudget) -> dict[str, Packing]:
        """Every variant worth timing with its packed weight, compiled; the first only once compiling takes too long.

        Raises:
            UnusableKernelError: no variant compiles and runs on this GPU.
        """
        found: dict[str, Packing] = {}
        compiling, failure = compile_budget(budget), None
        for variant in self.kernel.variants():
            if found and compiling.spent:
                break
            if self.kernel.deferred:
                try:
                    with compiling.spending():
                        self.sparse(x, self.kernel.pack(self.weight, variant), variant)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # of the compiler's many: a small GPU has no room for every variant
                    failure = error
                    continue
            started = time.perf_counter_ns()
            values = self.kernel.pack(self.weight, variant)
            wait_for(x.device)
            found[variant] = Packing(values, (time.perf_counter_ns() - started) / 1e6)
        if not found:
            raise UnusableKernelError(f"{type(failure).__name__}: {failure}") from failure
        return found

    def best_variant(self, budget: MeasureBudget) -> tuple[str, Packing]:
        """The fastest variant at a typical density."""
        x = self.spikes(VARIANT_DENSITY, seed=0)
        prepared = self.prepared(x, budget)
        runs = {v: functools.partial(self.sparse, x, packing.values, v) for v, packing in prepared.items()}
        times = fastest(runs, 0.25 * budget.layer_ms).ms if len(runs) > 1 else dict.fromkeys(runs, 0.0)
        best = min(times, key=times.__getitem__)
        return best, prepared[best]

    def sweep(self, packed: Any, variant: str, budget_ms: float) -> Sweep:
        """Dense, prescan and sparse times up to the first density at which sparse clearly loses."""
        inputs = {d: self.spikes(d) for d in self.densities}
        sample = inputs[self.densities[1]]
        runs: dict[object, Callable[[], object]] = {
            "dense": functools.partial(self.dense, sample),
            "prescan": functools.partial(self.prescan, sample, variant),
        }
        limit_ms = HOPELESS * min(_time_ms(runs["dense"]) for _ in range(_WARM_UP))
        loads: dict[float, float] = {}
        for density, x in inputs.items():
            runs[density] = functools.partial(self.sparse, x, packed, variant)
            runs[density]()
            loads[density] = self.load(x, density, variant)
            if _time_ms(runs[density]) > limit_ms and enough(loads):
                break
        times = fastest(runs, budget_ms)
        sparse = tuple((loads[d], times.ms[d]) for d in loads)
        return Sweep(times.ms["dense"], times.ms["prescan"], sparse, times.quiet)


class Packing(NamedTuple):
    """A packed weight and the time that packing took."""

    values: Any
    ms: float


class Sweep(NamedTuple):
    """Times of one layer in ms; ``sparse`` holds ``(load, ms)`` points."""

    dense_ms: float
    prescan_ms: float
    sparse: tuple[tuple[float, float], ...]
    quiet: bool

    def crossover(self, key: str, kernel: Kernel, variant: str, pack_ms: float) -> Crossover:
        """The record of this sweep."""
        loads, sparse_ms = curve(self.sparse)
        return Crossover(
            key=key,
            density=crossing(self.dense_ms, loads, sparse_ms),
            dense_ms=self.dense_ms,
            prescan_ms=self.prescan_ms,
            pack_ms=pack_ms,
            densities=loads,
            sparse_ms=sparse_ms,
            variant=variant,
            quiet=self.quiet,
            axis=kernel.axis,
        )


def enough(densities: Collection[float]) -> bool:
    """Whether the sweep may end here: what loses on silence loses on everything, else a curve has two points."""
    return len(densities) > 1 or set(densities) == {0.0}


def wait_for(device: torch.device) -> None:
    """Let a GPU finish what was launched, so that a clock on the wall sees it; at once on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclasses.dataclass(frozen=True)
class Times(Generic[_Key]):
    """Shortest time of every run in ms; ``quiet`` says that each had the processors to itself for it."""

    ms: dict[_Key, float]
    quiet: bool


def fastest(runs: Mapping[_Key, Callable[[], object]], budget_ms: float) -> Times[_Key]:
    """Shortest wall-clock times of ``runs``, each after a sweep through the caches; see :func:`shortest`."""
    return shortest({key: functools.partial(_wall_clock, run) for key, run in runs.items()}, budget_ms)


def shortest(samples: Mapping[_Key, Callable[[], Sample]], budget_ms: float) -> Times[_Key]:
    """Sample all runs in turn until another round changes none of the shortest times by more than 3 %.

    What disturbs a run only ever makes it longer, so the shortest is the one to compare; runs that were disturbed count
    only where there is no other. On a quiet machine the rounds end within ``budget_ms``, on a busy one they may take
    three times as long.
    """
    best = dict.fromkeys(samples, float("inf"))
    disturbed = dict.fromkeys(samples, float("inf"))
    started = time.perf_counter()
    for number in range(1, _MAX_ROUNDS + 1):
        before = dict(best)
        for key, sample in samples.items():
            found = sample()
            kept = disturbed if found.disturbed else best
            kept[key] = min(kept[key], found.ms)
        spent_ms = (time.perf_counter() - started) * 1e3
        settled = number >= _MIN_ROUNDS and all(before[key] <= 1.03 * best[key] < float("inf") for key in samples)
        if (settled and spent_ms > budget_ms / 2) or spent_ms > 3 * budget_ms:
            break
    quiet = all(ms < float("inf") for ms in best.values())
    return Times({key: ms if ms < float("inf") else disturbed[key] for key, ms in best.items()}, quiet)


def _wall_clock(run: Callable[[], object]) -> Sample:
    """One run on a clock on the wall; disturbed where the scheduler took a processor away."""
    sweep_caches()
    switches = _preemptions()
    elapsed = _time_ms(run)
    return Sample(elapsed, _preemptions() != switches)


@functools.cache
def _sweep_buffer() -> Tensor:
    return torch.zeros(_SWEEP_BYTES // 4)


def sweep_caches() -> None:
    """Leave the caches as other layers would: between two calls of a layer the whole network runs."""
    _sweep_buffer().add_(1.0)


def _preemptions() -> int:
    """How often a thread of this process lost its processor so far; 0 where the system does not count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0


def measure(
    key: str, kernel: Kernel, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, budget: MeasureBudget
) -> Crossover:
    """Measure one layer shape on the CPU within about ``budget.layer_ms``.

    ``x`` gives shape, strides and dtype; its values are not used, so that a crossover is valid for every input.
    """
    bench = Bench(kernel, x, weight, bias, call)
    with torch.no_grad():
        variant, packing = bench.best_variant(budget)
        sweep = bench.sweep(packing.values, variant, 0.5 * budget.layer_ms)
    return sweep.crossover(key, kernel, variant, packing.ms)
