"""Checking a fused block, teacher-forced: what it returned against float64 sums of the very input it had."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseflow.graph.eligibility import layer_kind
from sparseflow.kernels.base import ConvCall, LinearCall
from sparseflow.kernels.blocks import reference
from sparseflow.kernels.blocks.records import Dynamics, Epilogue
from sparseflow.kernels.blocks.spikes import PackedSpikes, channels_last, unpack
from sparseflow.kernels.functional import conv_call
from sparseflow.kernels.reference import error_budget
from sparseflow.neuron import Charge

from .block import BlockRun
from .constants import kernel_weight

_ROUNDINGS = 8.0  # operations on a value between the layer's sums and the comparison with the threshold


def excess_of_block(
    block: BlockRun, source: Any, residual: Any, before: tuple[Any, ...], result: Any
) -> tuple[float, int]:
    """How far a block's result lies outside its error budget, in budgets (at most 1 is correct), and spike flips.

    Without a neuron the budget is that of the sums. With one, every spike that differs from those of the float64 sums
    must have had a membrane within the band around the threshold that the budgets of all its inputs so far add up to;
    behind the first flip of a neuron its state differs, and nothing more is compared.
    """
    epilogue = block.epilogue(residual)
    sums, budget = _sums(block, source)
    if block.block.repeated:
        sums, budget = sums.repeat(block.block.steps, 1, 1), budget.repeat(block.block.steps, 1, 1)
    currents = reference.affine(sums, _double(epilogue))
    scale = 1.0 if epilogue.scale is None else epilogue.scale.double().abs()
    band = budget * scale + _ROUNDINGS * torch.finfo(torch.float32).eps * _magnitude(sums * scale, currents)
    size, window = block.block.map_size, epilogue.window
    currents, band = reference.pooled(currents, size, window), reference.pooled(band, size, window)
    if block.dynamics is None:
        got = channels_last(result, len(block.block.layout.lead)).double()
        return float(((got - currents).abs() / band).max()), 0
    return _excess_of_spikes(block, block.dynamics, currents, band, before, result)


def _magnitude(*terms: Tensor) -> Tensor:
    largest = terms[0].abs()
    for term in terms[1:]:
        largest = torch.maximum(largest, term.abs())
    return largest + torch.finfo(torch.float32).tiny


def _sums(block: BlockRun, source: Any) -> tuple[Tensor, Tensor]:
    """Float64 sums ``[images, pixels, channels]`` of the block's layer, and the error that float32 may make."""
    if block.layer is None:
        sums = channels_last(source, source.dim() - 1 - len(block.block.layout.size)).double()
        return sums, torch.zeros_like(sums)
    if block.geometry is None or not isinstance(source, PackedSpikes):
        return _dense_layer(block, source)
    g, weight = block.geometry, kernel_weight(block.layer, block.geometry)
    x = unpack(source).reshape(source.images, source.channels, *source.size)
    pads = reference.padding_of(g)
    call = ConvCall(g.stride, ((0, 0),) * 3, g.dilation, g.groups)
    padded = F.pad(x, pads)
    budget = error_budget(padded, weight, None, call)
    return channels_last(call.dense(padded.double(), weight.double(), None), 1), channels_last(budget, 1)


def _dense_layer(block: BlockRun, source: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a layer on a dense tensor."""
    x, layer = block.images_of(source), block.layer
    weight = layer.weight.detach()
    if layer_kind(layer) == "linear":
        exact, budget = F.linear(x.double(), weight.double()), error_budget(x, weight, None, LinearCall())
        return exact.reshape(-1, 1, layer.out_features), budget.reshape(-1, 1, layer.out_features)
    call = conv_call(x.dim() - 2, weight, layer.stride, layer.padding, layer.dilation, layer.groups)
    exact = call.dense(x.double(), weight.double(), None)
    return channels_last(exact, 1), channels_last(error_budget(x, weight, None, call), 1)


def _double(epilogue: Epilogue) -> Epilogue:
    scale = None if epilogue.scale is None else epilogue.scale.double()
    shift = None if epilogue.shift is None else epilogue.shift.double()
    residual = epilogue.residual
    return Epilogue(scale, shift, residual.double() if isinstance(residual, Tensor) else residual)


def _excess_of_spikes(
    block: BlockRun, neuron: Dynamics, currents: Tensor, band: Tensor, before: tuple[Any, ...], result: PackedSpikes
) -> tuple[float, int]:
    steps = block.block.steps
    shape = (currents.shape[0] // steps, *currents.shape[1:])
    v, syn = _start(block, before, shape, currents)
    got = channels_last(unpack(result), len(result.lead)).double().unflatten(0, (steps, -1))
    reach, same = torch.zeros_like(v), torch.ones_like(v, dtype=torch.bool)
    worst, flips = 0.0, 0
    gain = _gain(neuron)
    for t, (x, x_band) in enumerate(
        zip(currents.unflatten(0, (steps, -1)), band.unflatten(0, (steps, -1)), strict=True)
    ):
        h, _, _ = reference.approached(neuron, v, syn, x)
        s, v, syn = reference.step(neuron, v, syn, x)
        reach = reach + gain * x_band + _ROUNDINGS * torch.finfo(torch.float32).eps * _magnitude(h, x)
        wrong = (s != got[t]) & same
        if bool(wrong.any()):
            distance = (h - neuron.threshold).abs() / reach
            worst, flips = max(worst, float(distance[wrong].max())), flips + int(wrong.sum())
            same &= ~wrong
    return worst, flips


def _start(block: BlockRun, before: tuple[Any, ...], shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    assert block.memory is not None
    memory, lead = block.memory, len(block.block.state_lead)

    def state(value: Any, otherwise: float) -> Tensor:
        if isinstance(value, Tensor) and value.shape == memory.shape:
            return channels_last(value, lead).to(like.dtype)
        return like.new_full(shape, value if isinstance(value, float) else otherwise)

    return state(before[0], memory.restart), state(before[1] if len(before) > 1 else 0.0, 0.0)


def _gain(neuron: Dynamics) -> float | Tensor:
    """How much of an error of the input reaches the membrane, at most, in one step."""
    if neuron.charge is Charge.DECAY_GAIN:
        g1, g2, g3 = neuron.input_gains
        return torch.as_tensor(g1).abs() * torch.as_tensor(g2).abs() * torch.as_tensor(g3).abs()
    return 1.0 / (1.0 - min(float(torch.as_tensor(neuron.synapse_decay).max()), 0.999)) if neuron.synaptic else 1.0
