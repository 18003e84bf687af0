# pyright: basic, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false
"""Convolution of packed spikes with epilogue and neuron: packed spikes in, packed spikes out, one kernel.

A program owns a tile of output pixels of one image and a block of output channels, at all time steps. It takes the
steps a few at a time: those are rows of one matrix product over what is active in the tile's halo at any of them, so
that they share every weight that is read. The membranes of the tile then pass through these steps in registers. Between
two such runs of steps they wait in the state, where they have to end anyway.

What is active is listed in words of 32 channels, by the program itself, or in single channels by a launch before it
(:mod:`.lists`). A tile without spikes has an empty list, multiplies nothing and reads no weight.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseflow.kernels.blocks.records import Dynamics, Epilogue, State
from sparseflow.kernels.blocks.spikes import PackedSpikes
from sparseflow.kernels.geometry import ConvGeometry

from ..gemm import _dot, _weight_rows
from ..launch import Argument, interpreting, launch_unfused
from ..prescan import is_inside, sizes, tile_origin
from ..tiles import by_axis
from ..weights import Packed, padded_outputs
from .dynamics import (
    WORD,
    count,
    epilogue,
    epilogue_arguments,
    half_words,
    neuron_arguments,
    neuron_constants,
    neuron_step,
    ones_of,
    state_arguments,
    words_of,
)
from .layout import Layout, Variant
from .lists import halo_words, list_channels
from .neuron import unwritten

_WORDS = 64  # that a program looks at together when it makes its list
_LIST_ELEMENTS = 1024


@triton.jit
def _list_words(
    list_of_tile, image, z, y, x, IN_D, IN_H, IN_W, steps, step_words, group_words, words,
    STEP_D: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    HALO_D: tl.constexpr, HALO_H: tl.constexpr, HALO_W: tl.constexpr,
    STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """List the words in which some pixel of the halo has a spike at one of the steps; returns how many there are."""
    active = 0
    for first in range(0, group_words, BLOCK):
        word = first + tl.arange(0, BLOCK)
        hits = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, HALO_D * HALO_H * HALO_W * STEPS, ROWS):
            bits = halo_words(
                image, start + tl.arange(0, ROWS), word, z, y, x, IN_D, IN_H, IN_W, steps, step_words, group_words,
                words, STEP_D, STEP_H, STEP_W, HALO_D, HALO_H, HALO_W, STEPS,
            )  # fmt: skip
            hits += tl.sum((bits != 0).to(tl.int32), axis=0)
        hit = (hits > 0).to(tl.int32)
        tl.store(list_of_tile + active + tl.cumsum(hit, axis=0) - 1, word, mask=hit != 0)
        active += tl.sum(hit, axis=0)
    tl.debug_barrier()  # what other threads of this program have put into the list is read from here on
    return active


@triton.jit
def _unpacked(bits, k, DTYPE: tl.constexpr):
    """``[rows, 32]`` zeros and ones from a word a row."""
    one = tl.full((1, 1), 1.0, DTYPE)
    return tl.where((bits[:, None] & (1 << k)[None, :]) != 0, one, tl.zeros_like(one))


@triton.jit
def _sums_of_step(acc, STEP: tl.constexpr, STEPS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """``[pixels, channels]`` of one step from ``[steps * pixels, channels]``, by halving the steps bit by bit."""
    LEVELS: tl.constexpr = (STEPS > 1) + (STEPS > 2) + (STEPS > 4)
    x = tl.permute(tl.reshape(acc, (STEPS, PIXELS, CHANNELS)), (1, 2, 0))
    for level in tl.static_range(LEVELS):
        even, odd = tl.split(tl.reshape(x, (PIXELS, CHANNELS, STEPS >> (level + 1), 2)))
        x = even if (STEP >> level) % 2 == 0 else odd
    return tl.reshape(x, (PIXELS, CHANNELS))


@triton.jit
def _conv_block(  # noqa: C901 - its branches are the compiler's
    bits_ptr,
    counts_ptr,
    list_ptr,
    found_ptr,
    kept_ptr,
    w_ptr,
    unit_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    v_ptr,
    syn_ptr,
    v_seq_ptr,
    out_ptr,
    nonzero_ptr,
    start,
    threshold,
    decay,
    gain_1,
    gain_2,
    gain_3,
    synapse_decay,
    reset_value,
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
    batch,
    steps,
    channels,
    group_channels,
    words,
    group_words,
    outputs,
    group_outputs,
    padded,
    out_words,
    group_out_words,
    blocks,
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
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LIST_ROWS: tl.constexpr,
    LIST_WORDS: tl.constexpr,
    PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
    CARRIED: tl.constexpr,
    CHARGE: tl.constexpr,
    COMPARATOR: tl.constexpr,
    RESET: tl.constexpr,
    TIMING: tl.constexpr,
):
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    PIXELS: tl.constexpr = TILE_D * TILE_H * TILE_W
    HALO: tl.constexpr = HALO_D * HALO_H * HALO_W
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty
    program = tl.program_id(0)
    tile = program // blocks
    group, n, tz, ty, tx = tile_origin(tile, TILES_D, TILES_H, TILES_W, GROUPS)
    k = tl.arange(0, 32)
    output = program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    known = (output < padded)[None, :]
    here = tl.minimum(group_words, words - group * group_words)

    # Rows of the product: the pixels of the tile, step after step.
    row = tl.arange(0, STEPS * PIXELS)
    late = row // PIXELS
    oz = row % PIXELS // (TILE_H * TILE_W)
    oy = row // TILE_W % TILE_H
    ox = row % TILE_W
    iz = (tz * TILE_D + oz) * STRIDE_D - PAD_D
    iy = (ty * TILE_H + oy) * STRIDE_H - PAD_H
    ix = (tx * TILE_W + ox) * STRIDE_W - PAD_W
    of_row = late * HALO + (oz * PITCH_D * HALO_H + oy * PITCH_H) * HALO_W + ox * PITCH_W
    in_pixels = IN_D * IN_H * IN_W
    step_pixels = tl.cast(batch, tl.int64) * in_pixels
    weight = w_ptr + (group * TAPS).to(tl.int64) * group_channels * padded
    part_size = tl.cast(GROUPS * TAPS, tl.int64) * group_channels * padded

    # Pixels of the output, and its channels among those of all groups.
    place = tl.arange(0, PIXELS)
    pz = tz * TILE_D + place // (TILE_H * TILE_W)
    py = ty * TILE_H + place // TILE_W % TILE_H
    px = tx * TILE_W + place % TILE_W
    inside = (pz < OUT_D) & (py < OUT_H) & (px < OUT_W)
    out_pixels = OUT_D * OUT_H * OUT_W
    pixel = (pz * OUT_H + py) * OUT_W + px  # of its image, as all offsets in 32 bits are
    channel = group * group_outputs + output
    there = (output < group_outputs) & (channel < outputs)
    written = inside[:, None] & there[None, :]
    value = (pixel * outputs)[:, None] + channel[None, :]
    neuron = n.to(tl.int64) * out_pixels * outputs + value
    word = program % blocks * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
    all_words = group * group_out_words + word
    left = tl.where(group == GROUPS - 1, out_words - group * group_out_words, group_out_words)
    unit = tl.full((BLOCK_N,), 1.0, tl.float32)
    if unit_ptr is not None:
        unit = tl.load(unit_ptr + group * padded + output, mask=output < padded, other=0.0)

    ones = tl.zeros((PIXELS,), tl.int32)
    chunks = tl.cdiv(steps, STEPS)
    for chunk in range(chunks):
        # The words of this group from the first of these steps on.
        first = (tl.cast(chunk, tl.int64) * STEPS * batch + n) * in_pixels
        source = bits_ptr + first * words + group * group_words
        if found_ptr is not None:
            at = tl.cast(tile, tl.int64) * chunks + chunk
            active = tl.cdiv(tl.load(found_ptr + at), 32)
            list_of_tile = list_ptr + at * group_words * 32
            kept = kept_ptr + at * group_words * (STEPS * HALO) + of_row
        else:
            list_of_tile = list_ptr + (tl.cast(program, tl.int64) * chunks + chunk) * group_words
            active = _list_words(
                list_of_tile, source, tz * (TILE_D * STRIDE_D) - PAD_D, ty * (TILE_H * STRIDE_H) - PAD_H,
                tx * (TILE_W * STRIDE_W) - PAD_W, IN_D, IN_H, IN_W, steps - chunk * STEPS, step_pixels * words, here,
                words, STEP_D, STEP_H, STEP_W, HALO_D, HALO_H, HALO_W, STEPS, LIST_ROWS, LIST_WORDS,
            )  # fmt: skip
        timely = late < steps - chunk * STEPS
        if counts_ptr is not None:
            counted = counts_ptr + (first + late.to(tl.int64) * step_pixels) * channels + group * group_channels
        of_step = source + late.to(tl.int64) * (step_pixels * words)
        acc = tl.zeros((STEPS * PIXELS, BLOCK_N), tl.float32)
        for step in range(tl.where(program % blocks * BLOCK_N < group_outputs, active, 0) * TAPS):
            block = step // TAPS
            tap = step % TAPS
            rz = (tap // (KERNEL_H * KERNEL_W)) * REACH_D
            ry = ((tap // KERNEL_W) % KERNEL_H) * REACH_H
            rx = (tap % KERNEL_W) * REACH_W
            if found_ptr is not None:
                of_group = tl.load(list_of_tile + block * 32 + k)
                shift = (rz * HALO_H + ry) * HALO_W + rx
                a = _unpacked(tl.load(kept + (block * (STEPS * HALO) + shift)), k, DTYPE)
            else:
                listed = tl.load(list_of_tile + block)
                of_group = listed * 32 + k
                z = iz + rz * STEP_D
                y = iy + ry * STEP_H
                x = ix + rx * STEP_W
                seen = is_inside(z, y, x, IN_D, IN_H, IN_W) & timely
                position = (z * IN_H + y) * IN_W + x
                if counts_ptr is not None:
                    where = counted[:, None] + (position * channels)[:, None] + of_group[None, :]
                    filled = seen[:, None] & (group * group_channels + of_group < channels)[None, :]
                    a = tl.load(where, mask=filled, other=0).to(DTYPE)
                else:
                    a = _unpacked(tl.load(of_step + position * words + listed, mask=seen, other=0), k, DTYPE)
            rows = _weight_rows(tap, of_group, output, group_channels, padded, False)
            acc = _dot(a, weight, rows, known, part_size, acc, PARTS, UPCAST)
        acc *= unit[None, :]

        if CHARGE is not None:
            carried = written
            if not CARRIED:
                carried = written & (place < chunk * PIXELS)[:, None]
            v = tl.load(v_ptr + neuron, mask=carried, other=start)
            syn = tl.zeros((PIXELS, BLOCK_N), tl.float32)
            if syn_ptr is not None:
                syn = tl.load(syn_ptr + neuron, mask=carried, other=0.0)
        for i in tl.static_range(STEPS):
            due = inside & (place < (steps - chunk * STEPS - i) * PIXELS)  # all or none of those inside
            image = ((tl.cast(chunk, tl.int64) * STEPS + i) * batch + n) * out_pixels
            x = _sums_of_step(acc, i, STEPS, PIXELS, BLOCK_N)
            x = epilogue(
                x, scale_ptr, shift_ptr, residual_ptr, image, pixel, due, channel, all_words, outputs, out_words
            )  # fmt: skip
            now = due[:, None] & there[None, :]
            if CHARGE is None:
                tl.store(out_ptr + image * outputs + value, x, mask=now)
            else:
                s, charged, current = neuron_step(
                    v, syn, x, channel, there,
                    threshold, decay, gain_1, gain_2, gain_3, synapse_decay, reset_value,
                    CHARGE, COMPARATOR, RESET, TIMING,
                )  # fmt: skip
                v = tl.where(now, charged, v)
                syn = tl.where(now, current, syn)
                bits = words_of(tl.where(now, s, 0.0), PIXELS, BLOCK_N)
                ones += tl.sum(ones_of(bits), axis=1)
                written_words = due[:, None] & (word < left)[None, :]
                at = image * out_words + (pixel * out_words)[:, None] + all_words[None, :]
                tl.store(out_ptr + at, bits, mask=written_words)
                if v_seq_ptr is not None:
                    tl.store(v_seq_ptr + image * outputs + value, v, mask=now)
        if CHARGE is not None:
            tl.store(v_ptr + neuron, v, mask=written)
            if syn_ptr is not None:
                tl.store(syn_ptr + neuron, syn, mask=written)
            tl.debug_barrier()  # other threads may read it back in the next run of steps
    if CHARGE is not None:
        count(nonzero_ptr, tl.sum(ones, axis=0))


def conv(
    x: PackedSpikes,
    packed: Packed,
    geometry: ConvGeometry,
    name: str,
    given: Epilogue,
    neuron: Dynamics | None,
    state: State | None,
    steps: int,
) -> PackedSpikes | Tensor:
    """See :meth:`~sparseflow.kernels.blocks.records.BlockOps.conv`."""
    layout, variant = Layout.of(geometry, steps), Variant.from_name(name)
    n, device = geometry.batch // steps, x.bits.device
    if neuron is None or state is None:
        sums = torch.empty((geometry.batch, geometry.out_pixels, layout.outputs), dtype=torch.float32, device=device)
        _launch(x, packed, layout, variant, given, {**_NO_NEURON, "out_ptr": sums}, _NOT_RUN, steps)
        return sums
    spikes = unwritten((steps, n), layout.outputs, geometry.out_size, x.dims, device)
    arguments = {**state_arguments(state), **neuron_arguments(neuron)}
    arguments.update(out_ptr=half_words(spikes.bits), nonzero_ptr=spikes.nonzero)
    if neuron.synaptic:
        variant = variant.with_currents()
        if state.syn is None:
            arguments["syn_ptr"] = torch.zeros_like(state.v)  # it has to wait somewhere between two runs of steps
    constants = {**neuron_constants(neuron), "CARRIED": not state.fresh}
    _launch(x, packed, layout, variant, given, arguments, constants, steps)
    return spikes


_NOT_RUN = {"CHARGE": None, "COMPARATOR": None, "RESET": None, "TIMING": None, "CARRIED": False}
_NO_NEURON: dict[str, Argument] = dict.fromkeys(
    (
        *("v_ptr", "syn_ptr", "v_seq_ptr", "start", "nonzero_ptr", "threshold", "decay", "gain_1", "gain_2", "gain_3"),
        *("synapse_decay", "reset_value"),
    )
)


def _launch(
    x: PackedSpikes,
    packed: Packed,
    layout: Layout,
    variant: Variant,
    given: Epilogue,
    of_neuron: dict[str, Argument],
    constants: dict[str, Any],
    steps: int,
) -> None:
    g, tiling = layout.geometry, layout.tiling(variant.pixels)
    blocks, runs = -(-layout.most_out_words * WORD // variant.block_n), -(-steps // variant.steps)
    if variant.channels and x.counts is None:  # counts are read by words: 32 of them lie side by side
        found = list_channels(half_words(x.bits), layout, tiling, steps, variant.steps)
        lists = {"list_ptr": found.channels, "found_ptr": found.found, "kept_ptr": found.kept}
    else:
        room = torch.empty((tiling.count * blocks * runs, layout.group_words), dtype=torch.int32, device=x.bits.device)
        lists = {"list_ptr": room, "found_ptr": None, "kept_ptr": None}
    words = min(_WORDS, triton.next_power_of_2(layout.group_words))
    halo = triton.next_power_of_2(tiling.halo_pixels * variant.steps)
    launch_unfused(
        _conv_block,
        (tiling.count * blocks,),
        warps=variant.warps,
        stages=variant.stages,
        constants={
            **tiling.constants("TILE", "HALO", "STEP", "PITCH", "REACH", "STRIDE", "KERNEL"),
            "GROUPS": g.groups,
            "STEPS": variant.steps,
            "BLOCK_N": variant.block_n,
            "LIST_ROWS": min(halo, max(1, _LIST_ELEMENTS // words)),
            "LIST_WORDS": words,
            "PARTS": packed.parts.shape[0],
            "UPCAST": interpreting() and packed.parts.dtype == torch.bfloat16,  # whose products it gets wrong
            **constants,
        },
        bits_ptr=half_words(x.bits),
        counts_ptr=x.counts,
        **lists,
        w_ptr=packed.parts,
        unit_ptr=packed.scale,
        **epilogue_arguments(given),
        **of_neuron,
        **sizes(tiling),
        **by_axis({"OUT": g.out_size}),
        batch=g.batch,
        steps=steps,
        channels=layout.channels,
        group_channels=g.group_channels,
        words=layout.words,
        group_words=layout.group_words,
        outputs=layout.outputs,
        group_outputs=layout.group_outputs,
        padded=padded_outputs(layout.group_outputs),
        out_words=layout.out_words,
        group_out_words=layout.group_out_words,
        blocks=blocks,
    )
