# pyright: basic, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
"""Epilogue and neuron as the kernels of fused blocks run them, in registers, every operation rounded on its own.

Kernels that use these functions are launched by :func:`~sparseflow.kernels.triton.launch.launch_unfused`. What they
compute is :mod:`sparseflow.kernels.blocks.reference`, line by line.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseflow.kernels.blocks.records import Dynamics, Epilogue, State
from sparseflow.kernels.blocks.spikes import PackedSpikes
from sparseflow.neuron import Charge

from ..launch import Argument

WORD = 32  # channels of a machine word as the kernels read it: half of one in memory
_RATES = {Charge.LEAK_INPUT: Charge.LEAK_INPUT_RATE, Charge.LEAK: Charge.LEAK_RATE}


@triton.jit
def constant_of(constant, channel, known):
    """A constant as it is, or ``[1, channels]`` of one that has an entry per channel."""
    constant = tl.to_tensor(constant)
    if constant.dtype.is_ptr():
        return tl.load(constant + channel, mask=known, other=1.0)[None, :]
    else:  # noqa: RET505 - a compiled function must not fall through to a second type
        return constant


@triton.jit
def values_at(values_ptr, first, pixel, there, channel, word, channels, words):
    """float32 ``[pixels, channels]`` of dense values, counts (uint8) or packed bits (int32), by the pointer's type.

    ``pixel`` counts from pixel ``first``, which has 64 bits, and is read where it is ``there``; ``word`` holds the
    words of ``channel``.
    """
    if values_ptr.dtype.element_ty == tl.int32:
        where = values_ptr + first * words + (pixel * words)[:, None] + word[None, :]
        bits = tl.load(where, mask=there[:, None] & (word < words)[None, :], other=0)
        bits = (bits[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        return tl.reshape(bits, (pixel.shape[0], channel.shape[0])).to(tl.float32)
    else:  # noqa: RET505
        where = values_ptr + first * channels + (pixel * channels)[:, None] + channel[None, :]
        return tl.load(where, mask=there[:, None] & (channel < channels)[None, :], other=0).to(tl.float32)


@triton.jit
def epilogue(x, scale_ptr, shift_ptr, residual_ptr, first, pixel, there, channel, word, channels, words):
    """``x * scale + shift + residual`` of ``[pixels, channels]``; what is ``None`` is left out."""
    known = channel < channels
    if scale_ptr is not None:
        x = x * tl.load(scale_ptr + channel, mask=known, other=0.0)[None, :]
    if shift_ptr is not None:
        x = x + tl.load(shift_ptr + channel, mask=known, other=0.0)[None, :]
    if residual_ptr is not None:
        x = x + values_at(residual_ptr, first, pixel, there, channel, word, channels, words)
    return x


@triton.jit
def _charged(v, syn, x, decay, gain_1, gain_2, gain_3, synapse_decay, rest, CHARGE: tl.constexpr):
    """Membrane and synaptic current after input ``x``."""
    if CHARGE == "INTEGRATE":
        h = v + x
    elif CHARGE == "LEAK_INPUT":
        h = v + tl.div_rn(x - (v - rest), tl.broadcast_to(decay, x.shape))
    elif CHARGE == "LEAK":
        h = v - tl.div_rn(v - rest, tl.broadcast_to(decay, x.shape)) + x
    elif CHARGE == "LEAK_INPUT_RATE":
        h = v + (x - (v - rest)) * decay
    elif CHARGE == "LEAK_RATE":
        h = v - (v - rest) * decay + x
    elif CHARGE == "DECAY":
        h = decay * v + x
    elif CHARGE == "DECAY_GAIN":
        h = x * gain_1 * gain_2 * gain_3 + decay * v
    else:
        tl.static_assert(CHARGE == "SYNAPTIC")
        syn = synapse_decay * syn + x
        h = decay * v + syn
    return h, syn


@triton.jit
def _fired(v, threshold, COMPARATOR: tl.constexpr):
    """1.0 where the membrane has reached the threshold."""
    if COMPARATOR == ">=":
        return (v >= threshold).to(tl.float32)
    else:  # noqa: RET505
        return (v > threshold).to(tl.float32)


@triton.jit
def neuron_step(
    v, syn, x, channel, known,
    threshold, decay, gain_1, gain_2, gain_3, synapse_decay, reset_value,
    CHARGE: tl.constexpr, COMPARATOR: tl.constexpr, RESET: tl.constexpr, TIMING: tl.constexpr,
):  # fmt: skip
    """One time step of ``[pixels, channels]`` neurons: spikes (0.0 or 1.0), membrane and synaptic current."""
    threshold = constant_of(threshold, channel, known)
    decay = constant_of(decay, channel, known)
    gain_1 = constant_of(gain_1, channel, known)
    gain_2 = constant_of(gain_2, channel, known)
    gain_3 = constant_of(gain_3, channel, known)
    synapse_decay = constant_of(synapse_decay, channel, known)
    reset_value = tl.to_tensor(reset_value)
    rest = tl.zeros_like(reset_value)
    late = tl.zeros_like(v)
    if TIMING != "SAME_STEP":
        late = _fired(v, threshold, COMPARATOR)
        if RESET == "HARD" and CHARGE == "DECAY":
            v = (1.0 - late) * v
    elif RESET == "HARD":
        rest = reset_value
    h, syn = _charged(v, syn, x, decay, gain_1, gain_2, gain_3, synapse_decay, rest, CHARGE)
    if TIMING != "SAME_STEP":
        if RESET == "SOFT":
            h = h - late * threshold
        elif RESET == "HARD" and CHARGE != "DECAY":
            h = h - late * h
    s = _fired(h, threshold, COMPARATOR)
    v = h
    if TIMING != "NEXT_STEP" and RESET == "SOFT":
        v = h - (s - late) * threshold
    elif TIMING == "SAME_STEP" and RESET == "HARD":
        v = s * reset_value + (1.0 - s) * h
    elif TIMING == "BOTH" and RESET == "HARD":
        v = h - (s - late) * h
    return s, v, syn


@triton.jit
def words_of(values, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """int32 ``[pixels, channels / 32]``: a bit for every value that is not zero."""
    place = (1 << (tl.arange(0, CHANNELS) % 32))[None, :]
    return tl.sum(tl.reshape(tl.where(values != 0, place, 0), (PIXELS, CHANNELS // 32, 32)), axis=2)


@triton.jit
def ones_of(words):
    """How many bits of every int32 word are set."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24) & 0xFF


