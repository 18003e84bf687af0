"""What a node calls and what it is given: the questions that every stage asks of an ``fx.Node``."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from sparseflow.graph.provenance import op_name
from sparseflow.graph.tracer import call_state_method

_SHAPE_QUERIES = frozenset({"shape", "dtype", "device", "size"})


def operation(node: fx.Node) -> str:
    """Name of the operation; functions, methods and operators share one.

    Example:
        >>> graph = fx.Graph()
        >>> x = graph.placeholder("x")
        >>> operation(graph.call_function(operator.add, (x, 1))), operation(graph.call_method("add", (x, 1)))
        ('add', 'add')
    """
    target = getattr(torch.Tensor, node.target, node.target) if isinstance(node.target, str) else node.target
    return str(target) if isinstance(target, str) else op_name(target)


def called_module(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that ``node`` calls, or whose state method it calls."""
    if node.op == "call_module":
        return graph.get_submodule(str(node.target))
    if node.target is call_state_method:
        (owner, *_) = node.all_input_nodes
        return graph.get_submodule(str(owner.target))
    return None


def is_item(user: Any, node: fx.Node, index: int) -> bool:
    """Whether ``user`` is ``node[index]``."""
    return isinstance(user, fx.Node) and user.target is operator.getitem and user.args == (node, index)


def is_shape_query(node: fx.Node) -> bool:
    """Whether ``node`` asks for shape, type or device, which are the same at every step."""
    name = node.args[1] if node.target is getattr else node.target
    return isinstance(name, str) and name in _SHAPE_QUERIES


def paired(function: Callable[[fx.Node, fx.Node], Any], first: Any, second: Any) -> Any:
    """Two like structures of arguments as one, with ``function`` applied to each pair of nodes."""
    if isinstance(first, fx.Node):
        return function(first, second)
    if isinstance(first, (tuple, list)):
        return type(first)(paired(function, a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, dict):
        return {key: paired(function, first[key], second[key]) for key in first}
    if isinstance(first, slice):
        return slice(*(paired(function, getattr(first, p), getattr(second, p)) for p in ("start", "stop", "step")))
    return first


def frozen(arguments: Any) -> Any:
    """A hashable form of a structure; numbers keep their type.

    Example:
        >>> frozen([1, {"dim": slice(0, 2)}]) == frozen([1.0, {"dim": slice(0, 2)}])
        False
    """
    if isinstance(arguments, (tuple, list)):
        return tuple(map(frozen, arguments))
    if isinstance(arguments, dict):
        return tuple((key, frozen(value)) for key, value in sorted(arguments.items()))
    if isinstance(arguments, slice):
        return "slice", frozen((arguments.start, arguments.stop, arguments.step))
    return type(arguments), arguments
