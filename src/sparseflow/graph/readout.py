"""The readout of many spiking networks, a linear layer averaged over time: it commutes with the average."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from sparseflow.graph.eligibility import layer_kind, refuse
from sparseflow.graph.values import ExampleValues

_REDUCTIONS = {"mean": torch.mean, "sum": torch.sum}


def average_first(model: nn.Module, graph: fx.GraphModule, values: ExampleValues, whole: Collection[str]) -> None:
    """Turn ``linear(x).mean(0)`` into ``linear(x.mean(0))``, and a sum over T into T times that, in place.

    Exact up to rounding, and T times less to compute. Left alone: layers whose output something else reads, too, and
    those in ``whole``.

    Args:
        model: whose modules ``graph`` calls.
        graph: traced, with time in the first dimension.
        values: what the nodes of ``graph`` did on the example.
        whole: names of modules that have to be called as they are.

    >>> from sparseflow.graph.tracer import trace
    >>> from sparseflow.graph.values import example_values
    >>> class Readout(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc = nn.Linear(4, 2)
    ...     def forward(self, x):
    ...         return self.fc(x).mean(0)
    >>> net, example = Readout(), (torch.zeros(3, 1, 4),)
    >>> graph = trace(net, example)
    >>> average_first(net, graph, example_values(net, graph, example, {}), ())
    >>> [node.target for node in graph.graph.nodes if node.op.startswith("call")]
    ['mean', 'fc']
    """
    for node in list(graph.graph.nodes):
        kind = _over_time(node)
        if kind is not None:
            _commute(model, graph.graph, node, kind, values, whole)
    graph.graph.lint()


def _over_time(node: fx.Node) -> str | None:
    """``"mean"`` or ``"sum"`` where ``node`` reduces the first dimension and nothing else."""
    for kind, function in _REDUCTIONS.items():
        named = node.op == "call_method" and node.target == kind
        if named or (node.op == "call_function" and node.target is function):
            dims = (*node.args[1:], *node.kwargs.values())
            plain = len(dims) == 1 and node.kwargs.keys() <= {"dim", "axis"}
            return kind if plain and dims[0] in (0, (0,), [0]) else None
    return None


def _commute(
    model: nn.Module,
    graph: fx.Graph,
    node: fx.Node,
    kind: str,
    values: ExampleValues,
    whole: Collection[str],
) -> None:
    found = _linear_behind(model, node.args[0], whole)
    if found is None:
        return
    linear, source = found
    x, y = values.tensors.get(source), values.tensors.get(node.args[0])  # type: ignore[arg-type]
    if x is None or y is None or x.dim() < 2 or x.shape[0] != y.shape[0] or source in values.written:
        return
    with graph.inserting_before(node):
        mean = graph.call_method("mean", (source, 0))
        result = graph.call_module(str(linear.target), (mean,))
        if kind == "sum":
            result = graph.call_method("mul", (result, x.shape[0]))
    node.replace_all_uses_with(result)
    for dead in (node, *_chain(node.args[0], source)):
        graph.erase_node(dead)


def _linear_behind(model: nn.Module, node: Any, whole: Collection[str]) -> tuple[fx.Node, fx.Node] | None:
    """The linear layer that makes ``node``, and what it reads over time; through the views of a batched loop."""
    if not isinstance(node, fx.Node) or len(node.users) > 1:
        return None
    batched = node.op == "call_method" and node.target == "unflatten" and node.args[1] == 0
    linear: Any = node.args[0] if batched else node
    if linear.op != "call_module" or linear.target in whole or len(linear.users) > 1 or len(linear.args) != 1:
        return None
    module = model.get_submodule(str(linear.target))
    if layer_kind(module) != "linear" or refuse(module) is not None:
        return None
    source: Any = linear.args[0]
    if not batched:
        return linear, source
    flat = source.op == "call_method" and source.target == "flatten" and source.args[1:] == (0, 1)
    return (linear, source.args[0]) if flat and len(source.users) == 1 else None


def _chain(node: Any, source: fx.Node) -> list[fx.Node]:
    """``node`` and everything between it and ``source``."""
    found = []
    while node is not source:
        found.append(node)
        node = node.args[0]
    return found
