"""The geometry of a convolution call, the same for every backend."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

Padding = int | tuple[int, int]
Three = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class ConvGeometry:
    """Sizes of one convolution call, always with three spatial dimensions (1-d and 2-d have leading ones).

    ``padding`` is the padding before each dimension; what follows the data is implied by ``out_size``.
    """

    batch: int
    in_channels: int
    out_channels: int
    groups: int
    in_size: Three
    kernel: Three
    stride: Three
    padding: Three
    dilation: Three
    out_size: Three

    def __post_init__(self) -> None:
        # Native parameter structures by use. Not a field: neither compared nor copied, since they hold pointers.
        object.__setattr__(self, "_structs", {})

    def __reduce__(self) -> tuple[Any, ...]:
        return ConvGeometry, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @classmethod
    def from_call(
        cls,
        x_shape: Sequence[int],
        weight_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[Padding],
        dilation: Sequence[int],
        groups: int,
    ) -> ConvGeometry:
        """Geometry of ``conv(x [N, C, *size], weight [O, C / groups, *kernel])`` in 1, 2 or 3 dimensions.

        ``padding`` holds, per dimension, a number or a ``(before, after)`` pair. The same call gets the same object.
        Raises ``ValueError`` where PyTorch would raise too.

        >>> ConvGeometry.from_call((4, 64, 56, 56), (64, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1).out_size
        (1, 56, 56)
        """
        key = (tuple(x_shape), tuple(weight_shape), tuple(stride), tuple(padding), tuple(dilation), groups)
        return _geometry(*key)

    @property
    def depthwise(self) -> bool:
        """One filter per channel."""
        return self.groups > 1 and self.groups == self.in_channels == self.out_channels

    @property
    def group_channels(self) -> int:
        """Input channels of one group."""
        return self.in_channels // self.groups

    @property
    def in_pixels(self) -> int:
        """Input pixels of one image."""
        return math.prod(self.in_size)

    @property
    def out_pixels(self) -> int:
        """Output pixels of one image."""
        return math.prod(self.out_size)

    @property
    def taps(self) -> int:
        """Kernel positions."""
        return math.prod(self.kernel)


@functools.lru_cache(maxsize=4096)
def _geometry(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[Padding, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> ConvGeometry:
    dims = len(x_shape) - 2
    if not 1 <= dims <= 3 or len(weight_shape) != dims + 2:
        raise ValueError(f"expected [N, C, *size] with 1 to 3 dimensions, got {x_shape} and weight {weight_shape}")
    if x_shape[1] != weight_shape[1] * groups or weight_shape[0] % groups:
        raise ValueError(f"{x_shape[1]} channels do not fit weight {weight_shape} with groups={groups}")
    before = [p if isinstance(p, int) else p[0] for p in padding]
    after = [p if isinstance(p, int) else p[1] for p in padding]
    sizes = zip(x_shape[2:], weight_shape[2:], stride, before, after, dilation, strict=True)
    out_size = [(size + b + a - d * (k - 1) - 1) // s + 1 for size, k, s, b, a, d in sizes]
    if min(out_size) < 1:
        raise ValueError(f"kernel {weight_shape[2:]} does not fit input {x_shape[2:]}")

    def three(values: Sequence[int], fill: int) -> Three:
        padded = (*[fill] * (3 - dims), *values)
        return padded[0], padded[1], padded[2]

    return ConvGeometry(
        batch=x_shape[0],
        in_channels=x_shape[1],
        out_channels=weight_shape[0],
        groups=groups,
        in_size=three(x_shape[2:], 1),
        kernel=three(weight_shape[2:], 1),
        stride=three(stride, 1),
        padding=three(before, 0),
        dilation=three(dilation, 1),
        out_size=three(out_size, 1),
    )
