"""Which nodes do more than return a value, and in which order they must stay.

Batching moves a call from its own step to where all steps are computed; these nodes limit how far.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from sparseflow.frameworks import is_time_leaf
from sparseflow.graph.reroll.example import ExampleRun, storages
from sparseflow.graph.reroll.nodes import called_module
from sparseflow.graph.timeops import sample_rank
from sparseflow.graph.tracer import call_state_method

_PROCESS_WIDE = frozenset({"reset_hidden", "detach_hidden"})


class Effects:
    """Nodes whose order counts: calls of modules with state, random numbers, and views of tensors written into.

    Args:
        run: the graph with its example.
        written: storages with a write that somebody sees.

    Attributes:
        before, after: the direct neighbours of each such node in that order.
        timelines: calls and state methods of each module that may have state, in order.
        random: nodes that draw random numbers.
        pinned: nodes that touch ``written``: they stay as they are.
        overwritten: storages that modules write into.
    """

    def __init__(self, run: ExampleRun, written: set[int]) -> None:
        self.before: dict[fx.Node, set[fx.Node]] = {}
        self.after: dict[fx.Node, set[fx.Node]] = {}
        self.timelines: dict[nn.Module, list[fx.Node]] = {}
        self.random = run.random
        self.pinned: set[fx.Node] = set()
        self.overwritten = set().union(*(keys for node, keys in run.writes.items() if node.op == "call_module"))
        last: dict[object, fx.Node] = {}
        for node in run.unrolled.graph.nodes:
            for key in self._shared(run, node, written):
                self._chain(last.get(key), node)
                last[key] = node

    def is_free(self, node: fx.Node) -> bool:
        """Whether ``node`` depends on nothing but its operands. Random functions may be grouped, but not moved."""
        if node.op in ("placeholder", "output") or node in self.pinned:
            return False
        return node not in self.before or (node in self.random and node.op != "call_module")

    def _shared(self, run: ExampleRun, node: fx.Node, written: set[int]) -> list[object]:
        """What ``node`` shares with the nodes that it must not change places with."""
        shared: list[object] = [*written & _touched(node, run)]
        if shared:
            self.pinned.add(node)
        if node in run.random:
            shared.append("random numbers")
        module = called_module(run.unrolled, node)
        if module is not None and sample_rank(module) is None:
            self.timelines.setdefault(module, []).append(node)
            shared += _parts_with_state(run.unrolled, node, module)
        return shared

    def _chain(self, previous: fx.Node | None, node: fx.Node) -> None:
        before = self.before.setdefault(node, set())
        self.after.setdefault(node, set())
        if previous is not None and previous is not node:
            before.add(previous)
            self.after[previous].add(node)


def _touched(node: fx.Node, run: ExampleRun) -> set[int]:
    return set().union(*(storages(run.values[n]) for n in (node, *node.all_input_nodes)))


def _parts_with_state(graph: fx.GraphModule, node: fx.Node, module: nn.Module) -> Iterator[nn.Module]:
    """Modules whose state ``node``, which calls ``module``, may read or change."""
    everywhere = node.target is call_state_method and node.args[1] in _PROCESS_WIDE
    for part in (graph if everywhere else module).modules():
        # A surrogate function without memory is often one object in all neurons.
        if part is module or is_time_leaf(part) or next(part.buffers(recurse=False), None) is not None:
            yield part
