"""Blocks of a weight: ``(output channels, input channels)`` at one kernel tap, all zero or not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = (16, 16)  # what the kernels skip


def in_blocks(weight: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """``weight [O, I, *kernel]`` as ``[ceil(O / b0), b0, ceil(I / b1), b1, taps]``, padded with zeros to whole blocks.

    >>> in_blocks(torch.ones(20, 16, 3, 3)).shape
    torch.Size([2, 16, 1, 16, 9])
    """
    outputs, inputs = weight.shape[:2]
    flat = weight.detach().reshape(outputs, inputs, -1)
    missing = -outputs % block[0], -inputs % block[1]
    if any(missing):
        flat = F.pad(flat, (0, 0, 0, missing[1], 0, missing[0]))
    return flat.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))


def present_blocks(weight: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """Which blocks hold anything but zeros: bool ``[ceil(O / b0), ceil(I / b1), taps]``.

    >>> weight = torch.zeros(32, 16)
    >>> weight[20, 3] = 1.0
    >>> present_blocks(weight).flatten().tolist()
    [False, True]
    """
    return in_blocks(weight != 0, block).any(3).any(1)


def present_share(weight: Tensor) -> float:
    """Share of the kernels' blocks that hold anything but zeros, in 0..1, to two decimals: what times follow.

    A weight without elements, or on ``meta``, where there are no values, counts as full. Waits for the device.
    """
    if weight.is_meta or not weight.numel():
        return 1.0
    return round(float(present_blocks(weight).float().mean()), 2)


def block_norms(weight: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """L2 norm of every block: float64 ``[ceil(O / b0), ceil(I / b1), taps]``.

    >>> block_norms(torch.ones(16, 16)).item()
    16.0
    """
    return in_blocks(weight.double(), block).square().sum((1, 3)).sqrt()


def spread(blocks: Tensor, shape: torch.Size, block: tuple[int, int] = BLOCK) -> Tensor:
    """One value a block, as :func:`present_blocks` orders them, repeated for every element of a weight of ``shape``.

    >>> spread(torch.tensor([[[True]], [[False]]]), torch.Size([3, 1]), (2, 2)).flatten().tolist()
    [True, True, False]
    """
    wide = blocks.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[: shape[0], : shape[1]].reshape(shape)
