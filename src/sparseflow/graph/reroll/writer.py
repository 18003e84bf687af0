"""Writing the new graph: what the result and the effects need, each thing after what it needs.

A group is written once. Between flat ``[T * N, ...]`` and sequences ``[T, N, ...]`` it is reshaped where it has to be.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from sparseflow.graph.reroll.collect import Collected, collected
from sparseflow.graph.reroll.groups import Group, Groups, Kind
from sparseflow.graph.timeops import Operand, Recipe, neuron_sequence

_Unit = Group | fx.Node


class CircularError(Exception):
    """What is computed as a whole would need its own result."""


def write(groups: Groups) -> fx.Graph:
    """The graph of :func:`sparseflow.graph.reroll.reroll` in which each group is computed as its kind says.

    Raises:
        CircularError: there is no order in which everything has what it needs.
    """
    return _Writer(groups).write()


class _Writer:
    def __init__(self, groups: Groups) -> None:
        self._old, self._groups = groups.graph.graph, groups
        self._new = fx.Graph()
        self._written: dict[_Unit, fx.Node] = {}
        self._derived: dict[Any, fx.Node] = {}
        self._flat: set[Group] = set()
        self._collected = {node: found for node in self._old.nodes if (found := collected(node, groups)) is not None}

    def write(self) -> fx.Graph:
        order = self._groups.effects.before
        for node in self._old.nodes:
            if node.op in ("placeholder", "output") or node in order:
                self._write_with_needs(self._unit(node))
        return self._new

    def _unit(self, node: fx.Node) -> _Unit:
        """What has to be written to have ``node``: its group, or itself."""
        place = self._groups.batched(node)
        return node if place is None else place[0]

    def _write_with_needs(self, unit: _Unit) -> None:
        open_, stack = set(), [unit]
        while stack:
            unit = stack[-1]
            if unit in self._written:
                stack.pop()
                continue
            missing = [need for need in self._needs(unit) if need not in self._written]
            if not missing:
                stack.pop()
                self._written[unit] = self._write_group(unit) if isinstance(unit, Group) else self._write_node(unit)
            elif unit in open_:
                raise CircularError
            else:
                open_.add(unit)
                stack.extend(reversed(missing))

    def _needs(self, unit: _Unit) -> list[_Unit]:
        if isinstance(unit, Group):
            members, operands = unit.members, unit.operands
        else:
            found = self._collected.get(unit)
            members, operands = [unit], unit.all_input_nodes if found is None else found.operands
        before = self._groups.effects.before
        earlier = {self._unit(other) for node in members for other in before.get(node, ())}
        needs = [self._unit(operand) if isinstance(operand, fx.Node) else operand for operand in operands]
        return [*needs, *(earlier - {unit})]

    def _write_node(self, node: fx.Node) -> fx.Node:
        found = self._collected.get(node)
        return self._new.node_copy(node, self._value) if found is None else self._write_collection(found)

    def _write_collection(self, found: Collected) -> fx.Node:
        sequence = self._sequence(found.group)
        if not found.summed:
            return sequence if found.dim == 0 else self._method("movedim", sequence, 0, found.dim)
        total = self._method("sum", sequence, 0)
        if found.start is None or (type(found.start) is int and found.start == 0):
            return total
        start = self._value(found.start) if isinstance(found.start, fx.Node) else found.start
        return self._function(operator.add, start, total)

    def _write_group(self, group: Group) -> fx.Node:
        match group.kind:
            case Kind.SLICE:
                return self._write_slices(group)
            case Kind.OPERATION:
                return self._write_operation(group)
            case Kind.NEURON:
                return self._write_neuron(group)
            case Kind.ITEM:
                return self._item(self._written[group.source], group.index)
            case Kind.STEPWISE:
                return self._function(torch.stack, [self._written[node] for node in group.members])

    def _write_slices(self, group: Group) -> fx.Node:
        sequence = self._value(group.source)
        if group.dim != 0:
            sequence = self._method("movedim", sequence, group.dim, 0)
        if group.steps < self._groups.values[group.source].shape[group.dim]:
            sequence = self._function(operator.getitem, sequence, slice(group.index, group.index + group.steps))
        return sequence

    def _write_neuron(self, group: Group) -> fx.Node:
        target = str(group.members[0].target)
        module = self._once(("module", target), lambda: self._new.get_attr(target))
        x_seq = self._sequence(group.source) if isinstance(group.source, Group) else self._repeated(group)
        states = [self._value(state) if isinstance(state, fx.Node) else state for state in group.states]
        return self._function(neuron_sequence, module, x_seq, *states)

    def _repeated(self, group: Group) -> fx.Node:
        rank = len(self._groups.values[group.source].shape)
        once = self._method("unsqueeze", self._value(group.source), 0)
        return self._method("expand", once, group.steps, *[-1] * rank)

    def _write_operation(self, group: Group) -> fx.Node:
        recipe, node = group.recipe, group.members[0]
        assert recipe is not None
        flat = self._is_flat(recipe)
        if flat:
            self._flat.add(group)

        def argument(leaf: Any) -> Any:
            if not isinstance(leaf, Operand):
                return leaf
            if not leaf.varies:
                return self._value(leaf.key)
            return self._samples(leaf.key) if flat else self._sequence(leaf.key)

        args: Any = map_aggregate(recipe.args, argument)
        kwargs: Any = map_aggregate(recipe.kwargs, argument)
        if recipe.method is not None:
            return self._method(recipe.method, *args, **kwargs)
        return self._new.create_node(node.op, node.target, args, kwargs)

    def _is_flat(self, recipe: Recipe) -> bool:
        """What takes either form takes that of its operands, if it can have it without another reshape."""
        if recipe.form == "either":
            return any(operand.key in self._flat for operand in recipe.operands)
        return recipe.form == "flat"

    def _sequence(self, group: Group) -> fx.Node:
        """``group`` as ``[T, N, ...]``."""
        node = self._written[group]
        if group not in self._flat:
            return node
        return self._once(("sequence", group), lambda: self._method("unflatten", node, 0, (group.steps, -1)))

    def _samples(self, group: Group) -> fx.Node:
        """``group`` as flat ``[T * N, ...]``."""
        node = self._written[group]
        if group in self._flat:
            return node
        return self._once(("samples", group), lambda: self._method("flatten", node, 0, 1))

    def _value(self, node: fx.Node) -> Any:
        """What ``node`` was at its own step; the items of a tuple one by one."""
        place = self._groups.batched(node)
        if place is None:
            return self._written[node]
        group, step = place
        return self._at(self._sequence(group), self._groups.values[node], step)

    def _at(self, sequence: fx.Node, value: Any, step: int) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(self._at(self._item(sequence, index), item, step) for index, item in enumerate(value))
        return self._item(sequence, step)

    def _item(self, node: fx.Node, index: int) -> fx.Node:
        return self._once(("item", node, index), lambda: self._function(operator.getitem, node, index))

    def _once(self, key: tuple[Any, ...], make: Callable[[], fx.Node]) -> fx.Node:
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def _function(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self._new.call_function(function, args)

    def _method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        return self._new.call_method(name, args, kwargs)
