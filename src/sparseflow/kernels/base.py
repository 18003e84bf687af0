"""What a sparse kernel has to offer, and the description of the call it is bound to."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseflow.plan import Path

_DENSE_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclasses.dataclass(frozen=True)
class ConvCall:
    """The arguments of a convolution besides its tensors, one entry a spatial dimension.

    ``padding`` holds ``(before, after)`` pairs, so that ``'same'`` with an even kernel is covered.
    """

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def symmetric(self) -> bool:
        """Whether every dimension is padded alike on both sides."""
        return all(before == after for before, after in self.padding)

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The dense convolution of this call."""
        conv = _DENSE_CONV[len(self.stride)]
        if self.symmetric:
            before = tuple(p for p, _ in self.padding)
            return conv(x, weight, bias, self.stride, before, self.dilation, self.groups)
        padded = F.pad(x, [p for pair in reversed(self.padding) for p in pair])
        return conv(padded, weight, bias, self.stride, 0, self.dilation, self.groups)


@dataclasses.dataclass(frozen=True)
class LinearCall:
    """The call of a linear layer: it has no arguments besides its tensors."""

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The dense linear layer."""
        return F.linear(x, weight, bias)


Call = ConvCall | LinearCall


class Scan(Protocol):
    """What a prescan returns; a kernel adds the buffers its second stage reads."""

    @property
    def nonzero(self) -> int:
        """Number of nonzero elements."""
        ...

    @property
    def numel(self) -> int:
        """Number of elements."""
        ...

    @property
    def occupied(self) -> int:
        """Blocks with at least one nonzero element."""
        ...

    @property
    def words(self) -> int:
        """Number of blocks."""
        ...


class Kernel(Protocol):
    """A two-stage implementation bound to one call signature (shapes, strides, dtype)."""

    path: Path
    dtype: torch.dtype

    def variants(self) -> tuple[str, ...]:
        """Names of the configurations worth measuring, best guess first."""
        ...

    def pack(self, weight: Tensor, variant: str) -> Tensor:
        """The weight (of the kernel's dtype) in the layout ``variant`` reads; at most the dense bytes plus padding."""
        ...

    def matches(self, weight: Tensor, packed: Tensor, variant: str, offset: int) -> bool:
        """Compare a sample of ``weight`` (of the kernel's dtype) with ``packed``; ``offset`` moves the positions."""
        ...

    def prescan(self, x: Tensor) -> Any:
        """Stage 1: find the nonzero blocks of ``x``; returns a :class:`Scan`."""
        ...

    def compute(self, x: Tensor, scan: Any, packed: Tensor, bias: Tensor | None, variant: str) -> Tensor:
        """Stage 2: compute on what the prescan found."""
        ...


@dataclasses.dataclass(frozen=True)
class Layout:
    """Output shape and strides of a convolution, and whether that is channels-last."""

    out_shape: tuple[int, ...]
    out_stride: tuple[int, ...]
    channels_last: bool

    def empty(self, dtype: torch.dtype) -> Tensor:
        """An uninitialised output."""
        return torch.empty_strided(self.out_shape, self.out_stride, dtype=dtype)


@functools.lru_cache(maxsize=1024)
def conv_layout(
    x_shape: tuple[int, ...],
    x_stride: tuple[int, ...],
    w_shape: tuple[int, ...],
    w_stride: tuple[int, ...],
    dtype: torch.dtype,
    call: ConvCall,
) -> Layout:
    """Ask PyTorch itself, on fake tensors, what its dense convolution returns: the sparse one looks the same."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.no_grad(), FakeTensorMode():
        x = torch.empty_strided(x_shape, x_stride, dtype=dtype)
        weight = torch.empty_strided(w_shape, w_stride, dtype=dtype)
        y = call.dense(x, weight, None)
    return Layout(tuple(y.shape), y.stride(), not y.is_contiguous())
