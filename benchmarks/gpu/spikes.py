"""Spikes to measure on: independent, clustered as in trained networks, or with neurons that stay silent."""

from __future__ import annotations

from torch import Tensor

from sparseflow.dispatch.spikes import clustered_spikes, synthetic_spikes

from .layers import STEPS

INDEPENDENT, CLUSTERED, PERSISTENT = "independent", "clustered", "half the neurons silent over all T"


def draw(pattern: str, like: Tensor, density: float, seed: int) -> Tensor:
    """Spikes with the shape ``[T * N, C, *size]`` (or ``[rows, K]``), layout, dtype and device of ``like``.

    Raises:
        ValueError: unknown pattern.
    """
    if pattern == INDEPENDENT:
        return synthetic_spikes(like, density, seed)
    if pattern == CLUSTERED:
        return clustered_spikes(like, density, seed)
    if pattern == PERSISTENT:
        return _persistent(like, density, seed)
    raise ValueError(f"unknown pattern {pattern!r}")


def _persistent(like: Tensor, density: float, seed: int) -> Tensor:
    """Half of the neurons, in clusters, fire at twice the density, the same half in each of the T steps.

    ``[T * N]`` is folded with T outermost, as multi-step layers do it.
    """
    images = -(-like.shape[0] // STEPS)
    alive = clustered_spikes(like[:images], 0.5, seed).repeat(STEPS, *[1] * (like.dim() - 1))[: like.shape[0]]
    return synthetic_spikes(like, min(1.0, 2 * density), seed + 1).mul_(alive)
