"""Depthwise convolution that skips the tiles of a block of channels whose halo holds no spike.

There is no sum over channels, so nothing for tensor cores: a layer costs what reading its input and writing its output
costs, and a silent tile saves the reading, its multiplications and the weights, down to the bias.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseflow.kernels.base import OCCUPANCY, Layout
from sparseflow.kernels.geometry import ConvGeometry
from sparseflow.plan import Path

from .launch import launch
from .prescan import halo_pixel, is_inside, is_owned, is_wide, pixel_offset, sizes, strides, tile_origin
from .rows import as_bias, offset
from .tiles import Tiling, by_axis
from .weights import padded_outputs

_ELEMENTS = 4096  # of one block of the scan: 32 a thread with 4 warps
_ELEMENTS_A_WARP = 256  # 8 a thread, of which all taps of a row are read at once
_SMALL_MAP = 8 * 8


@triton.jit
def _scan_tiles(
    x_ptr,
    counts_ptr,
    x_n,
    x_c,
    x_d,
    x_h,
    x_w,
    IN_D,
    IN_H,
    IN_W,
    PAD_D,
    PAD_H,
    PAD_W,
    TILES_D,
    TILES_H,
    TILES_W,
    channels,
    words,
    TILE_D: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    HALO_D: tl.constexpr,
    HALO_H: tl.constexpr,
    HALO_W: tl.constexpr,
    STEP_D: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    PITCH_D: tl.constexpr,
    PITCH_H: tl.constexpr,
    PITCH_W: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile = tl.program_id(0)
    block, n, tz, ty, tx = tile_origin(tile, TILES_D, TILES_H, TILES_W, BLOCKS)
    # Neighbouring threads read what is adjacent in memory: channels, or pixels.
    if CHANNELS_LAST:
        row = tl.arange(0, ROWS)[:, None]
        channel = tl.arange(0, BLOCK)[None, :]
    else:
        row = tl.arange(0, ROWS)[None, :]
        channel = tl.arange(0, BLOCK)[:, None]
    corner = x_ptr + n.to(tl.int64) * x_n + (block * BLOCK).to(tl.int64) * x_c
    known = channel < channels - block * BLOCK
    cz = tz * (TILE_D * STRIDE_D) - PAD_D
    cy = ty * (TILE_H * STRIDE_H) - PAD_H
    cx = tx * (TILE_W * STRIDE_W) - PAD_W

    nonzero = 0
    active = 0
    for start in range(0, HALO_D * HALO_H * HALO_W, ROWS):
        hz, hy, hx, z, y, x = halo_pixel(start + row, cz, cy, cx, STEP_D, STEP_H, STEP_W, HALO_H, HALO_W)
        inside = is_inside(z, y, x, IN_D, IN_H, IN_W) & (hz < HALO_D)
        owned = is_owned(
            hz, hy, hx, tz, ty, tx, TILES_D, TILES_H, TILES_W,
            TILE_D * PITCH_D, TILE_H * PITCH_H, TILE_W * PITCH_W,
        )  # fmt: skip
        where = pixel_offset(z, y, x, x_d, x_h, x_w, WIDE) + offset(channel, WIDE) * x_c
        value = tl.load(corner + where, mask=inside & known, other=0.0)
        hit = (value.to(tl.float32) != 0).to(tl.int32)  # true for NaN
        nonzero = tl.sum(tl.sum(hit * owned.to(tl.int32), axis=1), axis=0) + nonzero
        active = tl.maximum(active, tl.max(tl.max(hit, axis=1), axis=0))
    tl.store(counts_ptr + tile, nonzero)
    tl.store(counts_ptr + words + tile, active)


@triton.jit
def _depthwise(
    x_ptr,
    active_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    x_n,
    x_c,
    x_d,
    x_h,
    x_w,
    y_n,
    y_c,
    y_d,
    y_h,
    y_w,
    IN_D,
    IN_H,
    IN_W,
    PAD_D,
    PAD_H,
    PAD_W,
    TILES_D,
    TILES_H,
    TILES_W,
    OUT_D,
    OUT_H,
    OUT_W,
    channels,
    padded,
    TILE_D: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    DILATION_D: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    ROWS: tl.constexpr = TILE_D * TILE_H * TILE_W
    program = tl.program_id(0)
    tile = program // MULTIPLIER
    multiple = program - tile * MULTIPLIER
    block, n, tz, ty, tx = tile_origin(tile, TILES_D, TILES_H, TILES_W, BLOCKS)
    if CHANNELS_LAST:
        row = tl.arange(0, ROWS)[:, None]
        channel = tl.arange(0, BLOCK)[None, :]
        acc = tl.zeros((ROWS, BLOCK), tl.float32)
    else:
        row = tl.arange(0, ROWS)[None, :]
        channel = tl.arange(0, BLOCK)[:, None]
        acc = tl.zeros((BLOCK, ROWS), tl.float32)
    oz = tz * TILE_D + row // (TILE_H * TILE_W)
    oy = ty * TILE_H + row // TILE_W % TILE_H
    ox = tx * TILE_W + row % TILE_W
    known = channel < channels - block * BLOCK
    corner = x_ptr + n.to(tl.int64) * x_n + (block * BLOCK).to(tl.int64) * x_c
    weight = weight_ptr + multiple * (KERNEL_D * KERNEL_H * KERNEL_W) * padded + block * BLOCK + channel

    # No branch: a silent tile has no steps.
    for step in range(tl.load(active_ptr + tile) * (KERNEL_D * KERNEL_H)):
        tap_z = step // KERNEL_H
        tap_y = step - tap_z * KERNEL_H
        z = oz * STRIDE_D - PAD_D + tap_z * DILATION_D
        y = oy * STRIDE_H - PAD_H + tap_y * DILATION_H
        for tap_x in tl.static_range(KERNEL_W):  # pyright: ignore[reportGeneralTypeIssues]
            x = ox * STRIDE_W - PAD_W + tap_x * DILATION_W
            inside = is_inside(z, y, x, IN_D, IN_H, IN_W)
            where = pixel_offset(z, y, x, x_d, x_h, x_w, WIDE) + offset(channel, WIDE) * x_c
            value = tl.load(corner + where, mask=inside & known, other=0.0)
            factor = tl.load(weight + (step * KERNEL_W + tap_x) * padded, mask=known, other=0.0)
            acc += value.to(tl.float32) * factor.to(tl.float32)

    first = block * BLOCK * MULTIPLIER + multiple
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + first + channel * MULTIPLIER, mask=known, other=0.0).to(tl.float32)
    written = (oz < OUT_D) & (oy < OUT_H) & (ox < OUT_W) & known
    corner = y_ptr + n.to(tl.int64) * y_n + first.to(tl.int64) * y_c
    where = pixel_offset(oz, oy, ox, y_d, y_h, y_w, WIDE) + offset(channel * MULTIPLIER, WIDE) * y_c
    tl.store(corner + where, acc.to(y_ptr.dtype.element_ty), mask=written)


@dataclasses.dataclass(frozen=True)
class BlockScan:
    """Occupancy of the tiles of every block of channels, on the device of the input; nothing here waits for it.

    Attributes:
        numel: elements of the input that some tile reads.
        words: (tile, block of channels) pairs.
        counts: int32 ``[2, words]``: nonzero elements, each counted once, and whether the tile with its halo has one.
    """

    numel: int
    words: int
    counts: Tensor

    def totals(self) -> Tensor:
        """int64 ``[2]``: nonzero elements, and pairs with at least one in the halo."""
        return self.counts.sum(1, dtype=torch.int64)


@dataclasses.dataclass(frozen=True)
class BlockVariant:
    """Tiles of 256, 64 or 16 outputs (``side`` 16, 8 or 4) and the channels that are skipped together.

    >>> BlockVariant.from_name("tile8-c32")
    BlockVariant(side=8, channels=32)
    """

    side: int
    channels: int

    @property
    def name(self) -> str:
        """Short name, which :meth:`from_name` reads back."""
        return f"tile{self.side}-c{self.channels}"

    @classmethod
    @functools.cache
    def from_name(cls, name: str) -> BlockVariant:
        """The variant called ``name``. Raises ``ValueError`` if it is no variant's name."""
        found = re.fullmatch(r"tile(\d+)-c(\d+)", name)
        if found is None:
            raise ValueError(f"not a variant of the depthwise kernel: {name!r}")
        return cls(*map(int, found.groups()))


