"""What nodes of a traced graph are: their shapes on the example, and the questions that fusion asks of them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from sparseflow.frameworks import spikingjelly
from sparseflow.graph.isolation import copied, isolated

IN_PLACE = frozenset({operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem})
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_PRODUCTS = (operator.mul, operator.imul, torch.mul)
_CATS = (torch.cat, torch.concat, torch.concatenate)


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the tensors it makes."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[fx.Node, torch.Tensor] = {}

    @override
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.found[n] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return value


def example_values(
    model: nn.Module, graph: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[fx.Node, torch.Tensor]:
    """Meta tensors with shape, strides and dtype of every tensor that ``graph``, made of ``model``, computes."""
    names = [node.target for node in graph.graph.nodes if node.op == "placeholder"]
    with isolated(model):
        call_args, call_kwargs = copied((args, kwargs))
        shapes = _Shapes(graph)
        shapes.run(*call_args, *(call_kwargs[name] for name in names[len(call_args) :] if name in call_kwargs))
    return shapes.found


def is_addition(node: fx.Node) -> bool:
    """``a + b``, ``a += b``, ``a.add(b)`` of two nodes, without a factor."""
    named = node.op == "call_method" and node.target in ("add", "add_")
    plain = named or (node.op == "call_function" and node.target in _ADDITIONS)
    return plain and len(node.args) == 2 and not node.kwargs and all(isinstance(arg, fx.Node) for arg in node.args)


def product_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The factors of ``a * b``."""
    named = node.op == "call_method" and node.target in ("mul", "mul_")
    if not (named or (node.op == "call_function" and node.target in _PRODUCTS)) or node.kwargs:
        return None
    a, b = node.args
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None


def complement_of(node: fx.Node) -> fx.Node | None:
    """``x`` of ``1 - x``."""
    if node.op == "call_function" and node.target in (operator.sub, torch.sub) and not node.kwargs:
        one, x = node.args
    elif node.target in ("rsub", torch.rsub, "__rsub__") and not node.kwargs:
        x, one = node.args
    else:
        return None
    return x if isinstance(x, fx.Node) and type(one) in (int, float) and one == 1 else None


def concatenated(node: fx.Node) -> tuple[tuple[fx.Node, ...], int] | None:
    """Parts and dimension of a concatenation."""
    if node.op != "call_function" or node.target not in _CATS:
        return None
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if not isinstance(parts, (list, tuple)) or not isinstance(dim, int):
        return None
    found = tuple(part for part in parts if isinstance(part, fx.Node))
    return (found, dim) if len(found) == len(parts) else None


def is_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the node writes into its first argument."""
    if node.op == "call_function":
        return node.target in IN_PLACE
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    return getattr(module, "inplace", False) is True


def foldable_norm(module: nn.Module | None) -> bool:
    """Whether ``module`` is a batch norm that scales and shifts by constants in eval mode."""
    if not isinstance(module, _BatchNorm) or "forward" in module.__dict__:
        return False
    plain = next((base for base in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) if isinstance(module, base)), None)
    if plain is None or module.running_mean is None or module.training:
        return False
    wrapper = spikingjelly.layer_class(plain.__name__)
    return type(module).forward is plain.forward or (wrapper is not None and type(module).forward is wrapper.forward)
