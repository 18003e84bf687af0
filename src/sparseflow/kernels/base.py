"""What a sparse kernel has to offer, and the description of the call it is bound to."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseflow.plan import Path, Reason

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


DENSITY, OCCUPANCY = "density", "occupancy"


class Counts(NamedTuple):
    """What a prescan counted: nonzero elements, and blocks (of the kernel's own kind) with at least one of them."""

    nonzero: int
    numel: int
    occupied: int
    words: int

    def load(self, axis: str) -> float:
        """The share, in 0..1, that the time of a kernel with this ``axis`` follows; 0 for an empty input.

        >>> counts = Counts(nonzero=3, numel=12, occupied=2, words=4)
        >>> counts.load("density"), counts.load("occupancy")
        (0.25, 0.5)
        """
        part, whole = (self.nonzero, self.numel) if axis == DENSITY else (self.occupied, self.words)
        return part / whole if whole else 0.0


class Scan(Protocol):
    """What a prescan returns; a kernel adds the buffers its second stage reads."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        ...

    @property
    def words(self) -> int:
        """Number of blocks."""
        ...


@runtime_checkable
class HostScan(Scan, Protocol):
    """A prescan whose counts are on the host when it returns."""

    @property
    def nonzero(self) -> int:
        """Number of nonzero elements."""
        ...

    @property
    def occupied(self) -> int:
        """Blocks with at least one nonzero element."""
        ...


class DeferredScan(Scan, Protocol):
    """A prescan whose counts are on the device, where they may not be final yet."""

    def totals(self) -> Tensor:
        """``(nonzero, occupied)``: int64 ``[2]`` on the device of the input."""
        ...


def counts(scan: Any) -> Counts:
    """The counts of a :class:`HostScan`, or of a :class:`DeferredScan` after waiting for the device.

    Diagnostics and first-use measurement may wait; a forward call must not.
    """
    nonzero, occupied = (scan.nonzero, scan.occupied) if isinstance(scan, HostScan) else scan.totals().tolist()
    return Counts(nonzero, scan.numel, occupied, scan.words)


class Kernel(Protocol):
    """A two-stage implementation bound to one call signature (shapes, strides, dtype).

    ``axis`` is what its time follows, and crossovers are stated in: ``"density"`` (nonzero / numel) or ``"occupancy"``
    (occupied / words). ``deferred`` is true where the counts of a prescan stay on the device and nobody waits for them.
    ``weight_share`` is the share of the weight's blocks that are not zero, to two decimals, where the kernel skips the
    others, so that its times belong to it; else 1.
    """

    path: Path
    dtype: torch.dtype
    axis: str
    deferred: bool
    weight_share: float

    def variants(self) -> tuple[str, ...]:
        """Names of the configurations worth measuring, best guess first."""
        ...

    def pack(self, weight: Tensor, variant: str, *, inspect: bool = True) -> Any:
        """The weight (of the kernel's dtype) in the layout ``variant`` reads: a tensor or a named tuple of tensors.

        Depends on the kernel's class, ``variant`` and the weight alone. With ``inspect=False`` values are not looked
        at, which would wait for the device; the layout may then be a slower one.
        """
        ...

    def prescan(self, x: Tensor, variant: str) -> Any:
        """Stage 1: find the nonzero blocks of ``x``; a :class:`HostScan`, or a :class:`DeferredScan` if deferred."""
        ...

    def compute(self, x: Tensor, scan: Any, packed: Any, bias: Tensor | None, variant: str) -> Tensor:
        """Stage 2: compute on what the prescan found."""
        ...


class HostKernel(Kernel, Protocol):
    """A kernel that is not deferred: it runs where its caller does, and may look at values."""

    def matches(self, weight: Tensor, packed: Any, variant: str, offset: int) -> bool:
        """Compare a sample of ``weight`` (of the kernel's dtype) with ``packed``; ``offset`` moves the positions."""
        ...


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why no sparse kernel covers a call."""

    reason: Reason
    detail: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """Output shape and strides of a convolution, and whether that is channels-last."""

    out_shape: tuple[int, ...]
    out_stride: tuple[int, ...]
    channels_last: bool

    def empty(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """An uninitialised output."""
        return torch.empty_strided(self.out_shape, self.out_stride, dtype=dtype, device=device)


@functools.lru_cache(maxsize=1024)
def conv_layout(
    x_shape: tuple[int, ...],
    x_stride: tuple[int, ...],
    w_shape: tuple[int, ...],
    w_stride: tuple[int, ...],
    dtype: torch.dtype,
    call: ConvCall,
    device_type: str = "cpu",
) -> Layout:
    """Ask PyTorch itself, on fake tensors, what its dense convolution returns: the sparse one looks the same.

    ``device_type`` may be one this machine does not have.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.no_grad(), FakeTensorMode():
        x = torch.empty_strided(x_shape, x_stride, dtype=dtype, device=device_type)
        weight = torch.empty_strided(w_shape, w_stride, dtype=dtype, device=device_type)
        y = call.dense(x, weight, None)
    return Layout(tuple(y.shape), y.stride(), not y.is_contiguous())