def block_variants(geometry: ConvGeometry, *, channels_last: bool) -> tuple[BlockVariant, ...]:
    """The configurations worth measuring, best guess first.

    What lies side by side in memory is read together: many channels of few pixels where these come last, else few
    channels of many pixels.
    """
    whole = triton.next_power_of_2(geometry.in_channels)
    if geometry.out_pixels < _SMALL_MAP:
        found = ((4, 64), (4, 32), (8, 32))
    elif channels_last:
        found = ((8, 32), (8, 64), (4, 64))
    else:
        found = ((8, 32), (16, 16), (8, 16))
    return tuple(dict.fromkeys(BlockVariant(side, min(channels, whole)) for side, channels in found))


class DepthwiseConv:
    """Convolution with as many groups as input channels, and one or more outputs for each."""

    path = Path.TILE
    axis = OCCUPANCY
    deferred = True
    weight_share = 1.0

    def __init__(self, geometry: ConvGeometry, layout: Layout, dtype: torch.dtype):
        if geometry.groups != geometry.in_channels:
            raise ValueError(f"{geometry.groups} groups of {geometry.in_channels} channels are not depthwise")
        self.geometry, self.layout, self.dtype = geometry, layout, dtype

    @functools.cached_property
    def _variants(self) -> tuple[str, ...]:
        return tuple(variant.name for variant in block_variants(self.geometry, channels_last=self.layout.channels_last))

    def variants(self) -> tuple[str, ...]:
        return self._variants

    def pack(self, weight: Tensor, variant: str, *, inspect: bool = True) -> Tensor:  # noqa: ARG002
        return _pack_taps(weight.detach().to(self.dtype), self.geometry)

    def prescan(self, x: Tensor, variant: str) -> BlockScan:
        return _scan(x, self.geometry, BlockVariant.from_name(variant))

    def compute(self, x: Tensor, scan: BlockScan, packed: Tensor, bias: Tensor | None, variant: str) -> Tensor:
        y = self.layout.empty(self.dtype, x.device)
        _convolve(x, scan, packed, as_bias(bias, self.dtype), y, self.geometry, BlockVariant.from_name(variant))
        return y