@triton.jit
def count(nonzero_ptr, ones):
    """Add this program's nonzeros to the total: integers, so that the order does not matter."""
    tl.atomic_add(nonzero_ptr, ones.to(tl.int64), sem="relaxed")


def neuron_constants(neuron: Dynamics) -> dict[str, Any]:
    """What of a neuron kernels are compiled for."""
    return {
        "CHARGE": _charge(neuron)[0].name,
        "COMPARATOR": neuron.comparator,
        "RESET": neuron.reset.name,
        "TIMING": neuron.timing.name,
    }


def neuron_arguments(neuron: Dynamics) -> dict[str, Argument]:
    """What of a neuron kernels read at run time: numbers, or tensors of one number a channel."""
    first, second, third = neuron.input_gains
    return {
        "threshold": neuron.threshold,
        "decay": _charge(neuron)[1],
        "gain_1": first,
        "gain_2": second,
        "gain_3": third,
        "synapse_decay": neuron.synapse_decay,
        "reset_value": neuron.reset_value,
    }


def _charge(neuron: Dynamics) -> tuple[Charge, Argument]:
    """Charge and decay; a division by a power of two is the multiplication by its inverse, bit for bit, and cheaper."""
    decay = neuron.decay
    if neuron.charge in _RATES and not isinstance(decay, Tensor) and _is_power_of_two(decay):
        return _RATES[neuron.charge], 1.0 / decay
    return neuron.charge, decay


def _is_power_of_two(value: float) -> bool:
    """Whether it is one whose inverse float32 holds too."""
    return math.frexp(value)[0] == 0.5 and 2.0**-126 <= value <= 2.0**126


def epilogue_arguments(given: Epilogue) -> dict[str, Tensor | None]:
    """Scale, shift and residual as kernels read them."""
    residual = given.residual
    if isinstance(residual, PackedSpikes):
        residual = values_of(residual)
    return {
        "scale_ptr": None if given.scale is None else given.scale.contiguous(),
        "shift_ptr": None if given.shift is None else given.shift.contiguous(),
        "residual_ptr": None if residual is None else residual.contiguous(),
    }


def values_of(spikes: PackedSpikes) -> Tensor:
    """Counts where there are any, else the bits as int32."""
    return half_words(spikes.bits) if spikes.counts is None else spikes.counts


def half_words(bits: Tensor) -> Tensor:
    """The bits as int32, the lower half of every word first; a view."""
    return bits.view(torch.int32)


def state_arguments(state: State) -> dict[str, Argument]:
    """Membrane, synaptic current and what they start from."""
    return {
        "v_ptr": state.v,
        "syn_ptr": state.syn,
        "v_seq_ptr": state.v_seq,
        "start": float(state.start),
    }
