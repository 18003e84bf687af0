"""Which calls of a neuron are the steps of one sequence: each hands its state on to the next, with nothing between."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from typing import Any

from torch import fx, nn

from sparseflow.frameworks import is_time_leaf
from sparseflow.graph.reroll.example import ExampleTensor
from sparseflow.graph.reroll.groups import Group, Groups, Kind
from sparseflow.graph.reroll.nodes import is_item


def next_neuron(groups: Groups) -> Group | None:
    """The first calls of a neuron that can be batched, and are not yet."""
    for module, timeline in groups.effects.timelines.items():
        if is_time_leaf(module) and getattr(module, "step_mode", "s") == "s":
            calls = [_call(module, node, groups) for node in timeline]
            for start in range(len(calls)):
                group = _sequence(calls[start:], groups)
                if group is not None:
                    return group
    return None


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of a neuron: its input, and the states that it is given."""

    node: fx.Node
    operand: fx.Node
    states: tuple[Any, ...]

    @property
    def is_given_states(self) -> bool:
        return any(state is not None for state in self.states)


def _call(module: nn.Module, node: fx.Node, groups: Groups) -> _Call | None:
    """``None`` for what interrupts a chain: methods that change state, and calls that must stay where they are."""
    fixed = node in groups or node in groups.effects.random or node in groups.effects.pinned
    if fixed or node.op != "call_module":
        return None
    bound = inspect.signature(module.forward).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    operand, *states = bound.args or (None,)
    if bound.kwargs or not isinstance(operand, fx.Node) or not isinstance(groups.values[operand], ExampleTensor):
        return None
    return _Call(node, operand, tuple(states))


def _sequence(calls: list[_Call | None], groups: Groups) -> Group | None:
    """A group of the chain at the start of ``calls`` if it covers a whole sequence or repeats one input."""
    chain = _chain(calls, groups)
    if len(chain) < 2:
        return None
    source = first = chain[0].operand
    if chain[1].operand is first:
        chain = list(itertools.takewhile(lambda call: call.operand is first, chain))
    else:
        source, step = groups.place(first) or (None, 0)
        if source is None or step != 0 or [call.operand for call in chain[: source.steps]] != source.nodes:
            return None
        chain = chain[: source.steps]
    nodes = [call.node for call in chain]
    states = chain[0].states if chain[1].is_given_states else ()
    group = Group(Kind.NEURON, [*nodes], groups.values[nodes[0]], source=source, states=states)
    return group if groups.alike(nodes) and not groups.feeds_back(group) else None


def _chain(calls: list[_Call | None], groups: Groups) -> list[_Call]:
    """The calls from the first one on that hand on their state, each to the next, in the way of the first two."""
    if len(calls) < 2 or calls[0] is None or calls[1] is None:
        return []
    chain, given = [calls[0]], calls[1].is_given_states
    if calls[0].is_given_states and not given:
        return chain
    for call in calls[1:]:
        if call is None or call.is_given_states is not given or (given and not _hands_on(chain[-1], call, groups)):
            break
        chain.append(call)
    return chain


def _hands_on(call: _Call, following: _Call, groups: Groups) -> bool:
    """Whether the states of the following call are the last outputs of this one."""
    states, value = following.states, groups.values[call.node]
    if not isinstance(value, (tuple, list)):
        return states == (call.node,)
    skipped = len(value) - len(states)
    return skipped >= 0 and all(is_item(s, call.node, i) for i, s in enumerate(states, skipped))
