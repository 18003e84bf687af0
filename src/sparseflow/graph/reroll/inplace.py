"""Which writes in place nobody sees: there ``x += y`` may be ``x + y`` and be batched. Others stay where they are."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch.utils._pytree import tree_map

from sparseflow.graph.reroll.example import ExampleRun, ExampleTensor, storages
from sparseflow.graph.timeops import is_known_function, sample_rank

_IN_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
}


def remove_writes(run: ExampleRun) -> set[int]:
    """Turn ``x += y`` into ``x + y`` where nobody sees the difference; returns storages for which that is not so."""
    graph = run.unrolled.graph
    position = {node: index for index, node in enumerate(graph.nodes)}
    views: dict[int, list[fx.Node]] = {}
    for node, value in run.values.items():
        for storage in storages(value):
            views.setdefault(storage, []).append(node)
    inputs = {storage for node in graph.find_nodes(op="placeholder") for storage in storages(run.values[node])}
    forms = {node: _functional(node, run) for node in run.writes}
    pinned = run.hidden_writes | (inputs & set().union(*run.writes.values()))
    for node, written in run.writes.items():
        unseen = len(written) == 1 and forms[node] and _is_last_sight(node, views[min(written)], position)
        if not unseen:
            pinned |= written
    for node, form in forms.items():
        if form is not None and run.writes[node].isdisjoint(pinned):
            node.target, node.kwargs = form
    return pinned


def _functional(node: fx.Node, run: ExampleRun) -> tuple[Any, dict[str, Any]] | None:
    """Target and keyword arguments of the operation that returns what ``node`` writes."""
    if node.op == "call_module":
        known = sample_rank(run.unrolled.get_submodule(str(node.target))) is not None
        return (node.target, node.kwargs) if known else None
    if node.kwargs.get("inplace") is True:
        return node.target, {**node.kwargs, "inplace": False}
    target = _IN_PLACE.get(node.target)
    if isinstance(node.target, str) and node.target.endswith("_") and is_known_function(node.target.rstrip("_")):
        target = node.target.rstrip("_")
    return (target, node.kwargs) if target is not None and _same_on_meta(node, target, run) else None


def _same_on_meta(node: fx.Node, target: Any, run: ExampleRun) -> bool:
    """Whether the result is what ``node`` returned also in shape and type, which writing in place does not change."""

    def value(leaf: fx.Node) -> Any:
        return tree_map(lambda v: v.on_meta() if isinstance(v, ExampleTensor) else v, run.values[leaf])

    args: Any = fx.map_arg(node.args, value)
    kwargs: Any = fx.map_arg(node.kwargs, value)
    try:
        result = getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)
    except (RuntimeError, TypeError):
        return False
    expected = run.values[node]
    return isinstance(expected, ExampleTensor) and (tuple(result.shape), result.dtype) == (
        expected.shape,
        expected.dtype,
    )


def _is_last_sight(node: fx.Node, views: list[fx.Node], position: dict[fx.Node, int]) -> bool:
    """Whether of the ``views`` of what ``node`` writes none is read afterwards, other than the result."""
    earlier = [view for view in views if position[view] < position[node]]
    users = {user for view in earlier for user in view.users}
    if node.op == "call_module":  # still writes, maybe before those that read earlier
        return users <= {*earlier, node}
    return all(position[user] <= position[node] for user in users)
