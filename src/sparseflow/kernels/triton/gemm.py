# pyright: basic, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false
"""Stage 2 of the tile kernels: an implicit matrix product over the active channels of every tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import interpreting, launch
from .prescan import TileScan, capacity_of, is_inside, is_wide, load_pixels, pixel_offset, sizes, strides, tile_origin
from .rows import offset
from .tiles import Tiling, by_axis
from .weights import Packed, padded_outputs

_CHUNK = 16  # channels of one step of the plain float32 product, whose operands are registers


@triton.jit
def _dot(a, w_ptr, where, mask, part_size, acc, PARTS: tl.constexpr, UPCAST: tl.constexpr):
    """``acc`` plus ``a`` times the sum of the weight's parts, the smallest part first."""
    if PARTS == 1:
        w = tl.load(w_ptr + where, mask=mask, other=0.0)
        if UPCAST:
            return tl.dot(a.to(tl.float32), w.to(tl.float32), acc, input_precision="ieee")
        return tl.dot(a, w, acc)
    total = tl.zeros_like(acc)
    for part in tl.static_range(PARTS):
        w = tl.load(w_ptr + where + (PARTS - 1 - part) * part_size, mask=mask, other=0.0)
        if UPCAST:
            total = tl.dot(a.to(tl.float32), w.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(a, w, total)
    # Added in registers: the adders of the tensor cores keep fewer bits than float32 has, over a whole sum too few.
    return acc + total


@triton.jit
def _whole(where, mask, part_size, PARTS: tl.constexpr):
    """The sum of the weight's parts in float32."""
    w = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        w += tl.load(where + part * part_size, mask=mask, other=0.0).to(tl.float32)
    return w


@triton.jit
def _weight_rows(tap, channel, output, channels, padded, WIDE: tl.constexpr):
    """Offsets ``[channels, outputs]`` inside the weight of one group; channels beyond it meet zeros in the input."""
    row = tap * channels + tl.minimum(channel, channels - 1)
    return offset(row, WIDE)[:, None] * padded + output[None, :]


@triton.jit
def _store(image, y, pixel, inside, channel, known, y_c, CHANNELS_LAST: tl.constexpr):
    """Write ``[pixels, channels]``, along the dimension that is contiguous in memory."""
    if CHANNELS_LAST:
        where = image + pixel[:, None] + (channel.to(pixel.dtype) * y_c)[None, :]
        tl.store(where, y, mask=inside[:, None] & known[None, :])
    else:
        where = image + (channel.to(pixel.dtype) * y_c)[:, None] + pixel[None, :]
        tl.store(where, tl.trans(y), mask=known[:, None] & inside[None, :])


@triton.jit
def _tile_gemm(
    x_ptr,
    gathered_ptr,
    counts_ptr,
    list_ptr,
    w_ptr,
    scale_ptr,
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
    capacity,
    outputs,
    padded,
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
    REACH_D: tl.constexpr,
    REACH_H: tl.constexpr,
    REACH_W: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATHERED: tl.constexpr,
    PARTS: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    FLOAT32: tl.constexpr,
    CHUNK: tl.constexpr,
    UPCAST: tl.constexpr,
    OUT_LAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    ROWS: tl.constexpr = TILE_D * TILE_H * TILE_W
    blocks = tl.cdiv(padded, BLOCK_N)
    program = tl.program_id(0)
    tile = program // blocks
    group, n, tz, ty, tx = tile_origin(tile, TILES_D, TILES_H, TILES_W, GROUPS)
    row = tl.arange(0, ROWS)
    oz = tz * TILE_D + row // (TILE_H * TILE_W)
    oy = ty * TILE_H + (row // TILE_W) % TILE_H
    ox = tx * TILE_W + row % TILE_W
    hz = (row // (TILE_H * TILE_W)) * PITCH_D
    hy = ((row // TILE_W) % TILE_H) * PITCH_H
    hx = (row % TILE_W) * PITCH_W
    k = tl.arange(0, BLOCK_K)
    output = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = (output < padded)[None, :]

    image = x_ptr + n.to(tl.int64) * x_n + (group * channels).to(tl.int64) * x_c
    if GATHERED:
        steps = tl.cdiv(tl.load(counts_ptr + tile), BLOCK_K) * TAPS
        list_of_tile = list_ptr + tile.to(tl.int64) * capacity
        halo_row = (hz * HALO_H + hy) * HALO_W + hx
        tile_rows = gathered_ptr + tile.to(tl.int64) * (HALO_D * HALO_H * HALO_W) * capacity
        tile_rows += halo_row[:, None] * capacity + k[None, :]
    else:
        steps = tl.load(counts_ptr + tile) * TAPS
        list_of_tile = list_ptr + tile.to(tl.int64) * (capacity // BLOCK_K)
    iz = oz * STRIDE_D - PAD_D
    iy = oy * STRIDE_H - PAD_H
    ix = ox * STRIDE_W - PAD_W
    weight = w_ptr + (group * TAPS).to(tl.int64) * channels * padded
    part_size = tl.cast(GROUPS * TAPS, tl.int64) * channels * padded

    # A tile with a value that is not exact in 16 bits takes the second loop; the other one then has no steps.
    fast = steps
    if FLOAT32:
        fast = steps * tl.load(counts_ptr + 2 * tiles + tile)
    acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for step in range(fast):
        block = step // TAPS
        tap = step % TAPS
        rz = (tap // (KERNEL_H * KERNEL_W)) * REACH_D
        ry = ((tap // KERNEL_W) % KERNEL_H) * REACH_H
        rx = (tap % KERNEL_W) * REACH_W
        if GATHERED:
            channel = tl.load(list_of_tile + block * BLOCK_K + k)
            # Neighbouring taps share most of their pixels, so these loads go through the L1 cache.
            shift = ((rz * HALO_H + ry) * HALO_W + rx) * capacity
            a = tl.load(tile_rows + shift + block * BLOCK_K, cache_modifier=".ca")
        else:
            channel = tl.load(list_of_tile + block) * BLOCK_K + k
            pz = iz + rz * STEP_D
            py = iy + ry * STEP_H
            px = ix + rx * STEP_W
            inside = is_inside(pz, py, px, IN_D, IN_H, IN_W)
            pixel = pixel_offset(pz, py, px, x_d, x_h, x_w, WIDE)
            a = load_pixels(image, pixel, inside, channel, channel < channels, x_c, True)
        rows = _weight_rows(tap, channel, output, channels, padded, WIDE)
        acc = _dot(a.to(w_ptr.dtype.element_ty), weight, rows, known, part_size, acc, PARTS, UPCAST)

    scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    if SCALED:
        scale = tl.load(scale_ptr + group * padded + output, mask=output < padded, other=0.0)
        acc *= scale[None, :]

    if FLOAT32:
        CHUNKS: tl.constexpr = BLOCK_K // CHUNK
        few = tl.arange(0, CHUNK)
        for step in tl.range((steps - fast) * CHUNKS, num_stages=1):
            block = step // (TAPS * CHUNKS)
            tap = step // CHUNKS % TAPS
            at = block * BLOCK_K + step % CHUNKS * CHUNK + few
            if GATHERED:
                channel = tl.load(list_of_tile + at)
                listed = at < tl.load(counts_ptr + tile)
            else:
                channel = tl.load(list_of_tile + block) * BLOCK_K + step % CHUNKS * CHUNK + few
                listed = channel < channels
            pz = iz + (tap // (KERNEL_H * KERNEL_W)) * (REACH_D * STEP_D)
            py = iy + ((tap // KERNEL_W) % KERNEL_H) * (REACH_H * STEP_H)
            px = ix + (tap % KERNEL_W) * (REACH_W * STEP_W)
            inside = is_inside(pz, py, px, IN_D, IN_H, IN_W)
            pixel = pixel_offset(pz, py, px, x_d, x_h, x_w, WIDE)
            a = load_pixels(image, pixel, inside, channel, listed, x_c, True)
            rows = _weight_rows(tap, channel, output, channels, padded, WIDE)
            w = _whole(weight + rows, known, part_size, PARTS) * scale[None, :]
            acc = tl.dot(a, w, acc, input_precision="ieee")

    if BIASED:
        acc += tl.load(bias_ptr + group * outputs + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    written = (oz < OUT_D) & (oy < OUT_H) & (ox < OUT_W)
    pixel = pixel_offset(oz, oy, ox, y_d, y_h, y_w, WIDE)
    image = y_ptr + n.to(tl.int64) * y_n + (group * outputs).to(tl.int64) * y_c
    _store(image, acc.to(y_ptr.dtype.element_ty), pixel, written, output, output < outputs, y_c, OUT_LAST)


def tile_gemm(
    x: Tensor,
    scan: TileScan,
    packed: Packed,
    bias: Tensor | None,
    out: Tensor,
    tiling: Tiling,
    *,
    block_n: int,
    block_k: int,
    warps: int,
    stages: int,
) -> Tensor:
    """Convolution of ``x [N, C, *size]`` from its ``scan``, written to every element of ``out`` once; returns ``out``.

    Args:
        x: the input that was scanned.
        scan: of :func:`prescan_tiles`, with the same ``tiling`` and ``block_k``.
        packed: the weight; ``bias`` has the dtype of ``x``.
        out: ``[N, O, *out]`` with any strides.
        block_n: output channels of a program; a tile's pixels times these are its accumulators.
        block_k: channels of one step.
        warps: warps of a program.
        stages: steps whose loads are under way at once.
    """
    g = tiling.geometry
    outputs = g.out_channels // g.groups
    padded = padded_outputs(outputs)
    launch(
        _tile_gemm,
        (tiling.count * -(-padded // block_n),),
        warps=warps,
        stages=stages,
        constants={
            **tiling.constants("TILE", "HALO", "STEP", "PITCH", "REACH", "STRIDE", "KERNEL"),
            "GROUPS": g.groups,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "GATHERED": scan.gathered is not None,
            "PARTS": packed.parts.shape[0],
            "SCALED": packed.scale is not None,
            "BIASED": bias is not None,
            "FLOAT32": x.dtype == torch.float32,
            "CHUNK": _CHUNK,
            "UPCAST": interpreting() and packed.parts.dtype == torch.bfloat16,  # whose products it gets wrong
            "OUT_LAST": out.stride(1) == 1,
            "WIDE": is_wide(x) or is_wide(out) or packed.parts[0].numel() >= 2**31,
        },
        x_ptr=x,
        gathered_ptr=scan.gathered,
        counts_ptr=scan.counts,
        list_ptr=scan.lists,
        w_ptr=packed.parts,
        scale_ptr=packed.scale,
        bias_ptr=bias,
        y_ptr=out,
        **strides(x, "x"),
        **strides(out, "y"),
        **sizes(tiling),
        **by_axis({"OUT": g.out_size}),
        channels=g.group_channels,
        capacity=capacity_of(g, block_k),
        outputs=outputs,
        padded=padded,
        tiles=tiling.count,
    )
    return out
