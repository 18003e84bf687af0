"""Untrained networks that fire like trained ones: random weights, calibrated batch norm, thresholds set by layer.

Random weights alone give nets whose deeper layers are silent, on which every sparse kernel looks good.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

from sparseflow.frameworks import neuron_spec

from .nets import LIF_DENSITY

_BISECTIONS = 16


def fire_like_trained(net: nn.Module, x: Tensor, density: float = LIF_DENSITY) -> nn.Module:
    """Calibrate a multi-step SpikingJelly network on ``x [T, N, C, H, W]`` in one forward pass; gives it in eval mode.

    Batch norm takes the statistics of this pass, and every neuron the threshold at which it fires with probability
    ``density`` on the input it then gets.
    """
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the average over all batches, of which there is one
            module.reset_running_stats()
    nodes = [module for module in net.modules() if isinstance(module, neuron.BaseNode)]
    hooks = [node.register_forward_pre_hook(lambda node, args: _calibrate(node, args[0], density)) for node in nodes]
    functional.reset_net(net)
    with torch.no_grad():
        net.train()(x)
    for hook in hooks:
        hook.remove()
    functional.reset_net(net)
    return net.eval()


def _calibrate(node: Any, current: Tensor, density: float) -> None:
    low, high = 0.0, float(current.abs().max()) * current.shape[0]
    for _ in range(_BISECTIONS):
        node.v_threshold = (low + high) / 2
        node.reset()
        if node.forward(current).mean() > density:
            low = node.v_threshold
        else:
            high = node.v_threshold
    node.reset()


def fire_in_order(net: nn.Module, x: Tensor, density: float, reset: Callable[[nn.Module], object]) -> nn.Module:
    """The same for a network that calls its neurons step by step, of either framework and without batch norm.

    One neuron after the other, in order of definition, gets the threshold at which it fires with ``density`` over all
    steps of a call; a neuron that feeds itself changes its input by that, so that whole calls are bisected.
    """
    for module in [module for module in net.modules() if neuron_spec(module) is not None]:
        _give_threshold(module, math.inf)
        low, high = 0.0, sum(largest for largest, _ in _calls(net, module, x, reset))
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            _give_threshold(module, middle)
            rates = [rate for _, rate in _calls(net, module, x, reset)]
            low, high = (middle, high) if sum(rates) / len(rates) > density else (low, middle)
    reset(net)
    return net.eval()


def _give_threshold(module: Any, value: float) -> None:
    if isinstance(module, neuron.BaseNode):
        module.v_threshold = value
    else:
        module.threshold.fill_(value)


def _calls(
    net: nn.Module, module: nn.Module, x: Tensor, reset: Callable[[nn.Module], object]
) -> list[tuple[float, float]]:
    """Of every call of ``module`` in one of ``net``: the largest magnitude of its input, and its firing rate."""
    found = []

    def note(_module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        spikes = output[0] if isinstance(output, tuple) else output
        found.append((float(args[0].abs().max()), float(spikes.mean())))

    handle = module.register_forward_hook(note)
    reset(net)
    with torch.no_grad():
        net(x)
    handle.remove()
    return found
