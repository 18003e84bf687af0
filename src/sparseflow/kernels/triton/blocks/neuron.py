# pyright: basic, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
"""Epilogue and neuron on dense sums: one pass over them, packed spikes out.

A program keeps the membranes of some rows and channels in registers while it walks the time steps; a row is a pixel of
an image. Nothing is reused, so that memory decides how long it takes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseflow.kernels.blocks.records import Dynamics, Epilogue, State
from sparseflow.kernels.blocks.spikes import WORD, PackedSpikes

from ..launch import launch_unfused
from .dynamics import (
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

_ELEMENTS = 2048  # of one program: 16 a thread
_CHANNELS = 256
_WARPS = 4


@triton.jit
def _run_neuron(
    x_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    v_ptr,
    syn_ptr,
    v_seq_ptr,
    bits_ptr,
    nonzero_ptr,
    start,
    threshold,
    decay,
    gain_1,
    gain_2,
    gain_3,
    synapse_decay,
    reset_value,
    steps,
    rows,
    x_rows,
    residual_rows,
    channels,
    words,
    CHARGE: tl.constexpr,
    COMPARATOR: tl.constexpr,
    RESET: tl.constexpr,
    TIMING: tl.constexpr,
    FRESH: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    blocks = tl.cdiv(words * 32, CHANNELS)
    program = tl.program_id(0)
    first = (program // blocks).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    word = program % blocks * (CHANNELS // 32) + tl.arange(0, CHANNELS // 32)
    there = row < rows - first
    known = there[:, None] & (channel < channels)[None, :]
    written = there[:, None] & (word < words)[None, :]
    of_value = (row * channels)[:, None] + channel[None, :]
    of_word = (row * words)[:, None] + word[None, :]
    neuron = first * channels + of_value

    syn = tl.zeros((ROWS, CHANNELS), tl.float32)
    if FRESH:
        v = syn + start
    else:
        v = tl.load(v_ptr + neuron, mask=known, other=0.0)
        if syn_ptr is not None:
            syn = tl.load(syn_ptr + neuron, mask=known, other=0.0)
    ones = tl.zeros((ROWS,), tl.int32)
    for t in range(steps):
        late = tl.cast(t, tl.int64)
        x = tl.load(x_ptr + (first + late * x_rows) * channels + of_value, mask=known, other=0.0)
        of_residual = first + late * residual_rows
        x = epilogue(x, scale_ptr, shift_ptr, residual_ptr, of_residual, row, there, channel, word, channels, words)
        s, v, syn = neuron_step(
            v, syn, x, channel, channel < channels,
            threshold, decay, gain_1, gain_2, gain_3, synapse_decay, reset_value, CHARGE, COMPARATOR, RESET, TIMING,
        )  # fmt: skip
        bits = words_of(tl.where(known, s, 0.0), ROWS, CHANNELS)
        ones += tl.sum(ones_of(bits), axis=1)
        of_step = first + late * rows
        tl.store(bits_ptr + of_step * words + of_word, bits, mask=written)
        if v_seq_ptr is not None:
            tl.store(v_seq_ptr + of_step * channels + of_value, v, mask=known)
    tl.store(v_ptr + neuron, v, mask=known)
    if syn_ptr is not None:
        tl.store(syn_ptr + neuron, syn, mask=known)
    count(nonzero_ptr, tl.sum(ones, axis=0))


@triton.jit
def _affine(
    x_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    rows,
    channels,
    words,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    first = (program // blocks).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    word = program % blocks * (CHANNELS // 32) + tl.arange(0, CHANNELS // 32)
    there = row < rows - first
    known = there[:, None] & (channel < channels)[None, :]
    where = x_ptr + first * channels + (row * channels)[:, None] + channel[None, :]
    x = tl.load(where, mask=known, other=0.0)
    x = epilogue(x, scale_ptr, shift_ptr, residual_ptr, first, row, there, channel, word, channels, words)
    tl.store(where, x, mask=known)


def run_neuron(
    currents: Tensor,
    size: tuple[int, int, int],
    dims: int,
    given: Epilogue,
    neuron: Dynamics,
    state: State,
    steps: int,
) -> PackedSpikes:
    """See :meth:`~sparseflow.kernels.blocks.records.BlockOps.neuron`."""
    n, pixels, channels = state.v.shape
    currents, rows = currents.contiguous(), n * pixels
    spikes = unwritten((steps, n), channels, size, dims, currents.device)
    arguments = epilogue_arguments(given)
    residual = arguments["residual_ptr"]
    block = blocks_of(rows, 2 * spikes.words)
    launch_unfused(
        _run_neuron,
        (-(-rows // block["ROWS"]) * -(-64 * spikes.words // block["CHANNELS"]),),
        warps=_WARPS,
        stages=1,
        constants={**neuron_constants(neuron), "FRESH": state.fresh, **block},
        x_ptr=currents,
        **arguments,
        **state_arguments(state),
        bits_ptr=half_words(spikes.bits),
        nonzero_ptr=spikes.nonzero,
        **neuron_arguments(neuron),
        steps=steps,
        rows=rows,
        x_rows=_rows_a_step(currents, n, steps),
        residual_rows=0 if residual is None else _rows_a_step(residual, n, steps),
        channels=channels,
        words=2 * spikes.words,
    )
    return spikes


def affine(currents: Tensor, given: Epilogue) -> Tensor:
    """The epilogue alone, in place where ``currents [images, pixels, channels]`` are contiguous."""
    currents = currents.contiguous()
    channels, rows = currents.shape[-1], math.prod(currents.shape[:-1])
    words = 2 * -(-channels // WORD)
    block = blocks_of(rows, words)
    launch_unfused(
        _affine,
        (-(-rows // block["ROWS"]) * -(-channels // block["CHANNELS"]),),
        warps=_WARPS,
        stages=1,
        constants=block,
        x_ptr=currents,
        **epilogue_arguments(given),
        rows=rows,
        channels=channels,
        words=words,
    )
    return currents


def _rows_a_step(values: Tensor, n: int, steps: int) -> int:
    """Rows from one time step to the next: none in values that are the same at every step."""
    return 0 if values.shape[0] < n * steps else n * values.shape[1]


def blocks_of(rows: int, words: int) -> dict[str, int]:
    """Rows and channels of one program that takes ``words`` of 32 channels side by side.

    >>> blocks_of(100_000, 2), blocks_of(3, 2)
    ({'ROWS': 32, 'CHANNELS': 64}, {'ROWS': 4, 'CHANNELS': 64})
    """
    channels = min(_CHANNELS, 32 * triton.next_power_of_2(words))
    return {"ROWS": min(_ELEMENTS // channels, triton.next_power_of_2(max(1, rows))), "CHANNELS": channels}


def unwritten(
    lead: tuple[int, ...], channels: int, size: tuple[int, int, int], dims: int, device: torch.device
) -> PackedSpikes:
    """Packed spikes for a kernel to fill in: nothing but the count, which is 0, has a value."""
    bits = torch.empty((math.prod(lead), math.prod(size), -(-channels // WORD)), dtype=torch.int64, device=device)
    nonzero = torch.zeros(1, dtype=torch.int64, device=device)
    return PackedSpikes(bits, lead, channels, size, dims, nonzero=nonzero)
