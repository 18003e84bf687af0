"""What running the example shows of every node: values, storages, writes and random numbers.

Shapes decide what can be batched, and storages tell which tensors are views of one another, which a graph does not say.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map

from sparseflow.graph.isolation import copied, isolated
from sparseflow.graph.timeops import sample_rank
from sparseflow.graph.tracer import call_state_method


@dataclasses.dataclass(frozen=True)
class ExampleTensor:
    """A tensor that a node had on the example; ``storage`` tells which of them are views of one another."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int

    def on_meta(self) -> torch.Tensor:
        """A tensor like this one, without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class ExampleRun(fx.Interpreter):
    """Runs a graph and notes values, writes into tensors, and use of random numbers.

    Attributes:
        unrolled: the graph that was run.
        values: what each node returned, with an :class:`ExampleTensor` for every tensor.
        writes: storages that a node wrote into.
        random: nodes that drew random numbers.
        hidden_writes: storages that were written into by a module which was not given them.
        writes_state: whether a node wrote into parameters or state of a module.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.unrolled = graph
        self.values: dict[fx.Node, Any] = {}
        self.writes: dict[fx.Node, set[int]] = {}
        self.random: set[fx.Node] = set()
        self.hidden_writes: set[int] = set()
        self.writes_state = False
        self._exposed: set[int] = set()
        self._versions: dict[int, int] = {}
        self._alive: dict[int, StorageWeakRef] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run ``n`` and note what it did."""
        operands = tensors(self.fetch_args_kwargs_from_env(n))
        for tensor in operands:
            self._check(tensor)
        before, generators = [t._version for t in operands], _generators()
        result = super().run_node(n)
        if not all(map(torch.equal, generators, _generators())):
            self.random.add(n)
        written = [t for t, version in zip(operands, before, strict=True) if t._version != version]
        if _may_keep(self.unrolled, n):
            self._exposed.update(self._key(tensor) for tensor in (*operands, *tensors(result)))
        if written:
            self._note_write(n, written)
        for tensor in tensors(result):
            self._check(tensor)
        self.values[n] = tree_map(lambda leaf: self._noted(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)
        return result

    def _note_write(self, node: fx.Node, written: list[torch.Tensor]) -> None:
        self.writes[node] = {self._key(tensor) for tensor in written}
        self._versions.update((self._key(tensor), tensor._version) for tensor in written)
        if not self._exposed.isdisjoint(self.writes[node]):
            held = {self._key(tensor) for tensor in _held_tensors(self.unrolled)}
            self.writes_state |= not held.isdisjoint(self.writes[node])

    def _check(self, tensor: torch.Tensor) -> None:
        """A version that no node made comes from a module that writes into what it has returned."""
        key = self._key(tensor)
        if self._versions.setdefault(key, tensor._version) != tensor._version:
            self.hidden_writes.add(key)

    def _noted(self, tensor: torch.Tensor) -> ExampleTensor:
        return ExampleTensor(tuple(tensor.shape), tensor.dtype, self._key(tensor))

    def _key(self, tensor: torch.Tensor) -> int:
        """Identity of the storage; the reference keeps it from being given to another one."""
        reference = StorageWeakRef(tensor.untyped_storage())
        return self._alive.setdefault(reference.cdata, reference).cdata


def run_example(graph: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExampleRun | None:
    """``None`` when the graph writes into parameters or state, whose order with everything else is not followed."""
    bound = inspect.signature(graph.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    run = ExampleRun(graph)
    try:
        with torch.inference_mode(False), isolated(graph):
            run.run(*copied(tuple(bound.arguments.values())))
    except (RuntimeError, NotImplementedError):  # tensors without storage or version: sparse, nested, inference
        return None
    return None if run.writes_state else run


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors in a structure, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storages(value: Any) -> set[int]:
    """Storages of the tensors in a value of an :class:`ExampleRun`."""
    return {leaf.storage for leaf in tree_leaves(value) if isinstance(leaf, ExampleTensor)}


def _generators() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def _may_keep(graph: nn.Module, node: fx.Node) -> bool:
    """Whether a module may still hold a tensor that ``node`` took or returned."""
    stateless = node.op == "call_module" and sample_rank(graph.get_submodule(str(node.target))) is not None
    return not stateless and (node.op in ("call_module", "get_attr") or node.target is call_state_method)


def _held_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        for value in module.__dict__.values():
            items = value.values() if isinstance(value, dict) else (value,)
            yield from (item for item in items if isinstance(item, torch.Tensor))
