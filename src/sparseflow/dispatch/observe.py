"""Calibration on real data: re-measure every layer shape on the tensors that really arrive."""

from __future__ import annotations

import collections
import dataclasses
import functools

import torch
from torch import Tensor

from sparseflow.kernels.base import Call, counts
from sparseflow.plan import Crossover, Path

from .cache import LayerObservation
from .graphs import time_on
from .measure import Bench, crossing, fastest
from .runtime import LayerRuntime
from .sites import Measured
from .stats import LayerStats

_BUDGET_MS = 20.0


class CalibrationObserver:
    """Watches the calls of one layer; ``crossovers`` and :meth:`observation` are what it learned."""

    def __init__(self) -> None:
        self.crossovers: dict[str, Crossover] = {}
        self.stats = LayerStats(collections.Counter())

    def __call__(
        self,
        runtime: LayerRuntime,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: Call,
        y: Tensor,  # noqa: ARG002
        path: Path,  # noqa: ARG002
    ) -> None:
        site = runtime.last_site
        if site is None:
            return
        for index, (kernel, measured) in enumerate(site.candidates):
            scan = counts(kernel.prescan(x, measured.eager.variant))
            if index == 0:
                self.stats.add(scan)
            new = [known for known in dict.fromkeys(measured) if known.key not in self.crossovers and known.dense_ms]
            if new and scan.numel:
                bench = Bench(kernel, x, weight, bias, call)
                for known in refine(measured, bench, x, scan.load(kernel.axis)):
                    self.crossovers[known.key] = known
                    site.retune(known)

    def observation(self) -> LayerObservation | None:
        """Density and occupancy over all batches; ``None`` if the layer never saw data."""
        stats = self.stats
        if stats.density is None:
            return None
        return LayerObservation(stats.density, stats.occupancy or 0.0, stats.numel)


def refine(measured: Measured, bench: Bench, x: Tensor, load: float) -> tuple[Crossover, ...]:
    """Scale the synthetic sweeps by what sparse really takes on ``x``: real spikes are clustered in their own way."""
    eager, graph = measured
    with torch.no_grad():
        if not x.is_cuda:
            return (_scaled(eager, load, *_wall_clock(eager, bench, x)),)
        dense, sparse = time_on(bench, x, bench.kernel.pack(bench.weight, graph.variant), graph.variant, _BUDGET_MS)
    return (
        _scaled(eager, load, dense.eager_ms, sparse.eager_ms),
        _scaled(graph, load, dense.device_ms, sparse.device_ms),
    )


def _wall_clock(known: Crossover, bench: Bench, x: Tensor) -> tuple[float, float]:
    """Dense and sparse milliseconds on ``x``."""
    packed = bench.kernel.pack(bench.weight, known.variant)
    bench.sparse(x, packed, known.variant)
    runs = {
        "dense": functools.partial(bench.dense, x),
        "sparse": functools.partial(bench.sparse, x, packed, known.variant),
    }
    times = fastest(runs, _BUDGET_MS).ms
    return times["dense"], times["sparse"]


def _scaled(known: Crossover, load: float, dense_ms: float, sparse_ms: float) -> Crossover:
    scale = sparse_ms / known.sparse_ms_at(load)
    scaled = tuple(t * scale for t in known.sparse_ms)
    density = crossing(dense_ms, known.densities, scaled)
    return dataclasses.replace(known, dense_ms=dense_ms, sparse_ms=scaled, density=density)
