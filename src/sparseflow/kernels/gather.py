"""Pure-PyTorch fallback: ``embedding_bag`` over the indices of the events. Needs no compiler.

It covers linear layers and pointwise convolutions; measured against dense like every other kernel, and dense
wherever it loses.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseflow.plan import Path, Reason

from .base import DENSITY, Call, ConvCall, Layout, LinearCall, Refusal, conv_layout

_DTYPES = (torch.float32, torch.float64)
_SAMPLES = 32
_VARIANT = "embedding_bag"


class GatherScan(NamedTuple):
    """Events of a ``[rows, K]`` matrix in compressed-row form; a block is a row."""

    nonzero: int
    numel: int
    occupied: int
    words: int
    columns: Tensor
    offsets: Tensor
    values: Tensor


def bind(x: Tensor, weight: Tensor, call: Call) -> GatherLinear | GatherPointwise | Refusal:
    """A gather kernel for this signature, or why there is none."""
    if x.device.type != "cpu":
        return Refusal(Reason.DEVICE, f"the embedding_bag fallback runs on the CPU, the input is on {x.device}")
    if x.dtype not in _DTYPES:
        return Refusal(Reason.DTYPE, f"{x.dtype}; the embedding_bag fallback takes float32 and float64")
    if isinstance(call, LinearCall):
        return GatherLinear(x.dtype)
    pointwise = all(k == 1 for k in weight.shape[2:]) and call.groups == 1 and not any(map(any, call.padding))
    if not pointwise:
        return Refusal(Reason.NO_ENGINE, "the embedding_bag fallback covers linear and 1x1 convolution only")
    layout = conv_layout(tuple(x.shape), x.stride(), tuple(weight.shape), weight.stride(), x.dtype, call)
    return GatherPointwise(x.dtype, layout, call)


def _scan(rows: Tensor) -> GatherScan:
    """Compressed rows of ``rows`` ``[R, K]``."""
    index = rows.nonzero()
    per_row = torch.bincount(index[:, 0], minlength=rows.shape[0])
    offsets = per_row.cumsum(0) - per_row
    values = rows[index[:, 0], index[:, 1]]
    occupied = int((per_row > 0).sum())
    return GatherScan(index.shape[0], rows.numel(), occupied, rows.shape[0], index[:, 1], offsets, values)


def _bag(scan: GatherScan, packed: Tensor, bias: Tensor | None) -> Tensor:
    """``[R, M]`` sums of the rows of ``packed`` ``[K, M]`` that the events name."""
    if not scan.nonzero:
        y = packed.new_zeros(scan.words, packed.shape[1])
    else:
        y = F.embedding_bag(scan.columns, packed, scan.offsets, mode="sum", per_sample_weights=scan.values)
    return y if bias is None else y + bias.to(y.dtype)


class GatherLinear:
    """Linear layer as a sum of embedding rows, one row an active input."""

    path = Path.GATHER
    axis = DENSITY
    deferred = False
    weight_share = 1.0

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def variants(self) -> tuple[str, ...]:
        return (_VARIANT,)

    def pack(self, weight: Tensor, variant: str, *, inspect: bool = True) -> Tensor:  # noqa: ARG002
        return weight.detach().flatten(1).t().contiguous()

    def matches(self, weight: Tensor, packed: Tensor, variant: str, offset: int) -> bool:  # noqa: ARG002
        if not weight.numel():
            return True
        flat = weight.detach().flatten(1).t()
        step = max(1, flat.shape[0] // _SAMPLES)
        rows = slice(offset % step, None, step)
        column = offset % max(1, flat.shape[1])
        return torch.equal(flat[rows, column], packed[rows, column])

    def prescan(self, x: Tensor, variant: str) -> GatherScan:  # noqa: ARG002
        return _scan(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))

    def compute(self, x: Tensor, scan: GatherScan, packed: Tensor, bias: Tensor | None, variant: str) -> Tensor:  # noqa: ARG002
        return _bag(scan, packed, bias).view(*x.shape[:-1], packed.shape[1])


class GatherPointwise(GatherLinear):
    """A 1x1 convolution is a linear layer over its pixels."""

    def __init__(self, dtype: torch.dtype, layout: Layout, call: ConvCall):
        super().__init__(dtype)
        self.layout, self.call = layout, call

    def prescan(self, x: Tensor, variant: str) -> GatherScan:  # noqa: ARG002
        strided = x[(..., *(slice(None, None, s) for s in self.call.stride))]
        return _scan(strided.movedim(1, -1).reshape(-1, x.shape[1]))

    def compute(self, x: Tensor, scan: GatherScan, packed: Tensor, bias: Tensor | None, variant: str) -> Tensor:  # noqa: ARG002
        batch, channels, *size = self.layout.out_shape
        y = _bag(scan, packed, bias).view(batch, *size, channels).movedim(-1, 1)
        return y if self.layout.channels_last else y.contiguous()