def _pack_taps(weight: Tensor, g: ConvGeometry) -> Tensor:
    """``[multiplier, taps, padded channels]``: what neighbouring channels multiply with lies side by side."""
    multiplier = g.out_channels // g.in_channels
    packed = weight.new_zeros(multiplier, g.taps, padded_outputs(g.in_channels))
    packed[..., : g.in_channels] = weight.reshape(g.in_channels, multiplier, g.taps).permute(1, 2, 0)
    return packed


def _scan(x: Tensor, g: ConvGeometry, variant: BlockVariant) -> BlockScan:
    tiling = Tiling.of_side(g, variant.side)
    blocks = -(-g.in_channels // variant.channels)
    words = g.batch * math.prod(tiling.grid) * blocks
    counts = torch.empty((2, words), dtype=torch.int32, device=x.device)
    launch(
        _scan_tiles,
        (words,),
        warps=4,
        stages=1,
        constants={
            **tiling.constants("TILE", "HALO", "STEP", "PITCH", "STRIDE"),
            "BLOCKS": blocks,
            "BLOCK": variant.channels,
            "ROWS": min(triton.next_power_of_2(tiling.halo_pixels), _ELEMENTS // variant.channels),
            "CHANNELS_LAST": x.stride(1) == 1,
            "WIDE": is_wide(x),
        },
        x_ptr=x,
        counts_ptr=counts,
        **strides(x, "x"),
        **sizes(tiling),
        channels=g.in_channels,
        words=words,
    )
    return BlockScan(tiling.covered, words, counts)


def _convolve(
    x: Tensor, scan: BlockScan, packed: Tensor, bias: Tensor | None, y: Tensor, g: ConvGeometry, variant: BlockVariant
) -> None:
    tiling = Tiling.of_side(g, variant.side)
    multiplier = g.out_channels // g.in_channels
    launch(
        _depthwise,
        (scan.words * multiplier,),
        warps=min(max(tiling.rows * variant.channels // _ELEMENTS_A_WARP, 4), 16),
        stages=1,
        constants={
            **tiling.constants("TILE", "STRIDE", "KERNEL"),
            **by_axis({"DILATION": g.dilation}),
            "MULTIPLIER": multiplier,
            "BLOCKS": -(-g.in_channels // variant.channels),
            "BLOCK": variant.channels,
            "CHANNELS_LAST": x.stride(1) == 1,
            "WIDE": is_wide(x) or is_wide(y),
        },
        x_ptr=x,
        active_ptr=scan.counts[1],
        weight_ptr=packed,
        bias_ptr=bias,
        y_ptr=y,
        **strides(x, "x"),
        **strides(y, "y"),
        **sizes(tiling),
        **by_axis({"OUT": g.out_size}),
        channels=g.in_channels,
        padded=packed.shape[-1],
    )
