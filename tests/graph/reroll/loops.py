"""Networks with loops, and the comparison of a re-rolled graph with the loop it came from."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import nn

from sparseflow.frameworks import state_tensors
from sparseflow.graph import trace
from sparseflow.graph.reroll import reroll
from sparseflow.graph.timeops import neuron_sequence

T, N = 5, 2


class Lif(nn.Module):
    """Keeps its state in itself, as SpikingJelly's neurons do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("v", torch.zeros(0))

    def forward(self, x):
        v = 0.5 * self.v + x if self.v.shape == x.shape else x
        spike = (v >= 0.5).to(x.dtype)
        self.v = v - spike * 0.5
        return spike


class Passing(nn.Module):
    """Takes and returns its state, as snnTorch's neurons do."""

    def forward(self, x, mem=None):
        mem = x if mem is None else 0.5 * mem + x
        spike = (mem > 0.5).to(x.dtype)
        return spike, mem - spike * 0.5


def leaves(value):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def states(net):
    return {f"{name}.{key}": v for name, m in net.named_modules() for key, v in state_tensors(m).items()}


def rolled(net, x):
    """The re-rolled graph of ``net``, after comparing it with the loop on the example, other data and another N."""
    graph = reroll(trace(net, (x,)), (x,))
    if graph is None:
        return None
    start = states(net)
    for scale in (1.0, 0.4):
        reference = copy.deepcopy(net)
        data = x * scale
        with torch.no_grad():
            for call in range(2):
                expected, actual = (leaves(seeded(call, callee, data.clone())) for callee in (reference, graph))
                compare(expected, actual)
                compare(list(states(reference).values()), list(states(net).values()))
        restore(net, start)
    return graph


def seeded(seed, callee, *args):
    torch.manual_seed(seed)
    return callee(*args)


def restore(net, before):
    for name, module in net.named_modules():
        for key in state_tensors(module):
            setattr(module, key, before.get(f"{name}.{key}", torch.zeros(0)))


def compare(expected, actual):
    assert len(expected) == len(actual)
    for a, b in zip(expected, actual, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def calls(graph):
    return Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_module")


def sequences(graph):
    return [str(n.args[0].target) for n in graph.graph.nodes if n.target is neuron_sequence]


def count(graph, target):
    return sum(node.target == target for node in graph.graph.nodes)


def layers():
    return {"fc1": nn.Linear(4, 6), "sn1": Lif(), "fc2": nn.Linear(6, 3), "sn2": Lif()}
