"""A linear layer averaged over time is computed once, on the average."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparseflow.graph.readout import average_first
from sparseflow.graph.reroll import reroll
from sparseflow.graph.tracer import trace
from sparseflow.graph.values import example_values

T, N, K = 5, 3, 7


class Readout(nn.Module):
    def __init__(self, reduce, bias=True, again=False):
        super().__init__()
        self.fc = nn.Linear(K, 2, bias=bias)
        self.reduce, self.again = reduce, again

    def forward(self, x):
        y = self.fc(x)
        return (self.reduce(y), y) if self.again else self.reduce(y)


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(K, 2)

    def forward(self, x):
        return torch.stack([self.fc(x[t]) for t in range(T)]).sum(0)


def rewritten(model, x, whole=()):
    graph = trace(model, (x,))
    graph = reroll(graph, (x,)) or graph
    average_first(model, graph, example_values(model, graph, (x,), {}), whole)
    graph.recompile()
    return graph


def layer_input(graph):
    """The node that the linear layer reads."""
    return next(node for node in graph.graph.nodes if node.op == "call_module").args[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "reduce", [lambda y: y.mean(0), lambda y: y.mean(dim=0), lambda y: torch.sum(y, 0), lambda y: y.sum((0,))]
)
def test_mean_and_sum_over_time_come_first(reduce, bias):
    model, x = Readout(reduce, bias), torch.rand(T, N, K)
    graph = rewritten(model, x)
    assert layer_input(graph).target == "mean"
    torch.testing.assert_close(graph(x), model(x))


def test_a_batched_loop():
    model, x = Loop(), torch.rand(T, N, K)
    graph = rewritten(model, x)
    assert layer_input(graph).target == "mean"
    torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize(
    "model",
    [
        Readout(lambda y: y.mean(1)),
        Readout(lambda y: y.mean((0, 1))),
        Readout(lambda y: y.mean(0, keepdim=True)),
        Readout(lambda y: y.mean(0), again=True),
    ],
)
def test_other_reductions_and_shared_outputs_are_left_alone(model):
    x = torch.rand(T, N, K)
    graph = rewritten(model, x)
    assert layer_input(graph).op == "placeholder"


def test_a_hooked_layer_is_left_alone():
    model, x = Readout(lambda y: y.mean(0)), torch.rand(T, N, K)
    assert layer_input(rewritten(model, x, whole=("fc",))).op == "placeholder"
