"""How much of a sequence is in the order and timing of its frames, seen from the frames alone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_SCALES = (2, 4, 8)
_MIN_STEPS = 2


def time_share(x_seq: Tensor) -> float:
    """Share of the variance between frames that independent sampling of every value does not explain, in 0..1.

    Rate-coded input draws each value of each frame for itself: the count of a region then varies over time by the sum
    of its values' own variances. What it varies beyond that is covariance, and so something that moves, appears or
    flickers: the signal that is in time. Regions are 2, 4 and 8 values wide, and the largest share counts, since what
    moves inside a region does not change its count. What two standard errors can explain is not counted, so that a
    small example says too little rather than too much. 0 where nothing changes over time.

    Args:
        x_seq: ``[T, N, ...]`` of any rank and kind of values, spikes or currents.

    >>> import torch
    >>> torch.manual_seed(0).initial_seed()
    0
    >>> rate = (torch.rand(16, 8, 1, 16, 16) < torch.rand(1, 8, 1, 16, 16)).float()
    >>> bar = torch.zeros(16, 8, 1, 16, 16)
    >>> for t in range(16):
    ...     bar[t, :, :, :, t] = 1
    >>> time_share(rate) < 0.05 < 0.5 < time_share(bar)
    True
    """
    if x_seq.shape[0] < _MIN_STEPS:
        return 0.0
    x = x_seq.detach().float()
    single = x.var(0)
    shares = [_share(x, single, scale) for scale in _SCALES]
    return max(0.0, *shares)


def _share(x: Tensor, single: Tensor, scale: int) -> float:
    counts = _regions(x.flatten(0, 1), scale).unflatten(0, x.shape[:2])
    between = counts.var(0)
    unexplained = between - _regions(single, scale)
    if not between.sum() > 0:
        return 0.0
    # Under independence every region of every sample is off by a chance of its own, zero on average.
    error = unexplained.square().sum().sqrt()
    return float((unexplained.sum() - 2 * error) / between.sum())


def _regions(x: Tensor, scale: int) -> Tensor:
    """Sums over regions of the last one or two dimensions; what is left at the borders is a region too."""
    if x.dim() >= 4:
        planes = x.reshape(x.shape[0], -1, *x.shape[-2:])
        return F.avg_pool2d(planes, scale, ceil_mode=True, divisor_override=1)
    rows = x.reshape(x.shape[0], 1, 1, -1)
    return F.avg_pool2d(rows, (1, scale), ceil_mode=True, divisor_override=1)
