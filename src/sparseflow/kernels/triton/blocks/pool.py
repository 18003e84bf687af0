# pyright: basic, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
"""Pooling of packed spikes: the or over a window, and its average."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseflow.kernels.blocks.spikes import PackedSpikes, as_tensor
from sparseflow.kernels.geometry import Three

from ..launch import launch, launch_unfused
from ..prescan import is_inside
from ..tiles import by_axis
from .dynamics import count, half_words, ones_of, values_at, values_of
from .neuron import blocks_of, unwritten

_WORDS = 512  # of one program
_WARPS = 4


@triton.jit
def _max_pool(
    x_ptr,
    y_ptr,
    nonzero_ptr,
    IN_D,
    IN_H,
    IN_W,
    OUT_D,
    OUT_H,
    OUT_W,
    PAD_D,
    PAD_H,
    PAD_W,
    rows,
    words,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_D: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    blocks = tl.cdiv(words, WORDS)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    word = program % blocks * WORDS + tl.arange(0, WORDS)
    image = row // (OUT_D * OUT_H * OUT_W)
    z = row // (OUT_H * OUT_W) % OUT_D * STRIDE_D - PAD_D
    y = row // OUT_W % OUT_H * STRIDE_H - PAD_H
    x = row % OUT_W * STRIDE_W - PAD_W
    there = (row < rows)[:, None] & (word < words)[None, :]
    any_of = tl.zeros((ROWS, WORDS), tl.int32)
    for tap in range(KERNEL_D * KERNEL_H * KERNEL_W):
        iz = z + tap // (KERNEL_H * KERNEL_W) * DILATION_D
        iy = y + tap // KERNEL_W % KERNEL_H * DILATION_H
        ix = x + tap % KERNEL_W * DILATION_W
        inside = is_inside(iz, iy, ix, IN_D, IN_H, IN_W)[:, None] & there
        pixel = ((image * IN_D + iz) * IN_H + iy) * IN_W + ix
        any_of |= tl.load(x_ptr + (pixel * words)[:, None] + word[None, :], mask=inside, other=0)
    tl.store(y_ptr + (row * words)[:, None] + word[None, :], any_of, mask=there)
    count(nonzero_ptr, tl.sum(tl.sum(ones_of(any_of), axis=1), axis=0))


@triton.jit
def _avg_pool(
    x_ptr,
    y_ptr,
    IN_D,
    IN_H,
    IN_W,
    OUT_D,
    OUT_H,
    OUT_W,
    PAD_D,
    PAD_H,
    PAD_W,
    rows,
    channels,
    words,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    INCLUDE_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    image = row // (OUT_D * OUT_H * OUT_W)
    z = row // (OUT_H * OUT_W) % OUT_D * STRIDE_D - PAD_D
    y = row // OUT_W % OUT_H * STRIDE_H - PAD_H
    x = row % OUT_W * STRIDE_W - PAD_W
    word = program % blocks * (CHANNELS // 32) + tl.arange(0, CHANNELS // 32)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    size = tl.zeros((ROWS,), tl.float32)
    for tap in range(KERNEL_D * KERNEL_H * KERNEL_W):
        iz = z + tap // (KERNEL_H * KERNEL_W)
        iy = y + tap // KERNEL_W % KERNEL_H
        ix = x + tap % KERNEL_W
        inside = is_inside(iz, iy, ix, IN_D, IN_H, IN_W) & (row < rows)
        pixel = ((image * IN_D + iz) * IN_H + iy) * IN_W + ix
        total += values_at(x_ptr, 0, pixel, inside, channel, word, channels, words)
        size += inside.to(tl.float32)
    size = tl.maximum(size, 1.0)
    if INCLUDE_PAD:
        size = tl.full((ROWS,), KERNEL_D * KERNEL_H * KERNEL_W, tl.float32)
    mean = tl.div_rn(total, tl.broadcast_to(size[:, None], (ROWS, CHANNELS)))
    known = (row < rows)[:, None] & (channel < channels)[None, :]
    tl.store(y_ptr + (row * channels)[:, None] + channel[None, :], mean, mask=known)


def max_pool(x: PackedSpikes, kernel: Three, stride: Three, padding: Three, dilation: Three) -> PackedSpikes:
    """The or over every window; arguments are (D, H, W) triples, floor mode."""
    y = unwritten(x.lead, x.channels, pooled_size(x.size, kernel, stride, padding, dilation), x.dims, x.bits.device)
    rows, words = y.images * y.pixels, 2 * y.words
    columns = min(triton.next_power_of_2(words), 64)
    block = {"ROWS": min(_WORDS // columns, triton.next_power_of_2(max(1, rows))), "WORDS": columns}
    launch(
        _max_pool,
        (-(-rows // block["ROWS"]) * -(-words // columns),),
        warps=_WARPS,
        stages=1,
        constants={**by_axis({"KERNEL": kernel, "STRIDE": stride, "DILATION": dilation}), **block},
        x_ptr=half_words(x.bits),
        y_ptr=half_words(y.bits),
        nonzero_ptr=y.nonzero,
        **by_axis({"IN": x.size, "OUT": y.size, "PAD": padding}),
        rows=rows,
        words=words,
    )
    return y


def avg_pool(x: PackedSpikes, kernel: Three, stride: Three, padding: Three, include_pad: bool) -> Tensor:
    """The mean over every window, float32 and channels last; arguments are (D, H, W) triples, floor mode."""
    size = pooled_size(x.size, kernel, stride, padding, (1, 1, 1))
    pixels = size[0] * size[1] * size[2]
    flat = torch.empty((x.images, pixels, x.channels), dtype=torch.float32, device=x.bits.device)
    rows, words = x.images * pixels, 2 * x.words
    block = blocks_of(rows, words)
    launch_unfused(
        _avg_pool,
        (-(-rows // block["ROWS"]) * -(-x.channels // block["CHANNELS"]),),
        warps=_WARPS,
        stages=1,
        constants={**by_axis({"KERNEL": kernel, "STRIDE": stride}), "INCLUDE_PAD": include_pad, **block},
        x_ptr=values_of(x),
        y_ptr=flat,
        **by_axis({"IN": x.size, "OUT": size, "PAD": padding}),
        rows=rows,
        channels=x.channels,
        words=words,
    )
    return as_tensor(flat, (*x.lead, x.channels, *size[3 - x.dims :]), len(x.lead))


def pooled_size(size: Three, kernel: Three, stride: Three, padding: Three, dilation: Three) -> Three:
    """Output size in floor mode.

    >>> pooled_size((1, 7, 8), (1, 3, 3), (1, 2, 2), (0, 1, 1), (1, 1, 1))
    (1, 4, 4)
    """
    axes = zip(size, kernel, stride, padding, dilation, strict=True)
    depth, height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)
    return depth, height, width
