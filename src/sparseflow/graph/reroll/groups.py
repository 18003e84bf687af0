"""Groups: which nodes are one operation at the steps 0 to T-1, and whether all of them can be computed at once."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from typing import Any

from torch import fx
from torch.utils._pytree import tree_map

from sparseflow.graph.reroll.effects import Effects
from sparseflow.graph.reroll.example import ExampleRun, ExampleTensor
from sparseflow.graph.reroll.nodes import frozen, is_item
from sparseflow.graph.timeops import Recipe


class Kind(enum.Enum):
    """How a group is computed."""

    SLICE = "consecutive slices of one tensor"
    OPERATION = "one operation on sequences"
    NEURON = "consecutive calls of one neuron"
    ITEM = "one element of what a neuron returns"
    STEPWISE = "computed step by step, stacked where a sequence is needed"


@dataclasses.dataclass(eq=False)
class Group:
    """Nodes that are the same operation at the steps 0, 1, ... T-1.

    Attributes:
        nodes: one a step; ``None`` at steps whose value nobody uses.
        value: what the node of one step had on the example.
        source: the tensor sliced, the neuron's input or the tuple that an item is taken from: a group, or a node that
            is the same at every step.
        index: number of the first slice, or of the item.
        dim: dimension that is sliced.
        recipe: of an operation.
        states: initial states of a neuron that is given its state.
    """

    kind: Kind
    nodes: list[fx.Node | None]
    value: Any
    source: Any = None
    index: int = 0
    dim: int = 0
    recipe: Recipe | None = None
    states: tuple[Any, ...] = ()

    @property
    def steps(self) -> int:
        """T."""
        return len(self.nodes)

    @property
    def members(self) -> list[fx.Node]:
        """The nodes that there are."""
        return [node for node in self.nodes if node is not None]

    @property
    def batched(self) -> bool:
        """Whether all steps are computed at once."""
        return self.kind is not Kind.STEPWISE

    @property
    def operands(self) -> list[Group | fx.Node]:
        """What has to be there before it is computed."""
        if self.kind is Kind.STEPWISE:
            return list(self.members)
        if self.recipe is not None:
            return [operand.key for operand in self.recipe.operands]
        return [self.source, *(state for state in self.states if isinstance(state, fx.Node))]


class Groups:
    """All groups of a graph, by node.

    Attributes:
        graph: the unrolled graph.
        values: what each node had on the example.
        effects: the order that batching must keep.
    """

    def __init__(self, run: ExampleRun, effects: Effects) -> None:
        self.graph, self.values, self.effects = run.unrolled, run.values, effects
        self._places: dict[fx.Node, tuple[Group, int]] = {}

    def __contains__(self, node: object) -> bool:
        return node in self._places

    @property
    def has_layers(self) -> bool:
        """Whether a layer or a neuron is batched."""
        groups = (group for group, _ in self._places.values() if group.batched)
        return any(g.kind is Kind.NEURON or g.members[0].op == "call_module" for g in groups)

    def place(self, node: fx.Node) -> tuple[Group, int] | None:
        """Group and step of ``node``."""
        return self._places.get(node)

    def batched(self, node: fx.Node) -> tuple[Group, int] | None:
        """Group and step of ``node`` when it is computed with all others of its group."""
        place = self._places.get(node)
        return place if place is not None and place[0].batched else None

    def add(self, group: Group) -> list[fx.Node]:
        """Add ``group``, and one for each item of a tuple; returns all nodes that are in a group from now on."""
        self._places.update((node, (group, step)) for step, node in enumerate(group.nodes) if node is not None)
        added = group.members
        if isinstance(group.value, (tuple, list)):
            for index, value in enumerate(group.value):
                added += self._add_item(group, index, value)
        return added

    def _add_item(self, group: Group, index: int, value: Any) -> list[fx.Node]:
        nodes = [node and next((u for u in node.users if is_item(u, node, index)), None) for node in group.nodes]
        wanted = any(nodes) if group.batched else all(nodes)
        if not wanted or any(node in self.effects.pinned or node in self for node in nodes):
            return []
        kind = Kind.ITEM if group.batched else Kind.STEPWISE
        return self.add(Group(kind, nodes, value, source=group, index=index))

    def alike(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether all of ``nodes`` had values of the same shapes and types."""
        return len({frozen(tree_map(_shape_and_type, self.values[node])) for node in nodes}) == 1

    def feeds_back(self, group: Group) -> bool:
        """Whether an operand that is computed step by step needs a result of an earlier step of ``group``."""
        operands = (operand for operand in group.operands if isinstance(operand, Group))
        stepwise = {node for operand in operands if not operand.batched for node in operand.members}
        return bool(stepwise) and self._reaches(group.members, stepwise)

    def _reaches(self, nodes: list[fx.Node], targets: set[fx.Node]) -> bool:
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


def _shape_and_type(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, ExampleTensor) else leaf
