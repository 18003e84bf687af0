"""The operations of fused blocks in plain PyTorch: what they mean, and what the tests compare kernels with.

Sums are taken in the dtype of the weight, so that a float64 weight makes the oracle; the neuron always runs in the
dtype of what it is given, one rounding an operation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseflow.kernels.geometry import ConvGeometry, Three
from sparseflow.neuron import Charge, Reset, ResetTiming

from .records import Dynamics, Epilogue, State, pooled_size
from .spikes import PackedSpikes, as_tensor, channels_last, pack, unpack


def sums(x: PackedSpikes, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """``[images, pixels, channels]`` of ``conv(x, weight)`` in the dtype of ``weight [O, C / groups, D, H, W]``."""
    dense = unpack(x, weight.dtype).reshape(x.images, x.channels, *x.size)
    padded = F.pad(dense, padding_of(geometry))
    y = F.conv3d(padded, weight, None, geometry.stride, 0, geometry.dilation, geometry.groups)
    return channels_last(y, 1)


def padding_of(geometry: ConvGeometry) -> list[int]:
    """Padding before and after, last dimension first; what is padded after follows from the output's size."""
    pads: list[int] = []
    for i in (2, 1, 0):
        reach = (geometry.out_size[i] - 1) * geometry.stride[i] + (geometry.kernel[i] - 1) * geometry.dilation[i] + 1
        pads += [geometry.padding[i], max(0, reach - geometry.padding[i] - geometry.in_size[i])]
    return pads


def affine(currents: Tensor, epilogue: Epilogue) -> Tensor:
    """``currents * scale + shift + residual``, each operation rounded."""
    x = currents
    if epilogue.scale is not None:
        x = x * epilogue.scale.to(x.dtype)
    if epilogue.shift is not None:
        x = x + epilogue.shift.to(x.dtype)
    if isinstance(epilogue.residual, PackedSpikes):
        x = x + channels_last(unpack(epilogue.residual, x.dtype), len(epilogue.residual.lead))
    elif epilogue.residual is not None:
        x = x + epilogue.residual.to(x.dtype)
    return x


def pooled(currents: Tensor, size: Three, window: Three | None) -> Tensor:
    """The maximum over windows ``(D, H, W)`` of ``currents [images, pixels, channels]``, maps of ``size``; floor mode.

    >>> pooled(torch.tensor([[[1.0], [3.0], [2.0], [5.0], [9.0]]]), (1, 1, 5), (1, 1, 2)).flatten().tolist()
    [3.0, 5.0]
    """
    if window is None:
        return currents
    maps = as_tensor(currents, (currents.shape[0], currents.shape[2], *size), 1)
    if size[0] == 1:  # what PyTorch has faster kernels for
        return channels_last(F.max_pool2d(maps.squeeze(2), window[1:]), 1)
    return channels_last(F.max_pool3d(maps, window), 1)


def charged(neuron: Dynamics, v: Tensor, syn: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Membrane and synaptic current after input ``x``."""
    r = neuron.reset_value if neuron.reset is Reset.HARD and neuron.timing is ResetTiming.SAME_STEP else 0.0
    d = neuron.decay
    match neuron.charge:
        case Charge.INTEGRATE:
            return v + x, syn
        case Charge.LEAK_INPUT:
            return v + (x - (v - r)) / d, syn
        case Charge.LEAK:
            return v - (v - r) / d + x, syn
        case Charge.LEAK_INPUT_RATE:
            return v + (x - (v - r)) * d, syn
        case Charge.LEAK_RATE:
            return v - (v - r) * d + x, syn
        case Charge.DECAY:
            return d * v + x, syn
        case Charge.DECAY_GAIN:
            g1, g2, g3 = neuron.input_gains
            return x * g1 * g2 * g3 + d * v, syn
        case Charge.SYNAPTIC:
            syn = neuron.synapse_decay * syn + x
            return d * v + syn, syn


def fired(neuron: Dynamics, v: Tensor) -> Tensor:
    """1 where the membrane has reached the threshold."""
    return (v >= neuron.threshold if neuron.comparator == ">=" else v > neuron.threshold).to(v.dtype)


def approached(neuron: Dynamics, v: Tensor, syn: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The membrane that is compared with the threshold, the synaptic current, and where a late reset acted."""
    same, hard = neuron.timing is ResetTiming.SAME_STEP, neuron.reset is Reset.HARD
    late = torch.zeros_like(v) if same else fired(neuron, v)
    if not same and hard and neuron.charge is Charge.DECAY:
        v = (1 - late) * v
    h, syn = charged(neuron, v, syn, x)
    if not same and neuron.reset is Reset.SOFT:
        h = h - late * neuron.threshold
    elif not same and hard and neuron.charge is not Charge.DECAY:
        h = h - late * h
    return h, syn, late


def step(neuron: Dynamics, v: Tensor, syn: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One time step: spikes, membrane and synaptic current."""
    h, syn, late = approached(neuron, v, syn, x)
    s = fired(neuron, h)
    if neuron.timing is ResetTiming.NEXT_STEP or neuron.reset is Reset.NONE:
        return s, h, syn
    due = s - late
    if neuron.reset is Reset.SOFT:
        return s, h - due * neuron.threshold, syn
    if neuron.timing is ResetTiming.SAME_STEP:
        return s, s * neuron.reset_value + (1 - s) * h, syn
    return s, h - due * h, syn


def run_neuron(currents: Tensor, neuron: Dynamics, state: State, steps: int) -> Tensor:
    """Spikes ``[T, N, pixels, channels]`` of input ``[images, pixels, channels]``; ``state`` is overwritten."""
    x_seq = currents.unflatten(0, (steps, -1))
    v = torch.full_like(x_seq[0], state.start) if state.fresh else state.v.to(currents.dtype)
    known = state.syn is not None and not state.fresh
    syn = state.syn.to(currents.dtype) if known and state.syn is not None else torch.zeros_like(v)
    spikes = []
    for t, x in enumerate(x_seq):
        s, v, syn = step(neuron, v, syn, x)
        spikes.append(s)
        if state.v_seq is not None:
            state.v_seq[t] = v
    state.v.copy_(v)
    if state.syn is not None:
        state.syn.copy_(syn)
    return torch.stack(spikes)


def conv(
    x: PackedSpikes,
    weight: Tensor,
    geometry: ConvGeometry,
    epilogue: Epilogue,
    neuron: Dynamics | None,
    state: State | None,
    steps: int,
) -> PackedSpikes | Tensor:
    """What :meth:`~.records.BlockOps.conv` computes, from the plain ``weight``."""
    currents = affine(sums(x, weight, geometry), epilogue)
    if neuron is None or state is None:
        return currents
    spikes = run_neuron(pooled(currents, geometry.out_size, epilogue.window), neuron, state, steps)
    return packed_like(spikes, pooled_size(geometry.out_size, epilogue.window), x.dims)


def packed_like(spikes: Tensor, size: tuple[int, int, int], dims: int) -> PackedSpikes:
    """Packed spikes from a dense ``[T, N, pixels, channels]``."""
    t, n, _, channels = spikes.shape
    shape = (t, n, channels, *size[3 - dims :])
    return pack(as_tensor(spikes.contiguous(), shape, 2), 2)
