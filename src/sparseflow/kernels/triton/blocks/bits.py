# pyright: basic, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
"""Packing, unpacking, adding, combining and concatenating packed spikes."""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseflow.kernels.blocks.spikes import MAX_COUNT, PackedSpikes, as_tensor, spatial

from ..launch import launch
from ..prescan import pixel_offset, strides
from .dynamics import count, half_words, ones_of, values_at, values_of, words_of
from .neuron import blocks_of, unwritten

_WORDS = 1024  # of one program that has nothing but words to look at
_WARPS = 4


@triton.jit
def _pack(
    x_ptr,
    bits_ptr,
    nonzero_ptr,
    x_n,
    x_c,
    x_d,
    x_h,
    x_w,
    SIZE_D,
    SIZE_H,
    SIZE_W,
    rows,
    channels,
    words,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    blocks = tl.cdiv(words * 32, CHANNELS)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    word = program % blocks * (CHANNELS // 32) + tl.arange(0, CHANNELS // 32)
    image = row // (SIZE_D * SIZE_H * SIZE_W)
    z = row // (SIZE_H * SIZE_W) % SIZE_D
    where = image * x_n + pixel_offset(z, row // SIZE_W % SIZE_H, row % SIZE_W, x_d, x_h, x_w, True)
    known = (row < rows)[:, None] & (channel < channels)[None, :]
    x = tl.load(x_ptr + where[:, None] + (channel.to(tl.int64) * x_c)[None, :], mask=known, other=0.0)
    bits = words_of(x, ROWS, CHANNELS)
    written = (row < rows)[:, None] & (word < words)[None, :]
    tl.store(bits_ptr + (row * words)[:, None] + word[None, :], bits, mask=written)
    count(nonzero_ptr, tl.sum(tl.sum(ones_of(bits), axis=1), axis=0))


@triton.jit
def _unpack(
    values_ptr, y_ptr, rows, channels, words, y_channels, offset, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    first = (program // blocks).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    word = program % blocks * (CHANNELS // 32) + tl.arange(0, CHANNELS // 32)
    there = row < rows - first
    values = values_at(values_ptr, first, row, there, channel, word, channels, words)
    where = y_ptr + first * y_channels + (row * y_channels + offset)[:, None] + channel[None, :]
    tl.store(where, values.to(y_ptr.dtype.element_ty), mask=there[:, None] & (channel < channels)[None, :])


@triton.jit
def _add(
    a_ptr, b_ptr, sums_ptr, bits_ptr, nonzero_ptr, rows, channels, words, MOST: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(words * 32, CHANNELS)
    program = tl.program_id(0)
    first = (program // blocks).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    word = program % blocks * (CHANNELS // 32) + tl.arange(0, CHANNELS // 32)
    there = row < rows - first
    known = there[:, None] & (channel < channels)[None, :]
    total = values_at(a_ptr, first, row, there, channel, word, channels, words)
    total += values_at(b_ptr, first, row, there, channel, word, channels, words)
    total = tl.minimum(total, MOST).to(tl.int32)
    tl.store(sums_ptr + first * channels + (row * channels)[:, None] + channel[None, :], total.to(tl.uint8), mask=known)
    bits = words_of(tl.where(known, total, 0), ROWS, CHANNELS)
    written = there[:, None] & (word < words)[None, :]
    tl.store(bits_ptr + first * words + (row * words)[:, None] + word[None, :], bits, mask=written)
    count(nonzero_ptr, tl.sum(tl.sum(ones_of(bits), axis=1), axis=0))


@triton.jit
def _combine(a_ptr, b_ptr, y_ptr, nonzero_ptr, numel, OP: tl.constexpr, WORDS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    a = tl.load(a_ptr + at, mask=at < numel, other=0)
    b = tl.load(b_ptr + at, mask=at < numel, other=0)
    if OP == "and":
        y = a & b
    elif OP == "and_not":
        y = a & ~b
    else:
        y = a | b
    tl.store(y_ptr + at, y, mask=at < numel)
    count(nonzero_ptr, tl.sum(ones_of(y), axis=0))


@triton.jit
def _append(
    x_ptr, y_ptr, nonzero_ptr, rows, x_words, y_words, first, last, shift, ROWS: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """Write words ``first`` to ``last`` of every row of ``y``: those of ``x``, ``shift`` channels further up."""
    blocks = tl.cdiv(last - first, WORDS)
    program = tl.program_id(0)
    row = ((program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    word = (program % blocks * WORDS + tl.arange(0, WORDS))[None, :]
    there = (row < rows) & (word < last - first)
    x = tl.load(x_ptr + row * x_words + word, mask=there & (word < x_words), other=0)
    y = x << shift
    if shift != 0:
        before = tl.load(x_ptr + row * x_words + word - 1, mask=there & (word >= 1) & (word <= x_words), other=0)
        y |= (before >> (32 - shift)) & ((1 << shift) - 1)
        y |= tl.load(y_ptr + row * y_words + first + word, mask=there & (word == 0), other=0)
    tl.store(y_ptr + row * y_words + first + word, y, mask=there)
    count(nonzero_ptr, tl.sum(tl.sum(ones_of(x), axis=1), axis=0))


def pack(x: Tensor, lead: int) -> PackedSpikes:
    """Pack ``x [*lead, C, *size]`` of any dtype and strides; the caller warrants that all its values are 0 or 1."""
    size, leading = spatial(tuple(x.shape[lead + 1 :])), tuple(x.shape[:lead])
    flat = x.reshape(math.prod(leading), *x.shape[lead:])
    spikes = unwritten(leading, x.shape[lead], size, x.dim() - lead - 1, x.device)
    rows, words = spikes.images * spikes.pixels, 2 * spikes.words
    block = blocks_of(rows, words)
    launch(
        _pack,
        (_programs(rows, 32 * words, block),),
        warps=_WARPS,
        stages=1,
        constants=block,
        x_ptr=flat,
        bits_ptr=half_words(spikes.bits),
        nonzero_ptr=spikes.nonzero,
        **strides(flat, "x"),
        SIZE_D=size[0],
        SIZE_H=size[1],
        SIZE_W=size[2],
        rows=rows,
        channels=spikes.channels,
        words=words,
    )
    return spikes


def unpack(x: PackedSpikes) -> Tensor:
    """The dense float32 tensor, channels last in memory."""
    flat = torch.empty((x.images, x.pixels, x.channels), dtype=torch.float32, device=x.bits.device)
    _write(x, flat, 0)
    return as_tensor(flat, x.shape, len(x.lead))


def _write(x: PackedSpikes, out: Tensor, first: int) -> None:
    """Write the values of ``x`` to the channels of ``out [images, pixels, channels]`` from number ``first`` on."""
    rows, words = x.images * x.pixels, 2 * x.words
    block = blocks_of(rows, words)
    launch(
        _unpack,
        (_programs(rows, x.channels, block),),
        warps=_WARPS,
        stages=1,
        constants=block,
        values_ptr=values_of(x),
        y_ptr=out,
        rows=rows,
        channels=x.channels,
        words=words,
        y_channels=out.shape[-1],
        offset=first,
    )


def add(a: PackedSpikes, b: PackedSpikes) -> PackedSpikes:
    """Sum of spikes as counts, at most 255."""
    total = _like(a)
    rows, words = a.images * a.pixels, 2 * a.words
    block = blocks_of(rows, words)
    counts = torch.empty((a.images, a.pixels, a.channels), dtype=torch.uint8, device=a.bits.device)
    launch(
        _add,
        (_programs(rows, 32 * words, block),),
        warps=_WARPS,
        stages=1,
        constants={"MOST": MAX_COUNT, **block},
        a_ptr=values_of(a),
        b_ptr=values_of(b),
        sums_ptr=counts,
        bits_ptr=half_words(total.bits),
        nonzero_ptr=total.nonzero,
        rows=rows,
        channels=a.channels,
        words=words,
    )
    return dataclasses.replace(total, counts=counts)


def logical(a: PackedSpikes, b: PackedSpikes, op: str) -> PackedSpikes:
    """``"and"``, ``"and_not"`` or ``"or"`` of {0, 1} spikes.

    Raises:
        ValueError: ``op`` is another.
    """
    if op not in ("and", "and_not", "or"):
        raise ValueError(f"op must be 'and', 'and_not' or 'or', got {op!r}")
    result = _like(a)
    numel = 2 * a.bits.numel()
    launch(
        _combine,
        (-(-numel // _WORDS),),
        warps=_WARPS,
        stages=1,
        constants={"OP": op, "WORDS": _WORDS},
        a_ptr=half_words(a.bits),
        b_ptr=half_words(b.bits),
        y_ptr=half_words(result.bits),
        nonzero_ptr=result.nonzero,
        numel=numel,
    )
    return result


def concat(parts: tuple[PackedSpikes, ...]) -> PackedSpikes:
    """Concatenation of channels, one part after the other: a word that two of them share is written by both."""
    channels = sum(part.channels for part in parts)
    whole = unwritten(parts[0].lead, channels, parts[0].size, parts[0].dims, parts[0].bits.device)
    counts = None
    if any(part.counts is not None for part in parts):
        counts = torch.empty((whole.images, whole.pixels, channels), dtype=torch.uint8, device=whole.bits.device)
    first = 0
    for part in parts:
        after = first + part.channels
        _append_words(part, whole, first, 2 * whole.words if after == channels else -(-after // 32))
        if counts is not None:
            _write(part, counts, first)
        first = after
    return dataclasses.replace(whole, counts=counts)


def _append_words(part: PackedSpikes, whole: PackedSpikes, channel: int, last: int) -> None:
    """Write ``part`` to ``whole`` from ``channel`` on, up to its word ``last``."""
    rows, first = whole.images * whole.pixels, channel // 32
    words = min(triton.next_power_of_2(max(1, last - first)), _WORDS)
    block = _WORDS // words
    launch(
        _append,
        (-(-rows // block) * -(-(last - first) // words),),
        warps=_WARPS,
        stages=1,
        constants={"ROWS": block, "WORDS": words},
        x_ptr=half_words(part.bits),
        y_ptr=half_words(whole.bits),
        nonzero_ptr=whole.nonzero,
        rows=rows,
        x_words=2 * part.words,
        y_words=2 * whole.words,
        first=first,
        last=last,
        shift=channel % 32,
    )


def _like(x: PackedSpikes) -> PackedSpikes:
    return unwritten(x.lead, x.channels, x.size, x.dims, x.bits.device)


def _programs(rows: int, channels: int, block: dict[str, int]) -> int:
    return -(-rows // block["ROWS"]) * -(-channels // block["CHANNELS"])
