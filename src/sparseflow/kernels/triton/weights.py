"""Weights in the layout the tile kernels read, in parts that add up to float32 where the layer is float32."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 16  # output channels, so that every row of a weight starts on 32 bytes
_TOP_EXPONENT = 15  # float16 holds magnitudes below 2 ** 16
_LEAST_EXPONENT = -111  # 2 ** (15 + 111) and its inverse are the largest such pair of normal float32 numbers
_BFLOAT16_MAX = torch.finfo(torch.bfloat16).max
_ULP = 2.0**-23  # of float32, relative


class Packed(NamedTuple):
    """A packed weight.

    Attributes:
        parts: ``[parts, groups, taps, channels of a group, padded outputs of a group]``; their sum, times ``scale``, is
            the weight. One part of the layer's own dtype, or two of float16, or three of bfloat16.
        scale: float32 ``[groups, padded outputs of a group]``, powers of two; ``None`` where it would be 1.
    """

    parts: Tensor
    scale: Tensor | None


def padded_outputs(outputs: int) -> int:
    """Output channels of a group in a packed weight.

    >>> padded_outputs(10)
    16
    """
    return -(-outputs // _ALIGNMENT) * _ALIGNMENT


def pack_rows(weight: Tensor, groups: int) -> Tensor:
    """``weight`` ``[O, C / groups, *kernel]`` as ``[groups, taps, C / groups, padded O / groups]``.

    What one event adds to the outputs of its group is then one row, which starts on a multiple of 32 bytes.
    """
    outputs, channels, taps = weight.shape[0] // groups, weight.shape[1], math.prod(weight.shape[2:])
    packed = weight.new_zeros(groups, taps, channels, padded_outputs(outputs))
    packed[..., :outputs] = weight.reshape(groups, outputs, channels, taps).permute(0, 3, 2, 1)
    return packed


def pack(weight: Tensor, groups: int, *, tf32: bool, inspect: bool) -> Packed:
    """Pack ``weight [O, C / groups, *kernel]``.

    Spikes are exact in every dtype, so the product of a spike and a float32 weight is the sum of its products with the
    parts of that weight. Two float16 parts, after scaling every output channel to the top of the float16 range, hold
    all but the last bit of a float32; three bfloat16 parts hold all of it that is above 2 ** -133.

    Args:
        weight: float16, bfloat16 or float32.
        groups: groups of the convolution.
        tf32: the user lets PyTorch's own float32 layers round to TF32: one float16 part then rounds no worse.
        inspect: look at the values, which waits for the device, and take two parts where they suffice. Otherwise three.
    """
    rows = pack_rows(weight.detach(), groups)
    if weight.dtype != torch.float32:
        return Packed(rows[None], None)
    scaled, scale = _scaled(rows)
    high = scaled.half()
    if tf32:
        return Packed(high[None], scale)
    low = (scaled - high.float()).half()
    if inspect and bool(_within_range(rows, scaled, high.float() + low.float(), scale)):
        return Packed(torch.stack((high, low)), scale)
    return Packed(_bfloat16_parts(rows), None)


def _scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows with every output channel's largest magnitude just below 2 ** 15, and what undoes it."""
    exponent = torch.frexp(rows.abs().amax((1, 2), keepdim=True)).exponent.clamp_min(_LEAST_EXPONENT)
    scaled = torch.ldexp(rows, _TOP_EXPONENT - exponent)
    return scaled, torch.ldexp(torch.ones_like(rows[:, 0, 0]), exponent[:, 0, 0] - _TOP_EXPONENT)


def _within_range(rows: Tensor, scaled: Tensor, parts: Tensor, scale: Tensor) -> Tensor:
    """Whether the parts are as good as float32 for every input channel, so also where no other channel is active.

    Small weights lose bits below the float16 range. That shows in a channel all of whose weights are small beside the
    largest of their output channels, and in outputs one weight of which is large beside all others of the layer.
    """
    lost = (rows - parts * scale[:, None, None]).abs()
    enough = lost.amax((1, 3)) <= _ULP * rows.abs().amax((1, 3))
    enough &= (lost / scale[:, None, None]).amax((1, 3)) <= _ULP * scaled.abs().amax((1, 3))
    return enough.all()


def _bfloat16_parts(rows: Tensor) -> Tensor:
    parts, rest = [], rows
    for _ in range(3):
        # The largest float32 would round to infinity.
        within = torch.where(rest.isinf(), rest, rest.clamp(-_BFLOAT16_MAX, _BFLOAT16_MAX))
        parts.append(within.bfloat16())
        rest = rest - parts[-1].float()
    return torch.stack(parts)
