"""Finding the groups, from the input onwards; what is computed several times from the same operands is merged.

A node joins when its operands are all at one step, or the same at every step. A module behind feedback is given up as
stepwise when nothing else is left, so that what reads it can still be batched.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import fx

from sparseflow.graph.reroll.effects import Effects
from sparseflow.graph.reroll.example import ExampleRun, ExampleTensor, storages
from sparseflow.graph.reroll.groups import Group, Groups, Kind
from sparseflow.graph.reroll.neurons import next_neuron
from sparseflow.graph.reroll.nodes import called_module, frozen, is_shape_query, operation, paired
from sparseflow.graph.reroll.slices import slice_groups
from sparseflow.graph.timeops import Operand, Recipe, StepCall, function_recipe, is_known_function, module_recipe

_FACTORIES = frozenset({"zeros_like", "ones_like"})


def find_groups(run: ExampleRun, effects: Effects) -> Groups:
    """All groups of the graph that was run, out of which merged nodes are erased."""
    search = _Search(Groups(run, effects))
    search.settle()
    for group in slice_groups(search.groups):
        search.add(group)
    search.settle()
    while (group := next_neuron(search.groups) or _next_stepwise(search.groups)) is not None:
        search.add(group)
        search.settle()
    return search.groups


def _next_stepwise(groups: Groups) -> Group | None:
    """The calls of the next module that stays stepwise, a group so that what follows can be batched."""
    for timeline in groups.effects.timelines.values():
        calls: list[Any] = [node for node in timeline if node.op == "call_module"]
        fixed = any(node in groups.effects.pinned or node in groups for node in calls)
        if len(calls) > 1 and not fixed and groups.alike(calls):
            return Group(Kind.STEPWISE, calls, groups.values[calls[0]])
    return None


class _Search:
    """Looks at every node, and again after one of its operands has joined a group."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self._graph, self._effects, self._values = groups.graph, groups.effects, groups.values
        self._same: dict[Any, tuple[fx.Node, int]] = {}
        self._steps: dict[Any, dict[int, fx.Node]] = {}
        self._pending: deque[fx.Node] = deque(groups.graph.graph.nodes)
        self._gone: set[fx.Node] = set()

    def add(self, group: Group) -> None:
        for node in self.groups.add(group):
            self._pending.extend(node.users)

    def settle(self) -> None:
        """Place all nodes that can be."""
        while self._pending:
            node = self._pending.popleft()
            if node not in self._gone and node not in self.groups and self._effects.is_free(node):
                self._place(node)

    def _place(self, node: fx.Node) -> None:
        places: set[tuple[int, int]] = set()

        def operand(leaf: fx.Node) -> Any:
            place = self.groups.place(leaf)
            if place is None:
                return leaf
            group, step = place
            places.add((step, group.steps))
            return group

        key = (node.op, node.target, frozen(fx.map_arg(node.args, operand)), frozen(fx.map_arg(node.kwargs, operand)))
        if not places or (len(places) == 1 and is_shape_query(node)):
            if self._is_repeatable(node):
                self._place_once(node, key, min(places, default=(0, 0))[0])
        elif len(places) == 1:
            self._place_at(node, key, *places.pop())

    def _place_once(self, node: fx.Node, key: Any, step: int) -> None:
        """The same operands, or a question about shapes, which all steps answer alike: the earliest step is asked."""
        first, first_step = self._same.get(key, (node, step))
        if first in self._gone:
            self._same[key] = node, step
        elif step < first_step:
            self._same[key] = node, step
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
        elif len(found) == steps and not any(n in self._gone or n in self.groups for n in found.values()):
            self._group_operation([found[t] for t in range(steps)])

    def _is_repeatable(self, node: fx.Node) -> bool:
        """Whether two nodes like this one with the same operands may be one."""
        if node in self._effects.random or not self._effects.overwritten.isdisjoint(storages(self._values[node])):
            return False
        if node.op in ("get_attr", "call_module") or node.target is getattr or node.target == "size":
            return True
        name = operation(node)
        return is_known_function(name) and name not in _FACTORIES

    def _merge(self, node: fx.Node, first: fx.Node) -> None:
        if node is first:
            return
        self._pending.extend(node.users)
        node.replace_all_uses_with(first)
        self._gone.add(node)
        self._graph.graph.erase_node(node)

    def _group_operation(self, nodes: list[fx.Node]) -> None:
        if not self.groups.alike(nodes):
            return
        value = self._values[nodes[0]]
        group = Group(Kind.OPERATION, [*nodes], value, recipe=self._recipe(nodes))
        if group.recipe is None or self.groups.feeds_back(group):
            group = Group(Kind.STEPWISE, [*nodes], value)
        self.add(group)

    def _recipe(self, nodes: list[fx.Node]) -> Recipe | None:
        first, second, *_ = nodes
        value = self._values[first]
        if first in self._effects.random or not isinstance(value, ExampleTensor):
            return None
        args, kwargs = paired(self._operand, (first.args, first.kwargs), (second.args, second.kwargs))
        call = StepCall(operation(first), args, kwargs, value.shape, len(nodes))
        module = called_module(self._graph, first)
        return function_recipe(call) if module is None else module_recipe(module, call)

    def _operand(self, first: fx.Node, second: fx.Node) -> Operand:
        value = self._values[first]
        shape = value.shape if isinstance(value, ExampleTensor) else None
        if first is second:
            return Operand(shape, False, first, isinstance(value, int))
        group, _ = self.groups.place(first) or (None, 0)
        assert group is not None, "nodes with different operands were put together"
        return Operand(shape, True, group, isinstance(value, int))
