"""Where a fused block computes on events, and where a dense convolution in front of its neuron is faster."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from sparseflow.config import MeasureBudget
from sparseflow.kernels.blocks.spikes import PackedSpikes, pack
from sparseflow.kernels.geometry import ConvGeometry
from sparseflow.plan import Crossover

from .crossovers import RuntimeConfig, shared_cache
from .measure import DENSITIES, HOPELESS, VARIANT_DENSITY, crossing, curve, fastest
from .progress import layer_budget, note_disturbed
from .spikes import synthetic_spikes

Run = Callable[[PackedSpikes, str | None], object]


def block_key(
    ops: str, geometry: ConvGeometry, steps: int, neuron: str, residual: str, weight_share: float = 1.0
) -> str:
    """What the crossover of a block is stored under: everything that its time depends on but the spikes."""
    g = geometry
    sizes = "x".join(map(str, (g.batch, g.in_channels, g.out_channels, g.groups)))
    shape = f"{g.in_size}{g.kernel}{g.stride}{g.padding}{g.dilation}".replace(" ", "")
    shape += f"|blocks{weight_share}" if weight_share < 1.0 else ""
    return f"block|{ops}|{sizes}|{shape}|T{steps}|{neuron}|{residual}|t{torch.get_num_threads()}"


def block_crossover(
    name: str, key: str, variants: tuple[str, ...], like: PackedSpikes, run: Run, config: RuntimeConfig
) -> Crossover:
    """The crossover of a block, measured where nobody did so before.

    Args:
        name: of the block, for messages.
        key: see :func:`block_key`.
        variants: sparse configurations, at least one.
        like: packed spikes of the block's input shape.
        run: runs the block on packed spikes, in a sparse configuration or (``None``) dense.
        config: forced modes measure nothing.
    """
    if config.mode == "sparse":
        return Crossover(key, 1.0, 0.0, 0.0, 0.0, (1.0,), (0.0,), variants[0])
    known = config.known.get(key) or shared_cache.get(key)
    if known is not None and known.variant in variants:
        return known
    with layer_budget(config.budget) as budget:
        found = _measure(key, variants, like, run, budget)
    if found.quiet:
        shared_cache.put(found)
    else:
        note_disturbed(name)
    return found


def _measure(key: str, variants: tuple[str, ...], like: PackedSpikes, run: Run, budget: MeasureBudget) -> Crossover:
    inputs = {density: _spikes(like, density) for density in (VARIANT_DENSITY, *DENSITIES)}
    typical = inputs[VARIANT_DENSITY]
    contest = {variant: functools.partial(run, typical, variant) for variant in variants}
    for first in contest.values():  # packs the weight, which takes longer than a call of a large layer
        first()
    times = fastest(contest, 0.25 * budget.layer_ms).ms if len(contest) > 1 else dict.fromkeys(contest, 0.0)
    best = min(times, key=times.__getitem__)
    runs: dict[object, Callable[[], object]] = {"dense": functools.partial(run, typical, None)}
    limit = HOPELESS * fastest({"dense": runs["dense"]}, 1.0).ms["dense"]
    for density in DENSITIES:
        runs[density] = functools.partial(run, inputs[density], best)
        if len(runs) > 2 and fastest({density: runs[density]}, 0.0).ms[density] > limit:
            break
    found = fastest(runs, 0.5 * budget.layer_ms)
    dense_ms = found.ms["dense"]
    loads, sparse_ms = curve((density, found.ms[density]) for density in DENSITIES if density in found.ms)
    return Crossover(
        key=key,
        density=crossing(dense_ms, loads, sparse_ms),
        dense_ms=dense_ms,
        prescan_ms=0.0,
        pack_ms=0.0,
        densities=loads,
        sparse_ms=sparse_ms,
        variant=best,
        quiet=found.quiet,
    )


def _spikes(like: PackedSpikes, density: float) -> PackedSpikes:
    dense = torch.empty(like.images, like.channels, *like.size, device=like.bits.device)
    return pack(synthetic_spikes(dense, density, seed=1), 1)
