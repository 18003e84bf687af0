"""Where a sequence ends: stacks of all steps, and sums over them, which become one operation on the sequence."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from sparseflow.graph.reroll.example import ExampleTensor, storages
from sparseflow.graph.reroll.groups import Group, Groups
from sparseflow.graph.reroll.nodes import operation


@dataclasses.dataclass(frozen=True)
class Collected:
    """A node that takes the values of all steps together: their stack along ``dim``, or ``start`` plus their sum."""

    group: Group
    dim: int = 0
    summed: bool = False
    start: Any = None

    @property
    def operands(self) -> list[Group | fx.Node]:
        """What has to be there before it is computed."""
        return [self.group, self.start] if isinstance(self.start, fx.Node) else [self.group]


def collected(node: fx.Node, groups: Groups) -> Collected | None:
    """What ``node`` collects, if it does."""
    if node in groups.effects.pinned or groups.batched(node) is not None:
        return None
    if node.target is torch.stack:
        return _stack(node, groups)
    return _sum(node, groups) if operation(node) == "add" else None


def _stack(node: fx.Node, groups: Groups) -> Collected | None:
    items = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    group = _whole_group(items, groups)
    if group is None or not isinstance(dim, int) or "out" in node.kwargs or _is_view_of_input(group, groups):
        return None
    return Collected(group, dim)


def _whole_group(items: Any, groups: Groups) -> Group | None:
    """The batched group whose steps are ``items``, all of them and in order."""
    if not isinstance(items, (tuple, list)) or not items or not isinstance(items[0], fx.Node):
        return None
    place = groups.batched(items[0])
    return place[0] if place is not None and list(items) == place[0].nodes else None


def _is_view_of_input(group: Group, groups: Groups) -> bool:
    """Then a stack is a copy that the caller may write into, and stays one."""
    placeholders = groups.graph.graph.find_nodes(op="placeholder")
    inputs = set().union(*(storages(groups.values[node]) for node in placeholders))
    return any(not inputs.isdisjoint(storages(groups.values[node])) for node in group.members)


def _sum(last: fx.Node, groups: Groups) -> Collected | None:
    """``start + seq[0] + seq[1] + ...`` that ends in ``last``, if nobody uses the sums on the way."""
    group = next((found for arg in last.args if (found := _ends_with(arg, groups)) is not None), None)
    if group is None:
        return None
    total: Any = last
    for term in reversed(group.nodes[1:]):
        total = _without(term, total, last, groups)
    if total is group.nodes[0]:
        return Collected(group, summed=True)
    start = _without(group.nodes[0], total, last, groups)
    return None if start is None else Collected(group, summed=True, start=start)


def _ends_with(term: Any, groups: Groups) -> Group | None:
    """The batched group whose last step is ``term``."""
    place = groups.batched(term) if isinstance(term, fx.Node) else None
    if place is None or place[1] != place[0].steps - 1 or not isinstance(place[0].value, ExampleTensor):
        return None
    return place[0]


def _without(term: Any, total: Any, last: fx.Node, groups: Groups) -> Any:
    """The other term of the sum ``total``, or ``None`` if it is none or used for anything but the sum ``last``."""
    if not isinstance(total, fx.Node) or not _is_plain_sum(total, groups):
        return None
    if total is not last and len(total.users) > 1:
        return None
    others = [arg for arg in total.args if arg is not term]
    return others[0] if len(others) == 1 else None


def _is_plain_sum(node: fx.Node, groups: Groups) -> bool:
    plain = operation(node) == "add" and len(node.args) == 2 and not node.kwargs
    return plain and node not in groups.effects.pinned and groups.batched(node) is None
