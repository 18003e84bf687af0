# pyright: basic, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
"""What is active in a tile: lists of words inside the convolution, or of single channels in a stage before it."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..prescan import halo_pixel, is_inside, sizes, tile_origin
from ..tiles import Tiling
from .dynamics import WORD
from .layout import Layout

_BLOCK = 8  # words that stage 1 looks at together, which are 256 channels
_ROWS = 64
_WARPS = 4


@triton.jit
def halo_words(
    image, row, word, z, y, x, IN_D, IN_H, IN_W, steps, step_words, group_words, words,
    STEP_D: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    HALO_D: tl.constexpr, HALO_H: tl.constexpr, HALO_W: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """int32 ``[rows, words]`` of a tile's halo, whose corner is (z, y, x); rows are its pixels, step after step.

    ``image`` points at the group's first word of the first step, and ``steps`` of the ``STEPS`` are there.
    """
    PIXELS: tl.constexpr = HALO_D * HALO_H * HALO_W
    step = row // PIXELS
    _, _, _, iz, iy, ix = halo_pixel(row % PIXELS, z, y, x, STEP_D, STEP_H, STEP_W, HALO_H, HALO_W)
    there = is_inside(iz, iy, ix, IN_D, IN_H, IN_W) & (step < tl.minimum(steps, STEPS))
    where = image + step.to(tl.int64) * step_words + ((iz * IN_H + iy) * IN_W + ix) * words
    return tl.load(where[:, None] + word[None, :], mask=there[:, None] & (word < group_words)[None, :], other=0)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _list_channels(
    bits_ptr,
    list_ptr,
    found_ptr,
    kept_ptr,
    IN_D,
    IN_H,
    IN_W,
    PAD_D,
    PAD_H,
    PAD_W,
    TILES_D,
    TILES_H,
    TILES_W,
    steps,
    step_words,
    group_words,
    words,
    capacity,
    TILE_D: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    HALO_D: tl.constexpr,
    HALO_H: tl.constexpr,
    HALO_W: tl.constexpr,
    STEP_D: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ALL: tl.constexpr = HALO_D * HALO_H * HALO_W * STEPS
    chunks = tl.cdiv(steps, STEPS)
    program = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    group, n, tz, ty, tx = tile_origin(tl.program_id(0) // chunks, TILES_D, TILES_H, TILES_W, GROUPS)
    z = tz * (TILE_D * STRIDE_D) - PAD_D
    y = ty * (TILE_H * STRIDE_H) - PAD_H
    x = tx * (TILE_W * STRIDE_W) - PAD_W
    image = bits_ptr + chunk.to(tl.int64) * STEPS * step_words + n.to(tl.int64) * (IN_D * IN_H * IN_W * words)
    image += group * group_words
    here = tl.minimum(group_words, words - group * group_words)
    left = steps - chunk * STEPS
    list_of_tile = list_ptr + program * capacity

    active = 0
    for first in range(0, here, BLOCK):
        word = first + tl.arange(0, BLOCK)
        seen = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, ALL, ROWS):
            bits = halo_words(
                image, start + tl.arange(0, ROWS), word, z, y, x, IN_D, IN_H, IN_W, left, step_words, here, words,
                STEP_D, STEP_H, STEP_W, HALO_D, HALO_H, HALO_W, STEPS,
            )  # fmt: skip
            seen |= tl.reduce(bits, 0, _or)
        hit = tl.reshape((seen[:, None] >> tl.arange(0, 32)[None, :]) & 1, (BLOCK * 32,))
        position = active + tl.cumsum(hit, axis=0) - 1
        tl.store(list_of_tile + position, first * 32 + tl.arange(0, BLOCK * 32), mask=hit != 0)
        active += tl.sum(hit, axis=0)
    tl.store(found_ptr + program, active)

    # The convolution reads whole blocks of 32 channels: what is missing is channel 0, with zeros.
    k = tl.arange(0, 32)
    tl.store(list_of_tile + active + k, 0, mask=active + k < tl.cdiv(active, 32) * 32)
    tl.debug_barrier()  # what other threads of this program have put into the list is read from here on
    PARTS: tl.constexpr = (ALL + ROWS - 1) // ROWS
    for part in range(tl.cdiv(active, 32) * PARTS):
        row = part % PARTS * ROWS + tl.arange(0, ROWS)
        block = part // PARTS
        channel = tl.load(list_of_tile + block * 32 + k)
        bits = halo_words(
            image, row, channel // 32, z, y, x, IN_D, IN_H, IN_W, left, step_words, here, words,
            STEP_D, STEP_H, STEP_W, HALO_D, HALO_H, HALO_W, STEPS,
        )  # fmt: skip
        bits = tl.where((block * 32 + k < active)[None, :], (bits >> (channel % 32)[None, :]) & 1, 0)
        kept = tl.sum(bits << k[None, :], axis=1)
        tl.store(kept_ptr + program * (capacity // 32) * ALL + block * ALL + row, kept, mask=row < ALL)


@dataclasses.dataclass(frozen=True)
class ChannelLists:
    """What stage 1 found in every tile and run of steps; nothing here waits for the device.

    Attributes:
        channels: int32 ``[lists, capacity]``: active channels in ascending order, filled up to whole blocks of 32.
        found: int32 ``[lists]``: how many are active.
        kept: int32 ``[lists, capacity / 32, steps * halo pixels]``: the bits of the active channels, side by side.
    """

    channels: Tensor
    found: Tensor
    kept: Tensor


def list_channels(bits: Tensor, layout: Layout, tiling: Tiling, steps: int, at_once: int) -> ChannelLists:
    """List the active channels of every tile of ``tiling`` in every run of ``at_once`` of the ``steps``.

    ``bits`` are int32, two for each word of the input.
    """
    g, lists, words = tiling.geometry, tiling.count * -(-steps // at_once), layout.group_words
    rows, capacity = at_once * tiling.halo_pixels, WORD * words
    found = ChannelLists(
        torch.empty((lists, capacity), dtype=torch.int32, device=bits.device),
        torch.empty(lists, dtype=torch.int32, device=bits.device),
        torch.empty((lists, words, rows), dtype=torch.int32, device=bits.device),
    )
    launch(
        _list_channels,
        (lists,),
        warps=_WARPS,
        stages=1,
        constants={
            **tiling.constants("TILE", "HALO", "STEP", "STRIDE"),
            "GROUPS": g.groups,
            "STEPS": at_once,
            "ROWS": min(_ROWS, triton.next_power_of_2(rows)),
            "BLOCK": min(_BLOCK, triton.next_power_of_2(words)),
        },
        bits_ptr=bits,
        list_ptr=found.channels,
        found_ptr=found.found,
        kept_ptr=found.kept,
        **sizes(tiling),
        steps=steps,
        step_words=g.batch * g.in_pixels * layout.words,
        group_words=words,
        words=layout.words,
        capacity=capacity,
    )
    return found
