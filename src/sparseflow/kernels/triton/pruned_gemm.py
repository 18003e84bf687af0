# pyright: basic, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false
"""Stage 2 for pruned weights: a matrix product over the blocks of a weight that are there and meet a spike.

A program owns a tile of output pixels and does some blocks of output channels one after another, so that it finds the
input of the tile in its L1 cache again. For each block it first makes its work list: the (tap, 16 input channels) pairs
whose weights are not all zero and whose channels fire in the tile. Then it multiplies along that list.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sparseflow.kernels.weight_blocks import BLOCK, present_blocks

from .gemm import _dot, _store, _whole
from .launch import interpreting, launch
from .prescan import TileScan, is_inside, is_wide, pixel_offset, sizes, strides, tile_origin, units_of_word
from .rows import offset
from .tiles import Tiling, by_axis
from .weights import pack

GROUP = BLOCK[1]  # input channels of a block of the weight, which is the depth of the smallest matrix instruction
_LISTED = 128  # pairs that a program looks at together when it makes its list
_PROGRAMS = 512  # a large GPU several times over


class PackedBlocks(NamedTuple):
    """A weight in blocks, all of them: those that are zero are read only where the input is not finite.

    A pair is ``16 input channels * taps + tap``. Shapes depend on no value, so that packing need not wait for the
    device, and a weight that has changed fits into the memory of the one before.

    Attributes:
        blocks: ``[parts, output blocks, pairs, 16, outputs of a block]``; the parts as in
            :class:`~sparseflow.kernels.triton.weights.Packed`.
        scale: float32 ``[1, padded outputs]``, or ``None`` where it would be 1.
        pairs: int32 ``[output blocks, pairs]``: the pairs of present blocks in ascending order, then the others.
        present: int32 ``[output blocks]``: how many are present.
    """

    blocks: Tensor
    scale: Tensor | None
    pairs: Tensor
    present: Tensor


def pack_blocks(weight: Tensor, width: int, *, tf32: bool, inspect: bool) -> PackedBlocks:
    """Pack ``weight [O, C, *kernel]`` or ``[O, C]``; blocks that are all zero are found here, by value.

    Args:
        weight: float16, bfloat16 or float32.
        width: output channels of a block.
        tf32: see :func:`~sparseflow.kernels.triton.weights.pack`.
        inspect: see there.
    """
    parts, scale = pack(weight, 1, tf32=tf32, inspect=inspect)
    count, _, taps, channels, padded = parts.shape
    whole = F.pad(parts[:, 0], (0, -padded % width, 0, -channels % GROUP))
    split = whole.reshape(count, taps, -1, GROUP, whole.shape[-1] // width, width)
    blocks = split.permute(0, 4, 2, 1, 3, 5).flatten(2, 3).contiguous()
    present = present_blocks(weight, (width, GROUP)).flatten(1)
    absent_last = torch.argsort((~present).to(torch.uint8), dim=1, stable=True)
    return PackedBlocks(blocks, scale, absent_last.int(), present.sum(1, dtype=torch.int32))


@triton.jit
def _list_pairs(
    work, pairs, listed, bits, PADDING,
    TAPS: tl.constexpr, PER_WORD: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """List those of the first ``listed`` pairs whose channels fire in the tile, up to whole steps of ``STEP`` pairs.

    Returns how many there are.
    """
    tl.debug_barrier()  # the list of the block before is still being read by other threads
    found = 0
    for first in range(0, listed, BLOCK):
        at = first + tl.arange(0, BLOCK)
        pair = tl.load(pairs + at, mask=at < listed, other=0)
        group = pair // TAPS
        word = tl.load(bits + group // PER_WORD, mask=at < listed, other=0)
        hit = (word >> (group % PER_WORD)) & 1
        tl.store(work + found + tl.cumsum(hit, axis=0) - 1, pair, mask=hit != 0)
        found += tl.sum(hit, axis=0)
    more = found + tl.arange(0, 2 * STEP)
    # A step reads the pairs of the next one, so that there is one step more than there are pairs for.
    filled = (tl.cdiv(found, STEP) + 1) * STEP
    tl.store(work + more, tl.full((2 * STEP,), PADDING, tl.int32), mask=more < filled)
    tl.debug_barrier()  # what other threads of this program have put into the list is read from here on
    return found


@triton.jit
def _tap(tap, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, D: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """Distance of a tap from the first one, for dilations ``(D, H, W)``."""
    return tap // (KERNEL_H * KERNEL_W) * D, tap // KERNEL_W % KERNEL_H * H, tap % KERNEL_W * W


@triton.jit
def _each_channel(pair, GROUP: tl.constexpr):
    """``[pairs * GROUP]``: every pair once for each of its channels."""
    return tl.reshape(tl.broadcast_to(pair[:, None], (pair.shape[0], GROUP)), (pair.shape[0] * GROUP,))


@triton.jit
def _pruned_gemm(
    x_ptr,
    counts_ptr,
    bits_ptr,
    pairs_ptr,
    present_ptr,
    work_ptr,
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
    words,
    capacity,
    room,
    outputs,
    padded,
    blocks,
    run,
    tiles,
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
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    PER_WORD: tl.constexpr,
    LISTED: tl.constexpr,
    PARTS: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    FLOAT32: tl.constexpr,
    UPCAST: tl.constexpr,
    OUT_LAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    ROWS: tl.constexpr = TILE_D * TILE_H * TILE_W
    program = tl.program_id(0)
    runs = tl.cdiv(blocks, run)
    tile = program // runs
    _, n, tz, ty, tx = tile_origin(tile, TILES_D, TILES_H, TILES_W, 1)
    row = tl.arange(0, ROWS)
    oz = tz * TILE_D + row // (TILE_H * TILE_W)
    oy = ty * TILE_H + (row // TILE_W) % TILE_H
    ox = tx * TILE_W + row % TILE_W
    iz = oz * STRIDE_D - PAD_D
    iy = oy * STRIDE_H - PAD_H
    ix = ox * STRIDE_W - PAD_W
    corner = pixel_offset(iz, iy, ix, x_d, x_h, x_w, WIDE)
    written = (oz < OUT_D) & (oy < OUT_H) & (ox < OUT_W)
    target = pixel_offset(oz, oy, ox, y_d, y_h, y_w, WIDE)
    k = tl.arange(0, PAIRS * GROUP)
    few = tl.arange(0, GROUP)
    p = tl.arange(0, PAIRS)
    image = x_ptr + n.to(tl.int64) * x_n
    bits = bits_ptr + tile.to(tl.int64) * words
    work = work_ptr + program.to(tl.int64) * room
    part_size = tl.cast(blocks, tl.int64) * capacity * GROUP * WIDTH
    usual = tl.load(counts_ptr + 2 * tiles + tile)

    first = program % runs * run
    for block in range(first, tl.minimum(first + run, blocks)):
        # Dense multiplies infinities and NaN by the zeros of the weight, too: a tile that has one skips none of them.
        listed = tl.where(usual != 0, tl.load(present_ptr + block), capacity)
        found = _list_pairs(
            work, pairs_ptr + block * capacity, listed, bits, capacity,
            TAPS, PER_WORD, PAIRS, LISTED,
        )  # fmt: skip
        output = block * WIDTH + tl.arange(0, WIDTH)
        column = tl.arange(0, WIDTH)[None, :]
        whole = tl.full((1, WIDTH), 1, tl.int1)
        weight = w_ptr + tl.cast(block, tl.int64) * capacity * (GROUP * WIDTH)

        # A tile with a value that is not exact in 16 bits takes the second loop; the other one then has no steps.
        steps = tl.cdiv(found, PAIRS)
        if FLOAT32:
            steps *= usual
        acc = tl.zeros((ROWS, WIDTH), tl.float32)
        # Read one step ahead: loads that need what was loaded in the same step halve the depth of the pipeline.
        pair = _each_channel(tl.load(work + p), GROUP)
        for step in range(steps):
            group = pair // TAPS
            rz, ry, rx = _tap(pair % TAPS, KERNEL_H, KERNEL_W, DILATION_D, DILATION_H, DILATION_W)
            # What the compiler cannot know of numbers that are loaded: the channels of a pair are neighbours.
            shift = pixel_offset(rz, ry, rx, x_d, x_h, x_w, WIDE)
            if TAPS > 1:
                shift = tl.max_constancy(shift, GROUP)
            channel = tl.max_constancy(group * GROUP, GROUP) + k % GROUP
            inside = is_inside(
                iz[:, None] + rz[None, :], iy[:, None] + ry[None, :], ix[:, None] + rx[None, :], IN_D, IN_H, IN_W
            )
            where = corner[:, None] + (shift + offset(channel, WIDE) * x_c)[None, :]
            # The taps of a channel share most of their pixels, and so do the blocks of outputs.
            a = tl.load(image + where, mask=inside & (channel < channels)[None, :], other=0.0, cache_modifier=".ca")
            # The pairs that fill up the list are beyond all channels: their input is zero, and any weight will do.
            of_block = offset(tl.minimum(pair, capacity - 1), WIDE) * (GROUP * WIDTH) + k % GROUP * WIDTH
            acc = _dot(
                a.to(w_ptr.dtype.element_ty), weight, of_block[:, None] + column, whole, part_size, acc, PARTS, UPCAST
            )
            pair = _each_channel(tl.load(work + (step + 1) * PAIRS + p), GROUP)

        scale = tl.full((WIDTH,), 1.0, tl.float32)
        if SCALED:
            scale = tl.load(scale_ptr + output, mask=output < padded, other=0.0)
            acc *= scale[None, :]

        if FLOAT32:
            for step in tl.range(found * (1 - usual), num_stages=1):
                one = tl.load(work + step)
                rz, ry, rx = _tap(one % TAPS, KERNEL_H, KERNEL_W, DILATION_D, DILATION_H, DILATION_W)
                channel = one // TAPS * GROUP + few
                inside = is_inside(iz + rz, iy + ry, ix + rx, IN_D, IN_H, IN_W)
                shift = pixel_offset(rz, ry, rx, x_d, x_h, x_w, WIDE)
                where = (corner + shift)[:, None] + (offset(channel, WIDE) * x_c)[None, :]
                a = tl.load(image + where, mask=inside[:, None] & (channel < channels)[None, :], other=0.0)
                of_block = (offset(one, WIDE) * (GROUP * WIDTH) + few * WIDTH)[:, None] + column
                acc = tl.dot(
                    a, _whole(weight + of_block, whole, part_size, PARTS) * scale[None, :], acc, input_precision="ieee"
                )

        if BIASED:
            acc += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
        out = y_ptr + n.to(tl.int64) * y_n
        _store(out, acc.to(y_ptr.dtype.element_ty), target, written, output, output < outputs, y_c, OUT_LAST)


def blocks_of_program(tiling: Tiling, blocks: int) -> int:
    """Of ``blocks`` of output channels, those that one program does: as many as leave programs for a large GPU.

    A power of two.

    >>> from sparseflow.kernels.geometry import ConvGeometry
    >>> geometry = ConvGeometry.from_call((128, 64, 28, 28), (64, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    >>> blocks_of_program(Tiling.of_side(geometry, 8), 4), blocks_of_program(Tiling.of_side(geometry, 8), 64)
    (4, 64)
    """
    run = 1
    while run < blocks and tiling.count * -(-blocks // (2 * run)) >= _PROGRAMS:
        run *= 2
    return run


def pruned_gemm(
    x: Tensor,
    scan: TileScan,
    packed: PackedBlocks,
    bias: Tensor | None,
    out: Tensor,
    tiling: Tiling,
    *,
    pairs: int,
    warps: int,
    stages: int,
) -> Tensor:
    """Convolution of ``x [N, C, *size]`` from its ``scan``, written to every element of ``out`` once; returns ``out``.

    Args:
        x: the input that was scanned.
        scan: of :func:`~sparseflow.kernels.triton.prescan.prescan_tiles` in group mode, for groups of 16 channels and
            with ``finite=True``.
        packed: the weight; ``bias`` has the dtype of ``x``.
        out: ``[N, O, *out]`` with any strides.
        tiling: the tiles that were scanned, of a convolution with one group.
        pairs: (tap, 16 channels) pairs of one step, a power of two.
        warps: warps of a program.
        stages: steps whose loads are under way at once.
    """
    g = tiling.geometry
    parts, blocks, capacity, _, width = packed.blocks.shape
    run = blocks_of_program(tiling, blocks)
    programs = tiling.count * -(-blocks // run)
    room = (-(-capacity // pairs) + 1) * pairs
    launch(
        _pruned_gemm,
        (programs,),
        warps=warps,
        stages=stages,
        constants={
            **tiling.constants("TILE", "STRIDE", "KERNEL"),
            **by_axis({"DILATION": g.dilation}),
            "GROUP": GROUP,
            "WIDTH": width,
            "PAIRS": pairs,
            "PER_WORD": units_of_word(g, GROUP),
            "LISTED": min(_LISTED, triton.next_power_of_2(capacity)),
            "PARTS": parts,
            "SCALED": packed.scale is not None,
            "BIASED": bias is not None,
            "FLOAT32": x.dtype == torch.float32,
            "UPCAST": interpreting() and packed.blocks.dtype == torch.bfloat16,  # whose products it gets wrong
            "OUT_LAST": out.stride(1) == 1,
            "WIDE": is_wide(x) or is_wide(out) or packed.blocks[0, 0].numel() >= 2**31,
        },
        x_ptr=x,
        counts_ptr=scan.counts,
        bits_ptr=scan.bits,
        pairs_ptr=packed.pairs,
        present_ptr=packed.present,
        work_ptr=torch.empty((programs, room), dtype=torch.int32, device=x.device),
        w_ptr=packed.blocks,
        scale_ptr=packed.scale,
        bias_ptr=bias,
        y_ptr=out,
        **strides(x, "x"),
        **strides(out, "y"),
        **sizes(tiling),
        **by_axis({"OUT": g.out_size}),
        channels=g.in_channels,
        words=scan.bits.shape[1],
        capacity=capacity,
        room=room,
        outputs=g.out_channels,
        padded=g.out_channels if packed.scale is None else packed.scale.shape[-1],
        blocks=blocks,
        run=run,
        tiles=tiling.count,
    )
    return out
