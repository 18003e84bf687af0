# pyright: basic, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
"""Stage 1 of the tile kernels: which channels of which tiles hold a spike, as counts, bits and lists on the device.

One launch, one program a tile. In *channel* mode the active channels of the tile's halo are also gathered, so that the
second stage reads them side by side; in *group* mode whole groups of channels are kept where one of them is active,
and read from the input itself.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseflow.kernels.geometry import ConvGeometry

from .launch import launch
from .tiles import Tiling, by_axis

_WARPS = 4
_BYTES = 4096  # that a program scans at once where loads are 16 bytes wide: 16 registers a thread
_ELEMENTS = 2048  # that it reads at once where every element has an address of its own: 32 registers a thread
_CHANNELS = 256
_WORD = 32


@triton.jit
def tile_origin(tile, TILES_D, TILES_H, TILES_W, GROUPS: tl.constexpr):
    """Group, image and position in the grid of tiles of tile number ``tile``."""
    group = tile % GROUPS
    tile = tile // GROUPS
    x = tile % TILES_W
    tile = tile // TILES_W
    y = tile % TILES_H
    tile = tile // TILES_H
    return group, tile // TILES_D, tile % TILES_D, y, x


@triton.jit
def is_inside(z, y, x, D, H, W):
    """Which of the positions lie in an image of size ``(D, H, W)``."""
    return (z >= 0) & (z < D) & (y >= 0) & (y < H) & (x >= 0) & (x < W)


@triton.jit
def pixel_offset(z, y, x, s_d, s_h, s_w, WIDE: tl.constexpr):
    """Offsets of positions inside one image, in 64 bits where ``WIDE``."""
    if WIDE:
        z = z.to(tl.int64)
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    return z * s_d + y * s_h + x * s_w


@triton.jit
def halo_pixel(
    row, z, y, x,
    STEP_D: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, HALO_H: tl.constexpr, HALO_W: tl.constexpr,
):  # fmt: skip
    """Depth, row and column of numbered pixels in a halo, and their positions in the image; its corner is (z, y, x)."""
    hz = row // (HALO_H * HALO_W)
    hy = row // HALO_W % HALO_H
    hx = row % HALO_W
    return hz, hy, hx, z + hz * STEP_D, y + hy * STEP_H, x + hx * STEP_W


@triton.jit
def is_owned(
    hz, hy, hx, tz, ty, tx, TILES_D, TILES_H, TILES_W,
    OWNED_D: tl.constexpr, OWNED_H: tl.constexpr, OWNED_W: tl.constexpr,
):  # fmt: skip
    """Which pixels of a halo count for its tile: halos overlap, and the first tile that has a pixel counts it."""
    z = (hz < OWNED_D) | (tz == TILES_D - 1)
    y = (hy < OWNED_H) | (ty == TILES_H - 1)
    x = (hx < OWNED_W) | (tx == TILES_W - 1)
    return z & y & x


@triton.jit
def load_pixels(image, pixel, inside, channel, known, x_c, CHANNELS_LAST: tl.constexpr):
    """``[pixels, channels]`` of an image, read along the dimension that is contiguous in memory."""
    if CHANNELS_LAST:
        where = image + pixel[:, None] + (channel.to(pixel.dtype) * x_c)[None, :]
        return tl.load(where, mask=inside[:, None] & known[None, :], other=0.0)
    where = image + (channel.to(pixel.dtype) * x_c)[:, None] + pixel[None, :]
    return tl.trans(tl.load(where, mask=known[:, None] & inside[None, :], other=0.0))


@triton.jit
def _is_exact(x):
    """1 where a float32 has 8 significant bits or fewer and lies in the range of float16, else 0."""
    fits = (x == x.to(tl.float16).to(tl.float32)) & (x == x.to(tl.bfloat16).to(tl.float32))
    # An infinity fits, but its products with parts of different sign do not add up.
    return (fits & _is_finite(x)).to(tl.int32)


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _prescan_tiles(
    x_ptr,
    counts_ptr,
    bits_ptr,
    list_ptr,
    gathered_ptr,
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
    capacity,
    tiles,
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
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATHER_ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    PADDED: tl.constexpr,
    WORDS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    FINITE: tl.constexpr,
    WIDE: tl.constexpr,
):
    PIXELS: tl.constexpr = HALO_D * HALO_H * HALO_W
    tile = tl.program_id(0)
    group, n, tz, ty, tx = tile_origin(tile, TILES_D, TILES_H, TILES_W, GROUPS)
    image = x_ptr + n.to(tl.int64) * x_n + (group * channels).to(tl.int64) * x_c
    list_of_tile = list_ptr + tile.to(tl.int64) * (capacity // UNIT)
    cz = tz * (TILE_D * STRIDE_D) - PAD_D
    cy = ty * (TILE_H * STRIDE_H) - PAD_H
    cx = tx * (TILE_W * STRIDE_W) - PAD_W

    active = 0
    nonzero = 0
    exact = 1
    for block in range(tl.cdiv(channels, BLOCK)):
        channel = block * BLOCK + tl.arange(0, BLOCK)
        hits = tl.zeros((BLOCK,), tl.int32)
        counted = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, PIXELS, ROWS):
            row = start + tl.arange(0, ROWS)
            hz, hy, hx, iz, iy, ix = halo_pixel(row, cz, cy, cx, STEP_D, STEP_H, STEP_W, HALO_H, HALO_W)
            inside = is_inside(iz, iy, ix, IN_D, IN_H, IN_W) & (hz < HALO_D)
            owned = is_owned(
                hz, hy, hx, tz, ty, tx, TILES_D, TILES_H, TILES_W,
                TILE_D * PITCH_D, TILE_H * PITCH_H, TILE_W * PITCH_W,
            )  # fmt: skip
            pixel = pixel_offset(iz, iy, ix, x_d, x_h, x_w, WIDE)
            x = load_pixels(image, pixel, inside, channel, channel < channels, x_c, CHANNELS_LAST)
            hit = (x.to(tl.float32) != 0).to(tl.int32)
            hits += tl.sum(hit, axis=0)
            counted += tl.sum(hit * owned.to(tl.int32)[:, None], axis=0)
            if x_ptr.dtype.element_ty == tl.float32:
                exact = tl.minimum(exact, tl.min(tl.min(_is_exact(x), axis=1), axis=0))
            elif FINITE:
                exact = tl.minimum(exact, tl.min(tl.min(_is_finite(x.to(tl.float32)).to(tl.int32), axis=1), axis=0))
        nonzero += tl.sum(counted, axis=0)
        unit_hit = (tl.sum(tl.reshape(hits, (BLOCK // UNIT, UNIT)), axis=1) > 0).to(tl.int32)
        unit = block * (BLOCK // UNIT) + tl.arange(0, BLOCK // UNIT)
        position = active + tl.cumsum(unit_hit, axis=0) - 1
        tl.store(list_of_tile + position, unit, mask=unit_hit != 0)
        active += tl.sum(unit_hit, axis=0)
        shifted = unit_hit << (tl.arange(0, BLOCK // UNIT) % 32)
        word = tl.sum(tl.reshape(shifted, (WORDS, BLOCK // UNIT // WORDS)), axis=1)
        first = tile.to(tl.int64) * (tl.cdiv(channels, BLOCK) * WORDS) + block * WORDS
        tl.store(bits_ptr + first + tl.arange(0, WORDS), word)
    tl.store(counts_ptr + tile, active)
    tl.store(counts_ptr + tiles + tile, nonzero)
    tl.store(counts_ptr + 2 * tiles + tile, exact)

    if GATHER_ROWS > 0:
        CHUNKS: tl.constexpr = (PIXELS + GATHER_ROWS - 1) // GATHER_ROWS
        k = tl.arange(0, PADDED)
        # The second stage reads whole blocks of PADDED channels: what is missing is channel 0, with zeros.
        tl.store(list_of_tile + active + k, 0, mask=active + k < tl.cdiv(active, PADDED) * PADDED)
        tl.debug_barrier()  # what other threads of this program have put into the list is read from here on
        tile_rows = gathered_ptr + tile.to(tl.int64) * PIXELS * capacity
        for step in range(tl.cdiv(active, PADDED) * CHUNKS):
            at = step // CHUNKS * PADDED + k
            row = step % CHUNKS * GATHER_ROWS + tl.arange(0, GATHER_ROWS)
            _, _, _, iz, iy, ix = halo_pixel(row, cz, cy, cx, STEP_D, STEP_H, STEP_W, HALO_H, HALO_W)
            inside = is_inside(iz, iy, ix, IN_D, IN_H, IN_W)
            pixel = pixel_offset(iz, iy, ix, x_d, x_h, x_w, WIDE)
            channel = tl.load(list_of_tile + at, mask=at < active, other=0)
            x = load_pixels(image, pixel, inside, channel, at < active, x_c, CHANNELS_LAST)
            where = tile_rows + row[:, None] * capacity + at[None, :]
            tl.store(where, x.to(gathered_ptr.dtype.element_ty), mask=(row < PIXELS)[:, None])


@dataclasses.dataclass(frozen=True)
class TileScan:
    """What stage 1 found, all on the device of the input; nothing here waits for it.

    Attributes:
        numel: elements of the input that were read.
        words: (tile, unit) pairs; a unit is a channel, or a group of them.
        counts: int32 ``[3, tiles]``: active units, nonzero elements, and whether all values fit 8 significant bits (in
            16 bits always, or where they are finite if that was asked for).
        bits: int32 ``[tiles, words a tile]``: one bit a unit, 32 (or all of a block) a word.
        lists: int32 ``[tiles, units]``: the active units in ascending order.
        gathered: ``[tiles, halo pixels, channels]`` of which the first columns hold the active channels, or ``None``.
    """

    numel: int
    words: int
    counts: Tensor
    bits: Tensor
    lists: Tensor
    gathered: Tensor | None

    def totals(self) -> Tensor:
        """int64 ``[2]``: nonzero elements, and active (tile, unit) pairs."""
        return self.counts[:2].sum(1, dtype=torch.int64).flip(0)


def prescan_tiles(x: Tensor, tiling: Tiling, block_k: int, *, gather: bool, finite: bool = False) -> TileScan:
    """Scan ``x [N, C, *size]`` (any strides) tile by tile.

    Args:
        x: the input, with one to three spatial dimensions.
        tiling: tiles of the convolution's output.
        block_k: channels that the second stage takes at once; in group mode (``gather=False``) the size of a group.
        gather: copy the active channels of every tile side by side (channel mode).
        finite: in 16 bits, where every value fits otherwise, say of every tile whether all of its values are finite.
    """
    g = tiling.geometry
    unit, last = 1 if gather else block_k, x.stride(1) == 1
    block = _block(g, block_k)
    words = -(-block // unit // _WORD)
    scan = _unwritten(x, tiling, unit, block_k, -(-g.group_channels // block) * words)
    launch(
        _prescan_tiles,
        (tiling.count,),
        warps=_WARPS,
        stages=1,
        constants={
            **tiling.constants("TILE", "HALO", "STEP", "PITCH", "STRIDE"),
            "GROUPS": g.groups,
            "ROWS": _rows(tiling, (_BYTES // x.element_size() if last else _ELEMENTS) // block),
            "BLOCK": block,
            "GATHER_ROWS": _rows(tiling, _ELEMENTS // block_k) if gather else 0,
            "UNIT": unit,
            "PADDED": block_k,
            "WORDS": words,
            "CHANNELS_LAST": last,
            "FINITE": finite,
            "WIDE": is_wide(x),
        },
        x_ptr=x,
        counts_ptr=scan.counts,
        bits_ptr=scan.bits,
        list_ptr=scan.lists,
        gathered_ptr=scan.gathered,
        **strides(x, "x"),
        **sizes(tiling),
        channels=g.group_channels,
        capacity=capacity_of(g, block_k),
        tiles=tiling.count,
    )
    return scan


def _unwritten(x: Tensor, tiling: Tiling, unit: int, block_k: int, words: int) -> TileScan:
    """The scan of ``x`` before the kernel has filled it in, with ``words`` words of bits for every tile."""
    g, tiles, capacity = tiling.geometry, tiling.count, capacity_of(tiling.geometry, block_k)
    counts = torch.empty((3, tiles), dtype=torch.int32, device=x.device)
    bits = torch.empty((tiles, words), dtype=torch.int32, device=x.device)
    lists = torch.empty((tiles, capacity // unit), dtype=torch.int32, device=x.device)
    gathered = None
    if unit == 1:
        dtype = torch.float16 if x.dtype == torch.float32 else x.dtype
        gathered = torch.empty((tiles, tiling.halo_pixels, capacity), dtype=dtype, device=x.device)
    return TileScan(tiling.covered, tiles * -(-g.group_channels // unit), counts, bits, lists, gathered)


def capacity_of(geometry: ConvGeometry, block_k: int) -> int:
    """Channels that a tile has room for: whole blocks."""
    return -(-geometry.group_channels // block_k) * block_k


def units_of_word(geometry: ConvGeometry, unit: int) -> int:
    """Groups of ``unit`` channels in a word of a group-mode scan's bits."""
    return min(_WORD, _block(geometry, unit) // unit)


def _block(geometry: ConvGeometry, block_k: int) -> int:
    """Channels that a program scans together."""
    return max(block_k, min(triton.next_power_of_2(geometry.group_channels), _CHANNELS))


def _rows(tiling: Tiling, most: int) -> int:
    """Halo pixels that a program takes at once, a power of two."""
    return max(1, min(triton.next_power_of_2(tiling.halo_pixels), most))


def strides(t: Tensor, name: str) -> dict[str, int]:
    """Strides of ``t [N, C, *size]`` as kernel arguments, missing spatial dimensions with stride 0."""
    n, c, *spatial = t.stride()
    d, h, w = *[0] * (3 - len(spatial)), *spatial
    return {f"{name}_n": n, f"{name}_c": c, f"{name}_d": d, f"{name}_h": h, f"{name}_w": w}


def sizes(tiling: Tiling) -> dict[str, int]:
    """Input size, padding and grid of tiles as kernel arguments."""
    g = tiling.geometry
    return by_axis({"IN": g.in_size, "PAD": g.padding, "TILES": tiling.grid})


def is_wide(t: Tensor) -> bool:
    """Whether offsets inside one image of ``t`` need 64 bits."""
    return sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True)) >= 2**31
