"""What nodes of a traced graph are: their shapes on the example, and the questions that fusion asks of them."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from sparseflow.frameworks import spikingjelly
from sparseflow.graph.isolation import copied, isolated

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_PRODUCTS = (operator.mul, operator.imul, torch.mul)
_CATS = (torch.cat, torch.concat, torch.concatenate)


@dataclasses.dataclass(frozen=True)
class ExampleValues:
    """What the nodes of a graph did on the example.

    Attributes:
        tensors: meta tensors with shape, strides and dtype of every tensor that a node makes.
        writers: nodes that write into a tensor which they are given.
        written: nodes whose tensor, or one that shares its memory, is written to where others may see it.
    """

    tensors: dict[fx.Node, torch.Tensor]
    writers: frozenset[fx.Node]
    written: frozenset[fx.Node]


class _Example(fx.Interpreter):
    """Runs a graph; notes the tensors it makes, which of them share memory, and who writes into it."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.tensors: dict[fx.Node, torch.Tensor] = {}
        self.writers: dict[fx.Node, set[int]] = {}
        self._sharing: dict[int, list[fx.Node]] = {}
        self._alive: dict[int, StorageWeakRef] = {}

    @override
    def run_node(self, n: fx.Node) -> Any:
        operands = _tensors(self.fetch_args_kwargs_from_env(n))
        before = [_version(tensor) for tensor in operands]
        value = super().run_node(n)
        written = [t for t, version in zip(operands, before, strict=True) if _version(t) != version]
        if written:
            self.writers[n] = {self._storage(tensor) for tensor in written}
        for tensor in _tensors(value):
            self._sharing.setdefault(self._storage(tensor), []).append(n)
        if isinstance(value, torch.Tensor):
            self.tensors[n] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return value

    def _storage(self, tensor: torch.Tensor) -> int:
        """Identity of the memory; the reference keeps it from being given to another tensor."""
        if tensor.layout is not torch.strided:
            return id(tensor)
        reference = StorageWeakRef(tensor.untyped_storage())
        return self._alive.setdefault(reference.cdata, reference).cdata

    def written(self) -> set[fx.Node]:
        """All nodes that share memory which is written to, unless it only ever goes from one node to the next."""
        found: set[fx.Node] = set()
        for node, storages in self.writers.items():
            for storage in storages:
                sharing = self._sharing.get(storage, [])
                earlier = sharing[: sharing.index(node)] if node in sharing else sharing
                alone = all(len(n.users) == 1 and n.op not in ("placeholder", "get_attr") for n in earlier)
                if not alone or not earlier:
                    found.update(sharing)
        return found


def example_values(
    model: nn.Module, graph: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ExampleValues:
    """What every node of ``graph``, made of ``model``, does on the example."""
    names = [node.target for node in graph.graph.nodes if node.op == "placeholder"]
    with torch.inference_mode(False), isolated(model):
        call_args, call_kwargs = copied((args, kwargs))
        example = _Example(graph)
        example.run(*call_args, *(call_kwargs[name] for name in names[len(call_args) :] if name in call_kwargs))
    return ExampleValues(example.tensors, frozenset(example.writers), frozenset(example.written()))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _version(tensor: torch.Tensor) -> int:
    """Number of writes; tensors made in inference mode do not count them."""
    return -1 if tensor.is_inference() else tensor._version


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


def foldable_norm(module: nn.Module | None) -> bool:
    """Whether ``module`` is a batch norm that scales and shifts by constants in eval mode."""
    if not isinstance(module, _BatchNorm) or "forward" in module.__dict__:
        return False
    plain = next((base for base in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) if isinstance(module, base)), None)
    if plain is None or module.running_mean is None or module.training:
        return False
    wrapper = spikingjelly.layer_class(plain.__name__)
    return type(module).forward is plain.forward or (wrapper is not None and type(module).forward is wrapper.forward)
