"""Untrained networks that fire like trained ones: random weights, calibrated batch norm, thresholds set by layer.

Random weights alone give nets whose deeper layers are silent, on which every sparse kernel looks good.
"""

from __future__ import annotations

import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

LIF_DENSITY = 0.08  # trained spiking ResNets: 4 % to 12 % by layer
IF_DENSITY = 0.32  # a trained SEW ResNet with IF neurons, whose layers also add spikes up
_BISECTIONS = 16


def activity(density: float = LIF_DENSITY) -> str:
    """What a table says of a stand-in.

    >>> activity(0.32)
    "random weights, every layer's threshold set so that 32% of it fire"
    """
    return f"random weights, every layer's threshold set so that {density:.0%} of it fire"


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
    hooks = [
        node.register_forward_pre_hook(lambda node, args: _set_threshold(node, args[0], density)) for node in nodes
    ]
    functional.reset_net(net)
    with torch.no_grad():
        net.train()(x)
    for hook in hooks:
        hook.remove()
    functional.reset_net(net)
    return net.eval()


def _set_threshold(node: neuron.BaseNode, current: Tensor, density: float) -> None:
    low, high = 0.0, float(current.abs().max()) * current.shape[0]
    for _ in range(_BISECTIONS):
        node.v_threshold = (low + high) / 2
        node.reset()
        if node.forward(current).mean() > density:
            low = node.v_threshold
        else:
            high = node.v_threshold
    node.reset()
