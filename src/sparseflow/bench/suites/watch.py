"""What the neurons of a network do in one call: their spikes, membranes, and the sums they get.

Membranes at the end of the call and the readout are those of a call without hooks, which an accelerated network may
answer by running in another way. So are the spikes where all neurons are in fused blocks; else (``watched`` is
``"layers"``) they are those of a second call, with hooks.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparseflow.frameworks import neuron_spec, steps_over_time
from sparseflow.frameworks.registry import state_tensors
from sparseflow.kernels.blocks.spikes import unpack
from sparseflow.modules.fused.block import BlockRun
from sparseflow.modules.fused.model import fusion_of

from .baselines import Workload

Layers = dict[str, Tensor]


@dataclasses.dataclass
class Seen:
    """One network on one input.

    ``readout [N, C]`` and the membranes at the end ``[N, ...]`` are of a call without hooks, ``spikes [T, N, ...]`` of
    what ``watched`` says, and ``potentials`` are what was compared with the threshold, where that was asked for.
    """

    readout: Tensor
    ends: Layers
    spikes: Layers
    potentials: Layers
    watched: str


def neurons(net: nn.Module) -> dict[str, nn.Module]:
    """Every neuron by name."""
    return {name: module for name, module in net.named_modules() if neuron_spec(module) is not None}


@contextlib.contextmanager
def watching(net: nn.Module) -> Iterator[tuple[dict[str, list[Any]], dict[str, list[Any]]]]:
    """Input and output of every call of every neuron, in order of execution."""
    inputs, outputs = collections.defaultdict(list), collections.defaultdict(list)

    def record(name: str):
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            inputs[name].append(args[0])
            outputs[name].append(output)

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in neurons(net).items()]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def watching_blocks(net: nn.Module) -> Iterator[Layers]:
    """Spikes ``[T, N, ...]`` of the neurons in fused blocks, as the kernels hand them on; filled at the end.

    A recurrent neuron has a block for every step. Planning runs the blocks as well, and what counts is the last run.
    """
    spikes: Layers = {}
    found: dict[BlockRun, Tensor] = {}

    def record(block: BlockRun, _source: Any, _residual: Any, _before: Any, result: Any) -> None:
        if block.block.neuron is not None:
            sizes = result.shape[len(result.lead) :]
            found[block] = unpack(result).reshape(block.block.steps, -1, *sizes) != 0

    fusion = fusion_of(net)
    observers = [] if fusion is None else fusion.observers
    observers.append(record)
    try:
        yield spikes
    finally:
        observers.remove(record)
    planned = None if fusion is None or fusion.why is not None else fusion.last
    blocks = [] if planned is None or planned.program is None else planned.program.blocks
    parts: dict[str, list[Tensor]] = collections.defaultdict(list)
    for block in blocks:
        if block in found and block.block.neuron is not None:
            parts[block.block.neuron].append(found[block])
    spikes.update({name: torch.cat(steps) for name, steps in parts.items()})


def see(workload: Workload, net: nn.Module, x: Tensor, *, potentials: bool = False) -> Seen:
    """Run ``net`` on ``x``, and again with hooks on its neurons unless fused blocks have shown them all."""
    workload.reset(net)
    with watching_blocks(net) as spikes:
        readout = workload.readout(net(x)).double()
    ends = {name: _membrane(module) for name, module in neurons(net).items()}
    if spikes.keys() == ends.keys():
        return Seen(readout, ends, spikes, {}, "fused blocks")
    workload.reset(net)
    with watching(net) as (inputs, outputs):
        net(x)
    modules = neurons(net)
    fired = {name: [_spikes(call) for call in calls] for name, calls in outputs.items()}
    spikes = {name: _over_time(modules[name], calls) != 0 for name, calls in fired.items()}
    found = {name: _potentials(modules[name], inputs[name], outputs[name]) for name in outputs} if potentials else {}
    return Seen(readout, ends, spikes, found, "layers")


def _membrane(module: nn.Module) -> Tensor:
    """The first state of the neuron, as it was left; cloned, since a network may write into it."""
    return next(iter(state_tensors(module).values())).detach().double().clone()


def _spikes(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _over_time(neuron: nn.Module, calls: list[Tensor]) -> Tensor:
    """``[T, N, ...]`` of one call over all time steps or of one for each."""
    return calls[0] if steps_over_time(neuron) and len(calls) == 1 else torch.stack(calls)


def _potentials(module: nn.Module, inputs: list[Tensor], outputs: list[Any]) -> Tensor:
    """What was compared with the threshold. snnTorch returns it; in SpikingJelly it is what a neuron that never fires
    has as its membrane after a step."""
    if isinstance(outputs[0], tuple):
        return torch.stack([membrane for _, membrane in outputs]).double()
    node, silent = _single_step(module), _single_step(module)
    silent.v_threshold = math.inf
    found = []
    for current in _over_time(module, inputs):
        silent.v = node.v
        silent.forward(current)
        node.forward(current)
        found.append(silent.v.double())
    return torch.stack(found)


def _single_step(module: nn.Module) -> Any:
    node: Any = copy.deepcopy(module)
    node.reset()
    node.step_mode = "s"
    return node


def magnitudes(workload: Workload, net: nn.Module, x: Tensor, spikes: Layers) -> tuple[Layers, Tensor]:
    """Sums of the magnitudes of all terms of every neuron's input ``[T, N, ...]``, and of the readout ``[N, C]``.

    They are what a copy of ``net`` computes whose weights are positive, every layer fed with ``spikes``.
    """
    twin = copy.deepcopy(net)
    for module in twin.modules():
        _make_positive(module)
    workload.reset(twin)
    with _fed_with(twin, spikes) as inputs:
        readout = workload.readout(twin(x.abs()))
    modules = neurons(twin)
    return {name: _over_time(modules[name], calls) for name, calls in inputs.items()}, readout


def _make_positive(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data.abs_()
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
        module.running_mean.abs_().neg_()


@contextlib.contextmanager
def _fed_with(net: nn.Module, spikes: Layers) -> Iterator[dict[str, list[Tensor]]]:
    """Neurons give ``spikes``, whatever they get; yields what they got."""
    inputs = collections.defaultdict(list)

    def feed(name: str):
        steps = itertools.count()

        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
            inputs[name].append(args[0])
            given = spikes[name].to(args[0].dtype)
            given = given if args[0].shape == given.shape else given[next(steps)]
            return (given, *output[1:]) if isinstance(output, tuple) else given

        return hook

    handles = [module.register_forward_hook(feed(name)) for name, module in neurons(net).items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
