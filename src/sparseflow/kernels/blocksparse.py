"""Which blocks of a pruned weight are there: 16 output by 16 input channels of one kernel tap, say."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

BLOCK = (16, 16)


def present_blocks(weight: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """Blocks of ``weight [O, C, *kernel]`` in which some element is not zero; ``NaN`` is not zero.

    Args:
        weight: of a convolution with one group, or ``[O, C]`` of a linear layer.
        block: output and input channels of a block; the last ones may be smaller.

    Returns:
        bool ``[ceil(O / block[0]), taps, ceil(C / block[1])]`` on the device of the weight.

    >>> import torch
    >>> present_blocks(torch.eye(32)).squeeze(1)
    tensor([[ True, False],
            [False,  True]])
    """
    rows, columns = block
    taps = weight.detach().reshape(*weight.shape[:2], math.prod(weight.shape[2:])) != 0
    padded = F.pad(taps, (0, 0, 0, -taps.shape[1] % columns, 0, -taps.shape[0] % rows))
    return padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).any(3).any(1).transpose(1, 2)


def present_share(weight: Tensor, block: tuple[int, int] = BLOCK) -> float:
    """Share of the blocks of ``weight [O, C, *kernel]`` that are present, in 0..1; waits for the device.

    A weight without elements, or on ``meta``, where there are no values, counts as full.

    >>> import torch
    >>> present_share(torch.eye(32))
    0.5
    """
    if weight.is_meta or not weight.numel():
        return 1.0
    return float(present_blocks(weight, block).float().mean())
