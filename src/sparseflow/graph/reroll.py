"""Batching over time: a graph in which a loop over T was written out, with each layer called once for all steps.

Tracing a forward that loops over time gives T copies of its body. Here the copies of one operation become a *group*:
operations that treat samples alone run once on ``[T * N, ...]``, neurons run as :func:`neuron_sequence`, and what is
the same at every step runs once. Whatever depends on its own past through more than a neuron's state stays as it was.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import inspect
import itertools
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map

from sparseflow.frameworks import is_time_leaf, state_tensors
from sparseflow.graph.isolation import copied, isolated
from sparseflow.graph.provenance import op_name
from sparseflow.graph.timeops import (
    Operand,
    Recipe,
    StepCall,
    function_recipe,
    is_known_function,
    module_recipe,
    neuron_sequence,
    sample_rank,
)
from sparseflow.graph.tracer import call_state_method

_SHAPE_QUERIES = frozenset({"shape", "dtype", "device", "size"})
_FACTORIES = frozenset({"zeros_like", "ones_like"})
_PROCESS_WIDE = frozenset({"reset_hidden", "detach_hidden"})
_SUMS = frozenset({"add"})


def reroll(graph: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.GraphModule | None:
    """Compute layers without feedback once over all time steps of a traced loop.

    The new graph shares the modules of ``graph`` and leaves their state as ``graph`` does. T is that of the example;
    N stays free. A graph is only returned after both have been called twice on the example with equal results.

    The nodes of the new graph, besides those that were there:

    - layers and functions on flat ``[T * N, ...]``, with ``flatten(0, 1)`` and ``unflatten(0, (T, -1))`` where a
      sequence ``[T, N, ...]`` ends or begins; elementwise ones on either;
    - ``neuron_sequence(get_attr module, x_seq, *initial_states)``, and ``getitem`` of what it returns;
    - ``x.unsqueeze(0).expand(T, ...)`` before a neuron whose input is the same at every step;
    - ``seq[t]`` and ``torch.stack`` between what is batched and what is not;
    - ``seq.movedim(0, dim)`` for a ``torch.stack`` along another dimension, ``seq.sum(0)`` for a sum over the steps.

    Args:
        graph: made by :func:`sparseflow.graph.trace`; it is not changed.
        args, kwargs: the example that it was traced with.

    Returns:
        The batched graph, or ``None`` when no layer and no neuron of ``graph`` can be batched.

    Example:
        >>> from sparseflow.graph.tracer import trace
        >>> class Loop(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = nn.Linear(4, 2)
        ...     def forward(self, x):
        ...         return sum(self.fc(x[t]) for t in range(len(x)))
        >>> example = (torch.rand(3, 1, 4),)
        >>> rolled = reroll(trace(Loop(), example), example)
        >>> [node.target for node in rolled.graph.nodes if node.op.startswith("call")]
        ['flatten', 'fc', 'unflatten', 'sum']
    """
    kwargs = kwargs or {}
    unrolled = fx.GraphModule(graph, copy.deepcopy(graph.graph), type(graph).__name__)
    run = _run_example(unrolled, args, kwargs)
    if run is None:
        return None
    groups = _Grouping(unrolled, run, _Effects(unrolled, run, _remove_writes(unrolled.graph, run)))
    if not groups.find():
        return None
    try:
        rolled = fx.GraphModule(graph, _Writer(unrolled, groups).write(), type(graph).__name__)
    except _CircularError:
        return None
    rolled.graph.lint()
    return rolled if _equivalent(graph, rolled, args, kwargs) else None


# --- What the example shows ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor that a node had on the example; ``storage`` tells which of them are views of one another."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int

    def on_meta(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class _Example(fx.Interpreter):
    """Runs a graph and notes values, writes into tensors, and use of random numbers."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.values: dict[fx.Node, Any] = {}
        self.writes: dict[fx.Node, set[int]] = {}
        self.random: set[fx.Node] = set()
        self.hidden_writes: set[int] = set()
        self.writes_state = False
        self._exposed: set[int] = set()
        self._versions: dict[int, int] = {}
        self._alive: dict[int, StorageWeakRef] = {}

    def run_node(self, n: fx.Node) -> Any:
        operands = _tensors(self.fetch_args_kwargs_from_env(n))
        for tensor in operands:
            self._check(tensor)
        before, generators = [t._version for t in operands], _generators()
        result = super().run_node(n)
        if not all(map(torch.equal, generators, _generators())):
            self.random.add(n)
        written = [t for t, version in zip(operands, before, strict=True) if t._version != version]
        if _may_keep(self.module, n):
            self._exposed.update(self._key(tensor) for tensor in (*operands, *_tensors(result)))
        if written:
            self._note_write(n, written)
        for tensor in _tensors(result):
            self._check(tensor)
        self.values[n] = tree_map(lambda leaf: self._noted(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)
        return result

    def _note_write(self, node: fx.Node, written: list[torch.Tensor]) -> None:
        self.writes[node] = {self._key(tensor) for tensor in written}
        self._versions.update((self._key(tensor), tensor._version) for tensor in written)
        if not self._exposed.isdisjoint(self.writes[node]):
            held = {self._key(tensor) for tensor in _held_tensors(self.module)}
            self.writes_state |= not held.isdisjoint(self.writes[node])

    def _check(self, tensor: torch.Tensor) -> None:
        """A version that no node made comes from a module that writes into what it has returned."""
        key = self._key(tensor)
        if self._versions.setdefault(key, tensor._version) != tensor._version:
            self.hidden_writes.add(key)

    def _noted(self, tensor: torch.Tensor) -> _Tensor:
        return _Tensor(tuple(tensor.shape), tensor.dtype, self._key(tensor))

    def _key(self, tensor: torch.Tensor) -> int:
        """Identity of the storage; the reference keeps it from being given to another one."""
        reference = StorageWeakRef(tensor.untyped_storage())
        return self._alive.setdefault(reference.cdata, reference).cdata


def _run_example(graph: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Example | None:
    """``None`` when the graph writes into parameters or state, whose order with everything else is not followed."""
    bound = inspect.signature(graph.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    example = _Example(graph)
    try:
        with torch.inference_mode(False), isolated(graph):
            example.run(*copied(tuple(bound.arguments.values())))
    except (RuntimeError, NotImplementedError):  # tensors without storage or version: sparse, nested, inference
        return None
    return None if example.writes_state else example


def _generators() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _may_keep(graph: nn.Module, node: fx.Node) -> bool:
    """Whether a module may still hold a tensor that ``node`` took or returned."""
    stateless = node.op == "call_module" and sample_rank(graph.get_submodule(str(node.target))) is not None
    return not stateless and (node.op in ("call_module", "get_attr") or node.target is call_state_method)


def _held_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        for value in module.__dict__.values():
            items = value.values() if isinstance(value, dict) else (value,)
            yield from (item for item in items if isinstance(item, torch.Tensor))


def _storages(value: Any) -> set[int]:
    return {leaf.storage for leaf in tree_leaves(value) if isinstance(leaf, _Tensor)}


# --- Writing in place ------------------------------------------------------------------------------------------------

_IN_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
}


def _remove_writes(graph: fx.Graph, run: _Example) -> set[int]:
    """Turn ``x += y`` into ``x + y`` where nobody sees the difference; returns storages for which that is not so."""
    position = {node: index for index, node in enumerate(graph.nodes)}
    views: dict[int, list[fx.Node]] = {}
    for node, value in run.values.items():
        for storage in _storages(value):
            views.setdefault(storage, []).append(node)
    inputs = {storage for node in graph.find_nodes(op="placeholder") for storage in _storages(run.values[node])}
    pinned = run.hidden_writes | (inputs & set().union(*run.writes.values()))
    for node, written in run.writes.items():
        hidden = len(written) == 1 and _functional(node, run) and _is_last_sight(node, views[min(written)], position)
        if not hidden:
            pinned |= written
    for node, written in run.writes.items():
        form = _functional(node, run)
        if form is not None and written.isdisjoint(pinned):
            node.target, node.kwargs = form
    return pinned


def _functional(node: fx.Node, run: _Example) -> tuple[Any, dict[str, Any]] | None:
    """Target and keyword arguments of the operation that returns what ``node`` writes."""
    if node.op == "call_module":
        known = sample_rank(run.module.get_submodule(str(node.target))) is not None
        return (node.target, node.kwargs) if known else None
    if node.kwargs.get("inplace") is True:
        return node.target, {**node.kwargs, "inplace": False}
    target = _IN_PLACE.get(node.target)
    if isinstance(node.target, str) and node.target.endswith("_") and is_known_function(node.target.rstrip("_")):
        target = node.target.rstrip("_")
    return (target, node.kwargs) if target is not None and _same_on_meta(node, target, run) else None


def _same_on_meta(node: fx.Node, target: Any, run: _Example) -> bool:
    """Whether the result is what ``node`` returned also in shape and type, which writing in place does not change."""

    def value(leaf: fx.Node) -> Any:
        return tree_map(lambda v: v.on_meta() if isinstance(v, _Tensor) else v, run.values[leaf])

    args, kwargs = _mapped(node.args, value), _mapped(node.kwargs, value)
    try:
        result = getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)
    except (RuntimeError, TypeError):
        return False
    expected = run.values[node]
    return isinstance(expected, _Tensor) and (tuple(result.shape), result.dtype) == (expected.shape, expected.dtype)


def _is_last_sight(node: fx.Node, views: list[fx.Node], position: dict[fx.Node, int]) -> bool:
    """Whether of the ``views`` of what ``node`` writes none is read afterwards, other than the result."""
    earlier = [view for view in views if position[view] < position[node]]
    users = {user for view in earlier for user in view.users}
    if node.op == "call_module":  # still writes, maybe before those that read earlier
        return users <= {*earlier, node}
    return all(position[user] <= position[node] for user in users)


# --- Order of what has effects ---------------------------------------------------------------------------------------


class _Effects:
    """Nodes whose order counts: calls of modules with state, random numbers, and views of tensors written into.

    ``before`` and ``after`` hold the direct neighbours in that order.
    """

    def __init__(self, graph: fx.GraphModule, run: _Example, pinned: set[int]) -> None:
        self.before: dict[fx.Node, set[fx.Node]] = {}
        self.after: dict[fx.Node, set[fx.Node]] = {}
        self.timelines: dict[nn.Module, list[fx.Node]] = {}
        self.random = run.random
        self.overwritten = set().union(*(written for n, written in run.writes.items() if n.op == "call_module"))
        self.pinned = {n for n in graph.graph.nodes if not pinned.isdisjoint(_touched(n, run))}
        last: dict[Any, fx.Node] = {}
        for node in graph.graph.nodes:
            module = _called_module(graph, node)
            if module is not None and sample_rank(module) is None:
                self.timelines.setdefault(module, []).append(node)
            for key in self._keys(graph, node, module, run, pinned):
                self._chain(last.get(key), node)
                last[key] = node

    def _keys(
        self, graph: fx.GraphModule, node: fx.Node, module: nn.Module | None, run: _Example, pinned: set[int]
    ) -> Iterator[Any]:
        """What ``node`` shares with the nodes that it must not change places with."""
        if node in run.random:
            yield "random numbers"
        yield from pinned & _touched(node, run)
        if module is not None and sample_rank(module) is None:
            every = node.target is call_state_method and node.args[1] in _PROCESS_WIDE
            parts = graph.modules() if every else module.modules()
            # A surrogate function without memory is often one object in all neurons.
            yield from (
                p for p in parts if p is module or is_time_leaf(p) or next(p.buffers(recurse=False), None) is not None
            )

    def _chain(self, previous: fx.Node | None, node: fx.Node) -> None:
        before = self.before.setdefault(node, set())
        self.after.setdefault(node, set())
        if previous is not None and previous is not node:
            before.add(previous)
            self.after[previous].add(node)


def _touched(node: fx.Node, run: _Example) -> set[int]:
    return set().union(*(_storages(run.values[n]) for n in (node, *node.all_input_nodes)))


def _called_module(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that ``node`` calls, or whose state method it calls."""
    if node.op == "call_module":
        return graph.get_submodule(str(node.target))
    if node.target is call_state_method:
        (owner, *_) = node.all_input_nodes
        return graph.get_submodule(str(owner.target))
    return None


# --- Groups ----------------------------------------------------------------------------------------------------------


class _Kind(enum.Enum):
    SLICE = "consecutive slices of one tensor"
    OPERATION = "one operation on sequences"
    NEURON = "consecutive calls of one neuron"
    ITEM = "one element of what a neuron returns"
    STEPWISE = "computed step by step, stacked where a sequence is needed"


@dataclasses.dataclass(eq=False)
class _Group:
    """Nodes that are the same operation at the steps 0, 1, ... T-1.

    ``nodes`` has ``None`` at steps whose value nobody uses. ``source`` is the tensor sliced, the neuron's input or the
    tuple that an item is taken from: a group, or a node that is the same at every step.
    """

    kind: _Kind
    nodes: list[fx.Node | None]
    value: Any
    source: Any = None
    index: int = 0
    dim: int = 0
    recipe: Recipe | None = None
    states: tuple[Any, ...] = ()

    @property
    def steps(self) -> int:
        return len(self.nodes)

    @property
    def members(self) -> list[fx.Node]:
        return [node for node in self.nodes if node is not None]

    @property
    def batched(self) -> bool:
        return self.kind is not _Kind.STEPWISE


class _Grouping:
    """Finds groups from the input onwards, and merges what is computed several times from the same operands."""

    def __init__(self, graph: fx.GraphModule, run: _Example, effects: _Effects) -> None:
        self.graph, self.effects, self.values = graph, effects, run.values
        self.group_of: dict[fx.Node, tuple[_Group, int]] = {}
        self.groups: list[_Group] = []
        self._same: dict[Any, tuple[fx.Node, int]] = {}
        self._steps: dict[Any, dict[int, fx.Node]] = {}
        self._pending: deque[fx.Node] = deque(graph.graph.nodes)
        self._gone: set[fx.Node] = set()
        self._stacked: set[nn.Module] = set()

    def find(self) -> bool:
        """Whether a layer or a neuron can be batched."""
        self._settle()
        self._group_slices()
        self._settle()
        while self._group_neuron() or self._stack_outputs():
            self._settle()
        layers = [g for g in self.groups if g.kind is _Kind.OPERATION and g.members[0].op == "call_module"]
        return bool(layers) or any(group.kind is _Kind.NEURON for group in self.groups)

    def batched(self, node: fx.Node) -> tuple[_Group, int] | None:
        """Group and step of ``node`` when it is computed with all others of its group."""
        group, step = self.group_of.get(node, (None, 0))
        return (group, step) if group is not None and group.batched else None

    def _settle(self) -> None:
        while self._pending:
            node = self._pending.popleft()
            if node not in self._gone and node not in self.group_of and self._is_free(node):
                self._place(node)

    def _is_free(self, node: fx.Node) -> bool:
        """Whether ``node`` depends on nothing but its operands. Random functions may be grouped, but not moved."""
        if node.op in ("placeholder", "output") or node in self.effects.pinned:
            return False
        return node not in self.effects.before or (node in self.effects.random and node.op != "call_module")

    def _place(self, node: fx.Node) -> None:
        places: set[tuple[int, int]] = set()

        def operand(leaf: fx.Node) -> Any:
            if leaf not in self.group_of:
                return leaf
            group, step = self.group_of[leaf]
            places.add((step, group.steps))
            return group

        key = (node.op, node.target, _frozen(_mapped(node.args, operand)), _frozen(_mapped(node.kwargs, operand)))
        if not places or (len(places) == 1 and _is_shape_query(node)):
            if self._is_repeatable(node):
                self._place_once(node, key, min(places, default=(0, 0))[0])
        elif len(places) == 1:
            self._place_at(node, key, *places.pop())

    def _place_once(self, node: fx.Node, key: Any, step: int) -> None:
        """The same operands, or a question about shapes, which all steps answer alike: the earliest step is asked."""
        first, first_step = self._same.get(key, (node, step))
        if first in self._gone or step < first_step:
            self._same[key] = node, step
            if first not in self._gone:
                self._merge(first, node)
        else:
            self._same[key] = first, first_step
            self._merge(node, first)

    def _place_at(self, node: fx.Node, key: Any, step: int, steps: int) -> None:
        found = self._steps.setdefault(key, {})
        other = found.setdefault(step, node)
        if other is not node:
            if self._is_repeatable(node) and self._is_repeatable(other) and other not in self._gone:
                self._merge(node, other)
            else:
                self._place_at(node, (key, "again"), step, steps)
        elif len(found) == steps and not any(n in self._gone or n in self.group_of for n in found.values()):
            self._group_operation([found[t] for t in range(steps)])

    def _is_repeatable(self, node: fx.Node) -> bool:
        """Whether two nodes like this one with the same operands may be one."""
        if node in self.effects.random or not self.effects.overwritten.isdisjoint(_storages(self.values[node])):
            return False
        if node.op in ("get_attr", "call_module") or node.target is getattr or node.target == "size":
            return True
        name = _operation(node)
        return is_known_function(name) and name not in _FACTORIES

    def _merge(self, node: fx.Node, first: fx.Node) -> None:
        if node is first:
            return
        self._pending.extend(node.users)
        node.replace_all_uses_with(first)
        self._gone.add(node)
        self.graph.graph.erase_node(node)

    def _add(self, group: _Group) -> None:
        self.groups.append(group)
        for step, node in enumerate(group.nodes):
            if node is not None:
                self.group_of[node] = group, step
                self._pending.extend(node.users)
        if isinstance(group.value, (tuple, list)):
            for index, value in enumerate(group.value):
                self._add_item(group, index, value)

    def _add_item(self, group: _Group, index: int, value: Any) -> None:
        nodes = [node and next((u for u in node.users if _is_item(u, node, index)), None) for node in group.nodes]
        wanted = any(nodes) if group.batched else all(nodes)
        if wanted and not any(node in self.effects.pinned or node in self.group_of for node in nodes):
            kind = _Kind.ITEM if group.batched else _Kind.STEPWISE
            self._add(_Group(kind, nodes, value, source=group, index=index))

    def _group_slices(self) -> None:
        """``x[0], x[1]...`` and ``x[:, 0], x[:, 1]...``, or the elements of ``x.unbind(dim)``."""
        found: dict[tuple[fx.Node, int], dict[int, fx.Node]] = {}
        for node in self.graph.graph.nodes:
            if self._is_free(node) and (place := self._slice_place(node)) is not None:
                source, dim, index = place
                found.setdefault((source, dim), {}).setdefault(index, node)
        for (source, dim), nodes in found.items():
            first, steps = min(nodes), len(nodes)
            if steps > 1 and max(nodes) == first + steps - 1 and not any(n in self.group_of for n in nodes.values()):
                ordered: list[fx.Node | None] = [nodes[first + t] for t in range(steps)]
                value = self.values[nodes[first]]
                self._add(_Group(_Kind.SLICE, ordered, value, source=source, index=first, dim=dim))

    def _slice_place(self, node: fx.Node) -> tuple[fx.Node, int, int] | None:
        """Tensor, dimension and index if ``node`` takes one slice along one dimension."""
        if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
            return None
        source, index = node.args[0], node.args[1]
        if source.target in ("unbind", torch.unbind) and isinstance(index, int):
            tensor, dim = source.args[0], source.args[1] if len(source.args) > 1 else source.kwargs.get("dim", 0)
            place = (tensor, dim, index)
        else:
            dim, index = _single_index(index if isinstance(index, tuple) else (index,), self.values[source])
            place = (source, dim, index)
        return self._normalised(*place)

    def _normalised(self, tensor: Any, dim: Any, index: Any) -> tuple[fx.Node, int, int] | None:
        value = self.values.get(tensor) if isinstance(tensor, fx.Node) else None
        if not isinstance(value, _Tensor) or type(dim) is not int or type(index) is not int:
            return None
        dim %= len(value.shape)
        return tensor, dim, index % value.shape[dim]

    def _group_operation(self, nodes: list[fx.Node]) -> None:
        if not self._alike(nodes):
            return
        recipe = self._recipe(nodes)
        if recipe is not None and self._feeds_back(nodes, recipe):
            recipe = None
        kind = _Kind.STEPWISE if recipe is None else _Kind.OPERATION
        self._add(_Group(kind, list(nodes), self.values[nodes[0]], recipe=recipe))

    def _recipe(self, nodes: list[fx.Node]) -> Recipe | None:
        first, value = nodes[0], self.values[nodes[0]]
        if first in self.effects.random or not isinstance(value, _Tensor):
            return None
        arguments = _zipped(self._operand, (first.args, first.kwargs), (nodes[1].args, nodes[1].kwargs))
        call = StepCall(_operation(first), arguments[0], arguments[1], value.shape, len(nodes))
        module = _called_module(self.graph, first)
        return function_recipe(call) if module is None else module_recipe(module, call)

    def _operand(self, first: fx.Node, second: fx.Node) -> Operand:
        value = self.values[first]
        shape = value.shape if isinstance(value, _Tensor) else None
        varies = first is not second
        return Operand(shape, varies, self.group_of[first][0] if varies else first)

    def _alike(self, nodes: Iterable[fx.Node]) -> bool:
        return len({_frozen(tree_map(_shape_and_type, self.values[node])) for node in nodes}) == 1

    def _feeds_back(self, nodes: list[fx.Node], recipe: Recipe) -> bool:
        """Whether an operand that is computed step by step needs a result of an earlier step."""
        groups = [op.key for op in StepCall("", recipe.args, recipe.kwargs, (), 0).operands if op.varies]
        stepwise = {node for group in groups if not group.batched for node in group.members}
        return bool(stepwise) and self._reaches(nodes, stepwise)

    def _reaches(self, nodes: Iterable[fx.Node], targets: set[fx.Node]) -> bool:
        """Whether one of ``targets`` comes after one of ``nodes``, where batched groups are computed as a whole."""
        stack, seen = list(nodes), set(nodes)
        while stack:
            node = stack.pop()
            place = self.batched(node)
            companions = place[0].members if place is not None else ()
            for other in (*node.users, *self.effects.after.get(node, ()), *companions):
                if other in targets:
                    return True
                if other not in seen:
                    seen.add(other)
                    stack.append(other)
        return False

    def _group_neuron(self) -> bool:
        """Batch the first neuron that can be; whether there was one."""
        for module, timeline in self.effects.timelines.items():
            if not is_time_leaf(module) or getattr(module, "step_mode", "s") != "s":
                continue
            calls = [self._neuron_call(module, node) for node in timeline]
            for start in range(len(calls)):
                group = self._neuron_group(calls[start:])
                if group is not None:
                    self._add(group)
                    return True
        return False

    def _neuron_call(self, module: nn.Module, node: fx.Node) -> _NeuronCall | None:
        """``None`` for what interrupts a chain: methods that change state, and calls that must stay where they are."""
        fixed = node in self.group_of or node in self.effects.random or node in self.effects.pinned
        if fixed or node.op != "call_module":
            return None
        bound = inspect.signature(module.forward).bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        operand, *states = bound.args or (None,)
        if bound.kwargs or not isinstance(operand, fx.Node) or not isinstance(self.values[operand], _Tensor):
            return None
        return _NeuronCall(node, operand, tuple(states))

    def _neuron_group(self, calls: list[_NeuronCall | None]) -> _Group | None:
        """The longest chain at the start of ``calls`` if it covers a whole sequence or repeats one input."""
        if len(calls) < 2 or calls[0] is None or calls[1] is None:
            return None
        length = self._chain_length(calls)
        first = calls[0].operand
        group, step = self.group_of.get(first, (None, -1))
        if calls[1].operand is first:
            source = first
            length = next((i for i, c in enumerate(calls[:length]) if c is None or c.operand is not first), length)
        elif group is not None and step == 0 and length >= group.steps:
            source, length = group, group.steps
            if any(c is None or c.operand is not n for c, n in zip(calls, group.nodes, strict=False)):
                return None
        else:
            return None
        chain = [call for call in calls[:length] if call is not None]
        return self._checked_neuron(chain, source) if length > 1 else None

    def _checked_neuron(self, chain: list[_NeuronCall], source: Any) -> _Group | None:
        nodes = [call.node for call in chain]
        stepwise = set(source.members) if isinstance(source, _Group) and not source.batched else set()
        if not self._alike(nodes) or (stepwise and self._reaches(nodes, stepwise)):
            return None
        states = chain[0].states if chain[1].is_given_states else ()
        return _Group(_Kind.NEURON, list(nodes), self.values[nodes[0]], source=source, states=states)

    def _chain_length(self, calls: list[_NeuronCall | None]) -> int:
        """How many of ``calls`` hand on their state, each to the next one, in the way in which the first two do."""
        kept = calls[1] is not None and not calls[1].is_given_states
        if kept and calls[0] is not None and calls[0].is_given_states:
            return 1
        for index, (call, following) in enumerate(itertools.pairwise(calls), 1):
            if call is None or following is None or following.is_given_states is kept:
                return index
            if not kept and not self._hands_on(call, following):
                return index
        return len(calls)

    def _hands_on(self, call: _NeuronCall, following: _NeuronCall) -> bool:
        """Whether the states of the following call are the last outputs of this one."""
        states, value = following.states, self.values[call.node]
        if not isinstance(value, (tuple, list)):
            return states == (call.node,)
        skipped = len(value) - len(states)
        return skipped >= 0 and all(_is_item(s, call.node, i) for i, s in enumerate(states, skipped))

    def _stack_outputs(self) -> bool:
        """Make a group of the calls of the next module that stays stepwise, so that what follows can be batched."""
        for module, timeline in self.effects.timelines.items():
            calls: list[fx.Node] = [node for node in timeline if node.op == "call_module"]
            fixed = any(node in self.effects.pinned or node in self.group_of for node in calls)
            if module not in self._stacked and len(calls) > 1 and not fixed and self._alike(calls):
                self._stacked.add(module)
                self._add(_Group(_Kind.STEPWISE, list(calls), self.values[calls[0]]))
                return True
        return False


@dataclasses.dataclass(frozen=True)
class _NeuronCall:
    node: fx.Node
    operand: fx.Node
    states: tuple[Any, ...]

    @property
    def is_given_states(self) -> bool:
        return any(state is not None for state in self.states)


def _operation(node: fx.Node) -> str:
    target = getattr(torch.Tensor, node.target, node.target) if isinstance(node.target, str) else node.target
    return str(target) if isinstance(target, str) else op_name(target)


def _is_item(user: Any, node: fx.Node, index: int) -> bool:
    return isinstance(user, fx.Node) and user.target is operator.getitem and user.args == (node, index)


def _is_shape_query(node: fx.Node) -> bool:
    name = node.args[1] if node.target is getattr else node.target
    return isinstance(name, str) and name in _SHAPE_QUERIES


def _single_index(index: tuple[Any, ...], value: Any) -> tuple[Any, Any]:
    """Dimension and number if ``index`` is one number among full slices, else ``(None, None)``."""
    if not isinstance(value, _Tensor):
        return None, None
    if Ellipsis in index:
        at, missing = index.index(Ellipsis), len(value.shape) - len(index) + 1
        index = (*index[:at], *[slice(None)] * missing, *index[at + 1 :])
    numbers = [(dim, item) for dim, item in enumerate(index) if item != slice(None)]
    return numbers[0] if len(numbers) == 1 else (None, None)


def _shape_and_type(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, _Tensor) else leaf


def _mapped(arguments: Any, function: Callable[[fx.Node], Any]) -> Any:
    """``arguments`` of a node with ``function`` applied to every node in them."""
    return _zipped(lambda node, _: function(node), arguments, arguments)


def _zipped(function: Callable[[fx.Node, fx.Node], Any], first: Any, second: Any) -> Any:
    """Two like structures as one, with ``function`` applied to each pair of nodes."""
    if isinstance(first, fx.Node):
        return function(first, second)
    if isinstance(first, (tuple, list)):
        return type(first)(_zipped(function, a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, dict):
        return {key: _zipped(function, first[key], second[key]) for key in first}
    if isinstance(first, slice):
        return slice(*(_zipped(function, getattr(first, p), getattr(second, p)) for p in ("start", "stop", "step")))
    return first


def _frozen(arguments: Any) -> Any:
    """A hashable form of a structure; numbers keep their type, so that 1, 1.0 and True differ."""
    if isinstance(arguments, (tuple, list)):
        return tuple(map(_frozen, arguments))
    if isinstance(arguments, dict):
        return tuple((key, _frozen(value)) for key, value in sorted(arguments.items()))
    if isinstance(arguments, slice):
        return "slice", _frozen((arguments.start, arguments.stop, arguments.step))
    return type(arguments), arguments


# --- Writing the new graph -------------------------------------------------------------------------------------------


class _CircularError(Exception):
    """What is computed as a whole would need its own result."""


@dataclasses.dataclass(frozen=True)
class _Collected:
    """A node that takes the values of all steps together: their stack along ``dim``, or ``start`` plus their sum."""

    group: _Group
    dim: int = 0
    summed: bool = False
    start: Any = None


class _Writer:
    """Writes what is needed for the result and for the effects, each thing after what it needs."""

    def __init__(self, unrolled: fx.GraphModule, groups: _Grouping) -> None:
        self._old, self._groups = unrolled.graph, groups
        self._new = fx.Graph()
        self._nodes: dict[Any, fx.Node] = {}
        self._made: dict[Any, fx.Node] = {}
        self._forms: dict[_Group, str] = {}
        self._collected = {n: found for n in self._old.nodes if (found := self._collection(n)) is not None}

    def write(self) -> fx.Graph:
        order = self._groups.effects.before
        for node in self._old.nodes:
            if node.op in ("placeholder", "output") or node in order:
                self._write_with_needs(self._unit(node))
        return self._new

    def _unit(self, node: fx.Node) -> Any:
        """What has to be written to have ``node``: its group, or itself."""
        place = self._groups.batched(node)
        return node if place is None else place[0]

    def _write_with_needs(self, unit: Any) -> None:
        open_, stack = set(), [unit]
        while stack:
            unit = stack[-1]
            if unit in self._nodes:
                stack.pop()
                continue
            missing = [need for need in self._needs(unit) if need not in self._nodes]
            if not missing:
                stack.pop()
                self._nodes[unit] = self._write_group(unit) if isinstance(unit, _Group) else self._write_node(unit)
            elif unit in open_:
                raise _CircularError
            else:
                open_.add(unit)
                stack.extend(reversed(missing))

    def _needs(self, unit: Any) -> list[Any]:
        if isinstance(unit, _Group):
            members = unit.members
            needs = self._group_needs(unit)
        else:
            members = [unit]
            needs = self._node_needs(unit)
        before = self._groups.effects.before
        earlier = {self._unit(other) for node in members for other in before.get(node, ())}
        return [*needs, *(earlier - {unit})]

    def _node_needs(self, node: fx.Node) -> list[Any]:
        collected = self._collected.get(node)
        if collected is None:
            return [self._unit(operand) for operand in node.all_input_nodes]
        start = [self._unit(collected.start)] if isinstance(collected.start, fx.Node) else []
        return [collected.group, *start]

    def _group_needs(self, group: _Group) -> list[Any]:
        if group.kind is _Kind.STEPWISE:
            return list(group.members)
        if group.recipe is not None:
            keys = [op.key for op in StepCall("", group.recipe.args, group.recipe.kwargs, (), 0).operands]
        else:
            keys = [group.source, *(state for state in group.states if isinstance(state, fx.Node))]
        return [self._unit(key) if isinstance(key, fx.Node) else key for key in keys]

    def _write_node(self, node: fx.Node) -> fx.Node:
        collected = self._collected.get(node)
        return self._new.node_copy(node, self._value) if collected is None else self._write_collected(collected)

    def _write_collected(self, collected: _Collected) -> fx.Node:
        sequence = self._sequence(collected.group)
        if not collected.summed:
            return sequence if collected.dim == 0 else self._method("movedim", sequence, 0, collected.dim)
        total = self._method("sum", sequence, 0)
        start = self._value(collected.start) if isinstance(collected.start, fx.Node) else collected.start
        nothing = start is None or (type(start) is int and start == 0)
        return total if nothing else self._new.call_function(operator.add, (start, total))

    def _write_group(self, group: _Group) -> fx.Node:
        if group.kind is _Kind.SLICE:
            return self._write_slices(group)
        if group.kind is _Kind.NEURON:
            return self._write_neuron(group)
        if group.kind is _Kind.ITEM:
            return self._item(self._nodes[group.source], group.index)
        if group.kind is _Kind.STEPWISE:
            return self._new.call_function(torch.stack, ([self._nodes[node] for node in group.members],))
        return self._write_operation(group)

    def _write_slices(self, group: _Group) -> fx.Node:
        sequence = self._value(group.source)
        if group.dim != 0:
            sequence = self._method("movedim", sequence, group.dim, 0)
        if group.steps < self._groups.values[group.source].shape[group.dim]:
            sequence = self._new.call_function(
                operator.getitem, (sequence, slice(group.index, group.index + group.steps))
            )
        return sequence

    def _write_neuron(self, group: _Group) -> fx.Node:
        target = str(group.members[0].target)
        if ("module", target) not in self._made:
            self._made["module", target] = self._new.get_attr(target)
        x_seq = self._sequence(group.source) if isinstance(group.source, _Group) else self._repeated(group)
        states = [self._value(state) if isinstance(state, fx.Node) else state for state in group.states]
        return self._new.call_function(neuron_sequence, (self._made["module", target], x_seq, *states))

    def _repeated(self, group: _Group) -> fx.Node:
        rank = len(self._groups.values[group.source].shape)
        once = self._method("unsqueeze", self._value(group.source), 0)
        return self._method("expand", once, group.steps, *[-1] * rank)

    def _write_operation(self, group: _Group) -> fx.Node:
        recipe, node = group.recipe, group.members[0]
        assert recipe is not None
        flat = recipe.form == "flat" or (recipe.form == "either" and self._has_flat_operand(recipe))
        self._forms[group] = "flat" if flat else "seq"

        def operand(value: Any) -> Any:
            if not value.varies:
                return self._value(value.key)
            return self._flat(value.key) if flat else self._sequence(value.key)

        args, kwargs = _replaced(recipe.args, operand), _replaced(recipe.kwargs, operand)
        if recipe.method is not None:
            return self._method(recipe.method, *args, **kwargs)
        return self._new.create_node(node.op, node.target, args, kwargs)

    def _has_flat_operand(self, recipe: Recipe) -> bool:
        operands = StepCall("", recipe.args, recipe.kwargs, (), 0).operands
        return any(self._forms.get(op.key) == "flat" for op in operands if op.varies)

    def _sequence(self, group: _Group) -> fx.Node:
        """``group`` as ``[T, N, ...]``."""
        node = self._nodes[group]
        if self._forms.get(group) != "flat":
            return node
        if ("seq", group) not in self._made:
            self._made["seq", group] = self._method("unflatten", node, 0, (group.steps, -1))
        return self._made["seq", group]

    def _flat(self, group: _Group) -> fx.Node:
        """``group`` as ``[T * N, ...]``."""
        node = self._nodes[group]
        if self._forms.get(group) == "flat":
            return node
        if ("flat", group) not in self._made:
            self._made["flat", group] = self._method("flatten", node, 0, 1)
        return self._made["flat", group]

    def _value(self, node: fx.Node) -> Any:
        """What ``node`` was at its own step; the items of a tuple one by one."""
        place = self._groups.batched(node)
        if place is None:
            return self._nodes[node]
        group, step = place
        return self._at(self._sequence(group), self._groups.values[node], step)

    def _at(self, sequence: fx.Node, value: Any, step: int) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(self._at(self._item(sequence, index), item, step) for index, item in enumerate(value))
        return self._item(sequence, step)

    def _item(self, node: fx.Node, index: int) -> fx.Node:
        if ("item", node, index) not in self._made:
            self._made["item", node, index] = self._new.call_function(operator.getitem, (node, index))
        return self._made["item", node, index]

    def _method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        return self._new.call_method(name, args, kwargs)

    def _collection(self, node: fx.Node) -> _Collected | None:
        if node in self._groups.effects.pinned or self._groups.batched(node) is not None:
            return None
        if node.target is torch.stack:
            return self._stack_of(node)
        return self._sum_to(node) if _operation(node) in _SUMS else None

    def _stack_of(self, node: fx.Node) -> _Collected | None:
        items = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        group = self._whole_group(items)
        if group is None or not isinstance(dim, int) or "out" in node.kwargs or self._is_view_of_input(group):
            return None
        return _Collected(group, dim)

    def _whole_group(self, items: Any) -> _Group | None:
        """The batched group whose steps are ``items``, all of them and in order."""
        if not isinstance(items, (tuple, list)) or not items or not isinstance(items[0], fx.Node):
            return None
        place = self._groups.batched(items[0])
        return place[0] if place is not None and list(items) == place[0].nodes else None

    def _is_view_of_input(self, group: _Group) -> bool:
        """Then a stack is a copy that the caller may write into, and stays one."""
        values = self._groups.values
        inputs = set().union(*(_storages(values[n]) for n in self._old.find_nodes(op="placeholder")))
        return any(not inputs.isdisjoint(_storages(values[node])) for node in group.members)

    def _sum_to(self, node: fx.Node) -> _Collected | None:
        """``start + seq[0] + seq[1] + ...`` that ends in ``node``, if nobody uses the sums on the way."""
        group = next((found for found in map(self._last_step, node.args) if found is not None), None)
        if group is None:
            return None
        so_far: Any = node
        for step in range(group.steps - 1, 0, -1):
            so_far = self._without(so_far, group.nodes[step], last=node)
        if so_far is group.nodes[0]:
            return _Collected(group, summed=True)
        start = self._without(so_far, group.nodes[0], last=node)
        return None if start is None else _Collected(group, summed=True, start=start)

    def _without(self, total: Any, term: Any, last: fx.Node) -> Any:
        """The other term of the sum ``total``, or ``None`` if it is none or used for anything but the sum ``last``."""
        if (
            not isinstance(total, fx.Node)
            or not self._is_plain_sum(total)
            or (total is not last and len(total.users) > 1)
        ):
            return None
        others = [arg for arg in total.args if arg is not term]
        return others[0] if len(others) == 1 else None

    def _is_plain_sum(self, node: fx.Node) -> bool:
        plain = _operation(node) in _SUMS and len(node.args) == 2 and not node.kwargs
        return plain and node not in self._groups.effects.pinned and self._groups.batched(node) is None

    def _last_step(self, argument: Any) -> _Group | None:
        place = self._groups.batched(argument) if isinstance(argument, fx.Node) else None
        if place is None or place[1] != place[0].steps - 1 or not isinstance(place[0].value, _Tensor):
            return None
        return place[0]


def _replaced(arguments: Any, function: Callable[[Operand], Any]) -> Any:
    if isinstance(arguments, Operand):
        return function(arguments)
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(_replaced(item, function) for item in arguments)
    if isinstance(arguments, dict):
        return {key: _replaced(item, function) for key, item in arguments.items()}
    if isinstance(arguments, slice):
        return slice(*(_replaced(getattr(arguments, part), function) for part in ("start", "stop", "step")))
    return arguments


# --- Verification ----------------------------------------------------------------------------------------------------


def _equivalent(graph: fx.GraphModule, rolled: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
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
            seen += copied(_tensors(callee(*call_args, **call_kwargs)))
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
