"""Pruned layers: tiles that skip the blocks of the weight that are zero, and those in which nothing fires."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseflow.kernels.base import OCCUPANCY, Kernel
from sparseflow.kernels.geometry import ConvGeometry
from sparseflow.kernels.weight_blocks import present_blocks
from sparseflow.plan import Path

from .prescan import TileScan, prescan_tiles
from .pruned_gemm import GROUP, PackedBlocks, pack_blocks, pruned_gemm
from .rows import as_bias
from .tiles import Tiling
from .weights import padded_outputs

if TYPE_CHECKING:
    from .backend import TileConv

WIDTHS = (128, 64, 32, 16)
_MOST = 4  # variants that are offered


@dataclasses.dataclass(frozen=True)
class PrunedVariant:
    """One configuration of the kernel for pruned weights.

    ``side``: 16, 8 or 4, for tiles of 256, 64 or 16 outputs. ``width``: output channels of a block, which is left out
    where it is zero for 16 input channels of a tap. ``pairs``: of (tap, 16 input channels) in one step.
    """

    side: int
    width: int
    pairs: int
    warps: int
    stages: int
    tf32: bool = False

    @property
    def name(self) -> str:
        """Stable text form; :meth:`from_name` reads it back.

        >>> PrunedVariant(8, 32, 4, 4, 3).name
        'pruned8-n32-p4-w4-s3'
        """
        blocks = f"n{self.width}-p{self.pairs}-w{self.warps}-s{self.stages}"
        return f"pruned{self.side}-{blocks}{'-tf32' if self.tf32 else ''}"

    @classmethod
    @functools.cache
    def from_name(cls, name: str) -> PrunedVariant:
        """The variant called ``name``. Raises ``ValueError`` if it is no variant's name."""
        match = re.fullmatch(r"pruned(\d+)-n(\d+)-p(\d+)-w(\d+)-s(\d+)(-tf32)?", name)
        if match is None:
            raise ValueError(f"not a variant of the kernel for pruned weights: {name!r}")
        *numbers, tf32 = match.groups()
        side, width, pairs, warps, stages = map(int, numbers)
        return cls(side, width, pairs, warps, stages, tf32 is not None)


def pruned_variants(geometry: ConvGeometry, *, tf32: bool, parts: int) -> tuple[PrunedVariant, ...]:
    """Every configuration that can be offered, for any pattern of absent blocks.

    Groups of 16 channels are seldom silent, be the tile small or large, so that tiles are as large as the feature map
    allows: each of them reads the whole of the weight that is present. Wide blocks of outputs use the matrix units
    better, and are more rarely zero.
    """
    outputs = padded_outputs(geometry.out_channels)
    widest = 128 if parts == 1 else 64
    widths = [width for width in WIDTHS if width <= widest and (width <= outputs or width == GROUP)]
    found = (_configuration(side, width, tf32, parts) for side in _sides(geometry) for width in widths)
    return tuple(dict.fromkeys(found))


def _sides(geometry: ConvGeometry) -> tuple[int, ...]:
    """Tile sides for the size of the feature map."""
    pixels = math.prod(geometry.out_size)
    if pixels > 8 * 8:
        return (16, 8)
    return (8, 4) if pixels > 4 * 4 else (4, 8)


def _configuration(side: int, width: int, tf32: bool, parts: int) -> PrunedVariant:
    if side == 16:  # 256 rows: more accumulators would leave no registers
        return PrunedVariant(16, min(width, 64 if parts == 1 else 32), 2, 8, 3, tf32)
    return PrunedVariant(side, width, 4 if parts == 1 else 2, 4, 3, tf32)


class PrunedKernel:
    """A convolution with one group, or a linear layer, whose weight has blocks that are all zero.

    Bound to the signature of ``full``, the kernel that takes every block. ``shares`` says of every width of a block of
    outputs how much of the weight is present; results do not depend on it.
    """

    path = Path.PRUNED
    axis = OCCUPANCY
    deferred = True

    def __init__(self, full: TileConv, shares: dict[int, float]):
        self.full, self.shares = full, shares
        self.weight_share = round(shares[GROUP], 2)
        self.geometry, self.dtype = full.geometry, full.dtype

    @functools.cached_property
    def _variants(self) -> tuple[str, ...]:
        from .cost import predict  # which knows all kernels, this one too

        floors = {v.name: predict(self, v.name, 1.0).ms for v in self.every_variant()}
        return tuple(sorted(floors, key=floors.__getitem__)[:_MOST])

    def every_variant(self) -> tuple[PrunedVariant, ...]:
        """See :func:`pruned_variants`."""
        parts = 1 if self.full.tf32 or self.dtype != torch.float32 else 2
        return pruned_variants(self.geometry, tf32=self.full.tf32, parts=parts)

    def variants(self) -> tuple[str, ...]:
        return self._variants

    def pack(self, weight: Tensor, variant: str, *, inspect: bool = True) -> PackedBlocks:
        v = PrunedVariant.from_name(variant)
        return pack_blocks(weight, v.width, tf32=v.tf32, inspect=inspect)

    def prescan(self, x: Tensor, variant: str) -> TileScan:
        tiling = Tiling.of_side(self.geometry, PrunedVariant.from_name(variant).side)
        return prescan_tiles(self.full.image(x), tiling, GROUP, gather=False, finite=True)

    def compute(self, x: Tensor, scan: TileScan, packed: PackedBlocks, bias: Tensor | None, variant: str) -> Tensor:
        v, out = PrunedVariant.from_name(variant), self.full.layout.empty(self.dtype, x.device)
        tiling = Tiling.of_side(self.geometry, v.side)
        steps = {"pairs": v.pairs, "warps": v.warps, "stages": v.stages}
        pruned_gemm(self.full.image(x), scan, packed, as_bias(bias, self.dtype), out, tiling, **steps)
        return self.full.result(out, x)


def offered(full: Kernel, weight: Tensor) -> tuple[PrunedKernel, ...]:
    """The kernel for ``weight`` where it has absent blocks and their number promises a gain; waits for the device.

    The promise is that of the cost model, on an input without silent channels: less than a dense layer takes, and less
    than ``full`` does.
    """
    from .backend import TileConv

    if weight.is_meta or not isinstance(full, TileConv) or full.geometry.groups != 1:
        return ()
    present = present_blocks(weight).transpose(1, 2).cpu()
    if bool(present.all()):
        return ()
    from .cost import dense, predict

    kernel = PrunedKernel(full, shares_of(present))
    rivals = [predict(full, variant, 1.0).ms for variant in full.variants()]
    limit = min(dense(full.geometry, full.dtype).ms, *rivals)
    return (kernel,) if predict(kernel, kernel.variants()[0], 1.0).ms < limit else ()


def shares_of(present: Tensor) -> dict[int, float]:
    """Share of the blocks that are present for every width, from those of 16 outputs: bool ``[blocks, ...]``.

    >>> shares_of(torch.eye(8) > 0)
    {128: 1.0, 64: 0.5, 32: 0.25, 16: 0.125}
    """
    shares = {}
    for width in WIDTHS:
        merged = [some.any(0) for some in present.split(width // GROUP)]
        shares[width] = float(torch.stack(merged).float().mean())
    return shares
