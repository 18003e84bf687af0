"""Measure where sparse stops winning: dense against two-stage over a density sweep, prescan inside the timer."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sparseflow.config import MeasureBudget
from sparseflow.kernels.base import Call, Kernel
from sparseflow.plan import Crossover

try:
    import resource
except ImportError:  # not a Unix system
    resource = None

DENSITIES = (0.01, 0.04, 0.12, 0.3, 0.6, 1.0)
_VARIANT_DENSITY = 0.08
_HOPELESS = 1.3
_WARM_UP = 3
_SWEEP_BYTES = 8 << 20
_MIN_ROUNDS = 3
_MAX_ROUNDS = 60
_Key = TypeVar("_Key", bound=Hashable)


def _time_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e6


def synthetic_spikes(like: Tensor, density: float, seed: int = 0) -> Tensor:
    """Independent spikes of ``density`` with the shape, strides and dtype of ``like``; leaves the global RNG alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty_like(like).bernoulli_(density, generator=generator)


def crossing(dense_ms: float, densities: Sequence[float], sparse_ms: Sequence[float]) -> float:
    """The density at which the sparse time reaches ``dense_ms``; 0 if sparse never wins, 1 if it always does.

    >>> round(crossing(2.0, (0.1, 0.3), (1.0, 3.0)), 6)
    0.2
    """
    if sparse_ms[0] >= dense_ms:
        return 0.0
    points = list(zip(densities, sparse_ms, strict=True))
    for (d0, t0), (d1, t1) in itertools.pairwise(points):
        if t1 >= dense_ms:
            return d0 + (d1 - d0) * (dense_ms - t0) / (t1 - t0)
    return points[-1][0]


class Bench:
    """Dense and sparse runs of one layer."""

    def __init__(self, kernel: Kernel, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call):
        self.kernel, self.call, self.like = kernel, call, x
        self.weight = weight.detach().to(x.dtype)
        self.bias = None if bias is None else bias.detach().to(x.dtype)

    def dense(self, x: Tensor) -> None:
        """One dense run."""
        self.call.dense(x, self.weight, self.bias)

    def sparse(self, x: Tensor, packed: Tensor, variant: str) -> None:
        """One two-stage run, prescan included."""
        self.kernel.compute(x, self.kernel.prescan(x, variant), packed, self.bias, variant)

    def best_variant(self, budget_ms: float) -> tuple[str, Tensor, float]:
        """The fastest variant at a typical density, its packed weight and what packing it took in ms."""
        x = synthetic_spikes(self.like, _VARIANT_DENSITY)
        packed: dict[str, tuple[Tensor, float]] = {}
        for variant in self.kernel.variants():
            started = time.perf_counter_ns()
            weight = self.kernel.pack(self.weight, variant)
            packed[variant] = (weight, (time.perf_counter_ns() - started) / 1e6)
        runs = {v: functools.partial(self.sparse, x, weight, v) for v, (weight, _) in packed.items()}
        times = fastest(runs, budget_ms).ms if len(runs) > 1 else dict.fromkeys(runs, 0.0)
        best = min(times, key=times.__getitem__)
        return best, *packed[best]

    def sweep(self, packed: Tensor, variant: str, budget_ms: float) -> Times[object]:
        """Times of ``"dense"``, ``"prescan"`` and, by density, sparse up to the first density that clearly loses."""
        inputs = {d: synthetic_spikes(self.like, d, seed=1) for d in DENSITIES}
        sample = inputs[DENSITIES[1]]
        runs: dict[object, Callable[[], object]] = {
            "dense": functools.partial(self.dense, sample),
            "prescan": functools.partial(self.kernel.prescan, sample, variant),
        }
        limit_ms = _HOPELESS * min(_time_ms(runs["dense"]) for _ in range(_WARM_UP))
        for density, x in inputs.items():
            runs[density] = functools.partial(self.sparse, x, packed, variant)
            runs[density]()
            if _time_ms(runs[density]) > limit_ms and density > DENSITIES[0]:
                break
        return fastest(runs, budget_ms)


@dataclasses.dataclass(frozen=True)
class Times(Generic[_Key]):
    """Shortest time of every run in ms; ``quiet`` says that each had the processors to itself for it."""

    ms: dict[_Key, float]
    quiet: bool


def fastest(runs: Mapping[_Key, Callable[[], object]], budget_ms: float) -> Times[_Key]:
    """Time all runs in turn until another round changes none of the shortest times by more than 3 %.

    What disturbs a run only ever makes it longer, so the shortest is the one to compare; runs during which the
    scheduler took a processor away count only where there is no other. On a quiet machine the rounds end within
    ``budget_ms``, on a busy one they may take three times as long.
    """
    best = dict.fromkeys(runs, float("inf"))
    disturbed = dict.fromkeys(runs, float("inf"))
    started = time.perf_counter()
    for number in range(1, _MAX_ROUNDS + 1):
        before = dict(best)
        for key, run in runs.items():
            sweep_caches()
            switches = _preemptions()
            elapsed = _time_ms(run)
            kept = best if _preemptions() == switches else disturbed
            kept[key] = min(kept[key], elapsed)
        spent_ms = (time.perf_counter() - started) * 1e3
        settled = number >= _MIN_ROUNDS and all(before[key] <= 1.03 * best[key] < float("inf") for key in runs)
        if (settled and spent_ms > budget_ms / 2) or spent_ms > 3 * budget_ms:
            break
    quiet = all(ms < float("inf") for ms in best.values())
    return Times({key: ms if ms < float("inf") else disturbed[key] for key, ms in best.items()}, quiet)


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
    """Measure one layer shape within about ``budget.layer_ms``.

    ``x`` gives shape, strides and dtype; its values are not used, so that a crossover is valid for every input.
    """
    bench = Bench(kernel, x, weight, bias, call)
    with torch.no_grad():
        variant, packed, pack_ms = bench.best_variant(0.25 * budget.layer_ms)
        times = bench.sweep(packed, variant, 0.5 * budget.layer_ms)
    densities = tuple(d for d in DENSITIES if d in times.ms)
    sparse_ms = tuple(times.ms[d] for d in densities)
    return Crossover(
        key=key,
        density=crossing(times.ms["dense"], densities, sparse_ms),
        dense_ms=times.ms["dense"],
        prescan_ms=times.ms["prescan"],
        pack_ms=pack_ms,
        densities=densities,
        sparse_ms=sparse_ms,
        variant=variant,
        quiet=times.quiet,
        axis=kernel.axis,
    )
