"""Calibration on real data: re-measure every layer shape on the tensors that really arrive."""

from __future__ import annotations

import collections
import dataclasses
import functools

import torch
from torch import Tensor

from sparseflow.kernels.base import Call, Refusal
from sparseflow.plan import Crossover, Path

from .cache import LayerObservation
from .measure import Bench, crossing, fastest
from .runtime import LayerRuntime, LayerStats

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
        if site is None or site.policy is None or isinstance(site.kernel, Refusal):
            return
        known = site.policy.crossover
        scan = site.kernel.prescan(x, known.variant)
        self.stats.add(scan)
        if known.key not in self.crossovers and scan.numel and known.dense_ms:
            bench = Bench(site.kernel, x, weight, bias, call)
            self.crossovers[known.key] = refine(known, bench, x, scan.nonzero / scan.numel)
            site.retune(self.crossovers[known.key])

    def observation(self) -> LayerObservation | None:
        """Density and occupancy over all batches; ``None`` if the layer never saw data."""
        stats = self.stats
        if stats.density is None:
            return None
        return LayerObservation(stats.density, stats.occupancy or 0.0, stats.numel)


def refine(known: Crossover, bench: Bench, x: Tensor, density: float) -> Crossover:
    """Scale the synthetic sweep by what sparse really takes on ``x``: real spikes are clustered, synthetic are not."""
    with torch.no_grad():
        packed = bench.kernel.pack(bench.weight, known.variant)
        bench.sparse(x, packed, known.variant)
        runs = {
            "dense": functools.partial(bench.dense, x),
            "sparse": functools.partial(bench.sparse, x, packed, known.variant),
        }
        times = fastest(runs, _BUDGET_MS).ms
    scale = times["sparse"] / known.sparse_ms_at(density)
    scaled = tuple(t * scale for t in known.sparse_ms)
    return dataclasses.replace(
        known, dense_ms=times["dense"], sparse_ms=scaled, density=crossing(times["dense"], known.densities, scaled)
    )
