"""Spikes to measure with: independent ones, and ones with the structure of trained networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Shares of the variance of the field that is thresholded, and the reach of its smooth part in pixels. Fitted to a
# trained spiking ResNet: at 10.7 % density on [4, 256, 56, 56] the share of channels silent in a tile of 16 / 8 / 4
# pixels with its 1-pixel halo is .52 / .62 / .70, where the trained net has .53 / .62 / .71.
_CHANNEL, _SMOOTH, _WHITE = 0.72, 0.18, 0.10
_REACH = 16
_SAMPLES = 1 << 22
_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


def synthetic_spikes(like: Tensor, density: float, seed: int = 0) -> Tensor:
    """Independent spikes of ``density`` with the shape, strides, dtype and device of ``like``.

    Leaves the global random state alone.
    """
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.empty_like(like).bernoulli_(density, generator=generator)


def clustered_spikes(like: Tensor, density: float, seed: int = 0) -> Tensor:
    """Spikes of ``density`` that crowd in some channels and some places, as those of trained networks do.

    A Gaussian field, the sum of an offset per channel, noise that is smooth over space and independent noise, is
    thresholded at the quantile that gives the density.

    Args:
        like: ``[N, C]`` or ``[N, C, *size]`` with up to three spatial dimensions; gives shape, strides, dtype, device.
        density: share of spikes in 0..1.
        seed: of a generator of its own; the global random state is left alone.

    >>> spikes = clustered_spikes(torch.zeros(2, 64, 16, 16), 0.1)
    >>> round(float(spikes.mean()), 3)
    0.1
    """
    spikes = torch.zeros_like(like)
    if density <= 0.0 or not like.numel():
        return spikes
    if density >= 1.0:
        return spikes.fill_(1.0)
    field = _field(tuple(like.shape), torch.Generator(like.device).manual_seed(seed))
    return spikes.copy_(field > _quantile(field, 1.0 - density))


def _field(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard Gaussian field ``[N, C, *size]``."""

    def noise(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=generator.device)

    batch, channels, *size = shape
    field = noise(*shape).mul_(_WHITE**0.5)
    field += noise(1, channels, *[1] * len(size)) * _CHANNEL**0.5
    coarse = noise(batch, channels, *(-(-s // _REACH) + 1 for s in size))
    if size:
        coarse = F.interpolate(coarse, size=size, mode=_INTERPOLATION[len(size)], align_corners=True)
    return field.add_(coarse, alpha=_SMOOTH**0.5 / max(float(coarse.std(correction=0)), 1e-6))


def _quantile(field: Tensor, share: float) -> Tensor:
    """The value below which ``share`` of ``field`` lies; of a sample where the field is large."""
    flat = field.flatten()
    sample = flat[:: -(-flat.numel() // _SAMPLES)]
    return sample.kthvalue(min(sample.numel(), max(1, round(share * sample.numel())))).values
