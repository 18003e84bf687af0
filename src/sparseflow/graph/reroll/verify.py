"""The last word on a batched graph: it is only used if it does on the example, twice in a row, what the loop does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from sparseflow.frameworks import is_time_leaf, state_tensors
from sparseflow.graph.isolation import copied, isolated
from sparseflow.graph.reroll.example import tensors


def equivalent(graph: fx.GraphModule, rolled: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether both do the same on the example, twice in a row.

    A layer rounds differently on a larger batch, and a spike on the edge may then flip: in that case float64 decides.
    """
    if _same_effects(graph, rolled, args, kwargs):
        return True
    try:
        graph, rolled = copy.deepcopy((graph, rolled))
        for module in graph.double().modules():
            if is_time_leaf(module):
                module.forward = _returning_double(module.forward)
        double_args, double_kwargs = tree_map(_as_double, (args, kwargs))
        return _same_effects(graph, rolled, double_args, double_kwargs)
    except (RuntimeError, TypeError, NotImplementedError):  # a model that cannot be copied or is tied to its type
        return False


def _returning_double(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Surrogate functions return float32 whatever they are given."""
    return lambda *args, **kwargs: tree_map(_as_double, forward(*args, **kwargs))


def _as_double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf


def _same_effects(graph: fx.GraphModule, rolled: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    expected, actual = (_two_calls(graph, callee, args, kwargs) for callee in (graph, rolled))
    return len(expected) == len(actual) and all(map(_close, expected, actual))


def _two_calls(
    graph: fx.GraphModule, callee: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[torch.Tensor]:
    """Tensors that two calls return, and those that they leave in the modules."""
    seen: list[torch.Tensor] = []
    with isolated(graph):
        for _ in range(2):
            call_args, call_kwargs = copied((args, kwargs))
            seen += copied(tensors(callee(*call_args, **call_kwargs)))
            states = (tensor for module in graph.modules() for tensor in state_tensors(module).values())
            seen += [tensor.detach().clone() for tensor in states]
    return seen


def _close(expected: torch.Tensor, actual: torch.Tensor) -> bool:
    """Equal up to the rounding of a sum of terms as large as the largest value."""
    if expected.shape != actual.shape or expected.dtype is not actual.dtype:
        return False
    if not expected.is_floating_point() or expected.numel() == 0:
        return torch.equal(expected, actual)
    rounding = 64 * torch.finfo(expected.dtype).eps
    scale = float(expected.nan_to_num().abs().max())
    return torch.allclose(expected, actual, rtol=rounding, atol=rounding * scale, equal_nan=True)
