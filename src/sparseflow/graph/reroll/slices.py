"""Where a sequence begins: the slices that a forward takes of one tensor, step by step."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from sparseflow.graph.reroll.example import ExampleTensor
from sparseflow.graph.reroll.groups import Group, Groups, Kind


def slice_groups(groups: Groups) -> Iterator[Group]:
    """``x[0], x[1]...`` and ``x[:, 0], x[:, 1]...``, or the elements of ``x.unbind(dim)``."""
    found: dict[tuple[fx.Node, int], dict[int, fx.Node]] = {}
    for node in groups.graph.graph.nodes:
        place = _place(node, groups.values) if groups.effects.is_free(node) else None
        if place is not None:
            source, dim, index = place
            found.setdefault((source, dim), {}).setdefault(index, node)
    for (source, dim), nodes in found.items():
        first, steps = min(nodes), len(nodes)
        if steps > 1 and max(nodes) == first + steps - 1 and not any(node in groups for node in nodes.values()):
            ordered: list[fx.Node | None] = [nodes[first + t] for t in range(steps)]
            yield Group(Kind.SLICE, ordered, groups.values[nodes[first]], source=source, index=first, dim=dim)


def _place(node: fx.Node, values: dict[fx.Node, Any]) -> tuple[fx.Node, int, int] | None:
    """Tensor, dimension and index if ``node`` takes one slice along one dimension."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return None
    source, index = node.args[0], node.args[1]
    if source.target in ("unbind", torch.unbind) and source.args and isinstance(index, int):
        tensor, *dims = source.args
        return _normalised(tensor, dims[0] if dims else source.kwargs.get("dim", 0), index, values)
    dim, index = _single_index(index if isinstance(index, tuple) else (index,), values[source])
    return _normalised(source, dim, index, values)


def _normalised(tensor: Any, dim: Any, index: Any, values: dict[fx.Node, Any]) -> tuple[fx.Node, int, int] | None:
    """The same with numbers that count from the front; ``None`` unless all of it is known."""
    value = values.get(tensor) if isinstance(tensor, fx.Node) else None
    if not isinstance(value, ExampleTensor) or type(dim) is not int or type(index) is not int:
        return None
    dim %= len(value.shape)
    return tensor, dim, index % value.shape[dim]


def _single_index(index: tuple[Any, ...], value: Any) -> tuple[Any, Any]:
    """Dimension and number if ``index`` is one number among full slices, else ``(None, None)``."""
    if not isinstance(value, ExampleTensor):
        return None, None
    if Ellipsis in index:
        at, missing = index.index(Ellipsis), len(value.shape) - len(index) + 1
        index = (*index[:at], *[slice(None)] * missing, *index[at + 1 :])
    numbers = [(dim, item) for dim, item in enumerate(index) if item != slice(None)]
    return numbers[0] if len(numbers) == 1 else (None, None)
