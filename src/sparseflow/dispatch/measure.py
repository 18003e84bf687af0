"""Measure where sparse stops winning: dense against two-stage over a density sweep, prescan inside the timer."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparseflow.config import MeasureBudget
from sparseflow.kernels.base import Call, Kernel
from sparseflow.plan import Crossover

DENSITIES = (0.01, 0.04, 0.12, 0.3, 0.6, 1.0)
_VARIANT_DENSITY = 0.08
_HOPELESS = 1.3
_MAX_REPEATS = 9


def _time_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e6


def _best_ms(run: Callable[[], object], repeats: int = 2) -> float:
    return min(_time_ms(run) for _ in range(repeats))


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of ``run`` in ms."""
    return statistics.median(_time_ms(run) for _ in range(repeats))


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
    """Dense and sparse runs of one layer on synthetic inputs, timed in alternation."""

    def __init__(self, kernel: Kernel, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call):
        self.kernel, self.call, self.like = kernel, call, x
        self.weight = weight.detach().to(x.dtype)
        self.bias = None if bias is None else bias.detach().to(x.dtype)

    def dense(self, x: Tensor) -> None:
        """One dense run."""
        self.call.dense(x, self.weight, self.bias)

    def sparse(self, x: Tensor, packed: Tensor, variant: str) -> None:
        """One two-stage run, prescan included."""
        self.kernel.compute(x, self.kernel.prescan(x), packed, self.bias, variant)

    def best_variant(self, dense_ms: float, budget_ms: float) -> tuple[str, Tensor, float]:
        """The fastest variant at a typical density, its packed weight and what packing it took in ms."""
        x = synthetic_spikes(self.like, _VARIANT_DENSITY)
        best: tuple[float, str, Tensor, float] | None = None
        spent = 0.0
        for variant in self.kernel.variants():
            started = time.perf_counter_ns()
            packed = self.kernel.pack(self.weight, variant)
            pack_ms = (time.perf_counter_ns() - started) / 1e6
            self.sparse(x, packed, variant)
            elapsed = _best_ms(lambda p=packed, v=variant: self.sparse(x, p, v), 3)
            if best is None or elapsed < best[0]:
                best = (elapsed, variant, packed, pack_ms)
            spent += (time.perf_counter_ns() - started) / 1e6
            if spent > budget_ms or best[0] > _HOPELESS * 4 * dense_ms:
                break
        assert best is not None
        return best[1:]

    def sweep(self, packed: Tensor, variant: str, dense_ms: float, budget_ms: float) -> tuple[list[float], list[float]]:
        """Densities and sparse times, ascending, up to the first density at which dense clearly wins."""
        densities, times = [], []
        for density in DENSITIES:
            x = synthetic_spikes(self.like, density, seed=1)
            first = _time_ms(lambda x=x: self.sparse(x, packed, variant))
            repeats = _repeats(first, budget_ms / len(DENSITIES))
            times.append(median_ms(lambda x=x: self.sparse(x, packed, variant), repeats))
            densities.append(density)
            if times[-1] > _HOPELESS * dense_ms:
                break
        return densities, times


def _repeats(once_ms: float, budget_ms: float) -> int:
    return max(1, min(_MAX_REPEATS, int(budget_ms / max(once_ms, 1e-3))))


def measure(
    key: str, kernel: Kernel, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, budget: MeasureBudget
) -> Crossover:
    """Measure one layer shape within about ``budget.layer_ms``.

    ``x`` gives shape, strides and dtype; its values are not used, so that a crossover is valid for every input.
    """
    bench = Bench(kernel, x, weight, bias, call)
    sample = synthetic_spikes(x, _VARIANT_DENSITY)
    with torch.no_grad():
        bench.dense(sample)
        once_ms = _time_ms(lambda: bench.dense(sample))
        variant, packed, pack_ms = bench.best_variant(once_ms, 0.4 * budget.layer_ms)
        repeats = _repeats(once_ms, 0.1 * budget.layer_ms)
        before = [_time_ms(lambda: bench.dense(sample)) for _ in range(repeats)]
        densities, sparse_ms = bench.sweep(packed, variant, once_ms, 0.3 * budget.layer_ms)
        after = [_time_ms(lambda: bench.dense(sample)) for _ in range(repeats)]
        prescan_ms = _best_ms(lambda: kernel.prescan(sample), 3)
    dense_ms = statistics.median(before + after)
    return Crossover(
        key=key,
        density=crossing(dense_ms, densities, sparse_ms),
        dense_ms=dense_ms,
        prescan_ms=prescan_ms,
        pack_ms=pack_ms,
        densities=tuple(densities),
        sparse_ms=tuple(sparse_ms),
        variant=variant,
    )
