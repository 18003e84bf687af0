"""A traced network with temporal layers in the place of some of its layers and neurons."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from sparseflow.errors import SparseflowError
from sparseflow.frameworks import neuron_spec
from sparseflow.neuron import Charge

from .modules import TAC, TACTP, Aggregated
from .sites import Site, is_time_view


class TimeError(SparseflowError):
    """A network does something with the frames that it cannot do once there are fewer of them."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a site becomes: K, and whether time is preserved or collapsed."""

    group_size: int
    preserve: bool


def unflatten_like(flat: Tensor, sequence: Tensor) -> Tensor:
    """``[T * N, ...]`` with the T of ``sequence [T, N, ...]``.

    >>> import torch
    >>> unflatten_like(torch.zeros(6, 4), torch.zeros(3, 2)).shape
    torch.Size([3, 2, 4])
    """
    return flat.unflatten(0, (sequence.shape[0], -1))


def rewrite(
    graph: fx.GraphModule, sites: Sequence[Site], chosen: Mapping[str, Choice], values: Mapping[fx.Node, Tensor]
) -> fx.GraphModule:
    """``graph`` with a temporal layer for every site that ``chosen`` names; modules are shared with ``graph``.

    Behind a layer that collapses time by K each frame stands for K steps; the temporal layers there, with a group size
    of 1 if nothing else was chosen, count on that, everything else takes a frame for a step.
    """
    writer = _Writer(graph, sites, chosen, values)
    return writer.module()


class _Writer:
    def __init__(
        self,
        graph: fx.GraphModule,
        sites: Sequence[Site],
        chosen: Mapping[str, Choice],
        values: Mapping[fx.Node, Tensor],
    ):
        self.old, self.values, self.chosen = graph, values, chosen
        self.of = {node: site for site in sites for node in (*site.nodes, site.call)}
        self.new = fx.Graph()
        self.map: dict[fx.Node, fx.Node] = {}
        self.hold: dict[fx.Node, int] = {}
        self.blocks: dict[str, Aggregated] = {}
        self.lead: tuple[int, int] | None = next(((s.steps, _samples(s, values)) for s in sites), None)

    def module(self) -> fx.GraphModule:
        for node in self.old.graph.nodes:
            self.hold[node] = max((self.hold[n] for n in node.all_input_nodes), default=1)
            site = self.of.get(node)
            choice = None if site is None else self._choice(site)
            if site is None or choice is None:
                self.map[node] = self._copied(node)
            elif node is site.call:
                self.map[node] = self._temporal(site, choice)
                self.hold[node] *= 1 if choice.preserve else choice.group_size
        for node in self.new.find_nodes(op="get_attr"):  # modules that neuron_sequence was given
            if not node.users:
                self.new.erase_node(node)
        self.new.lint()
        return fx.GraphModule(_root(self.old, self.blocks), self.new, type(self.old).__name__)

    def _choice(self, site: Site) -> Choice | None:
        behind = self.hold[site.source] > 1 and _can_hold(self.old.get_submodule(site.neuron))
        return self.chosen.get(site.name) or (Choice(1, False) if behind else None)

    def _copied(self, node: fx.Node) -> fx.Node:
        assert self.lead is not None
        if is_time_view(node, self.values, self.lead) and self.values[node].shape[:2] == self.lead:
            sequence = self._sequence_of(node.all_input_nodes[0])
            if sequence is not None:
                return self.new.call_function(unflatten_like, (self.map[node.all_input_nodes[0]], self.map[sequence]))
        return self.new.node_copy(node, lambda n: self.map[n])

    def _sequence_of(self, flat: fx.Node) -> fx.Node | None:
        """The sequence ``[T, N, ...]`` that a flat value was made from."""
        assert self.lead is not None
        while True:
            if is_time_view(flat, self.values, self.lead):
                return flat.all_input_nodes[0]
            sources = [n for n in flat.all_input_nodes if n in self.values and len(self.values[n].shape) > 0]
            sources = [n for n in sources if self.values[n].shape[0] == self.lead[0] * self.lead[1]]
            if not sources:
                return None
            flat = sources[0]

    def _temporal(self, site: Site, choice: Choice) -> fx.Node:
        neuron = self.old.get_submodule(site.neuron)
        layer = _currents(self.old, site, self.values)
        if choice.preserve:
            block: Aggregated = TACTP(layer, neuron, choice.group_size, normalise=True)
        else:
            block = TAC(layer, neuron, choice.group_size)
        block.hold = self.hold[site.source]
        name = f"temporal_{site.name.replace('.', '_')}"
        self.blocks[name] = block.train(neuron.training)
        source = self.map[site.source]
        if not site.sequence:
            sequence = self._sequence_of(site.source)
            if sequence is None:
                raise TimeError(f"the frames of the input of {site.name} could not be told from its samples")
            source = self.new.call_function(unflatten_like, (source, self.map[sequence]))
        states = site.call.args[2 if site.call.op == "call_function" else 1 :]
        return self.new.call_module(name, (source, *(self.map[s] if isinstance(s, fx.Node) else s for s in states)))


def _can_hold(neuron: nn.Module) -> bool:
    """Whether a frame can stand for several steps of ``neuron``; otherwise it is taken for one step."""
    spec = neuron_spec(neuron)
    return spec is not None and spec.described and spec.charge is not Charge.SYNAPTIC


def _samples(site: Site, values: Mapping[fx.Node, Tensor]) -> int:
    current = site.call.args[1 if site.call.op == "call_function" else 0]
    return int(values[current].shape[1])  # type: ignore[index]


def _root(old: fx.GraphModule, blocks: Mapping[str, Aggregated]) -> nn.Module:
    root = nn.Module().train(old.training)
    root._modules.update(old._modules)
    root._parameters.update(old._parameters)
    root._buffers.update(old._buffers)
    for name, block in blocks.items():
        root.add_module(name, block)
    return root


def _currents(old: fx.GraphModule, site: Site, values: Mapping[fx.Node, Tensor]) -> fx.GraphModule:
    """What a site does between its input and its neuron, without putting T and N together or apart."""
    graph = fx.Graph()
    last = graph.placeholder("x")
    lead = (site.steps, _samples(site, values))
    for node in site.nodes:
        if not is_time_view(node, values, lead):
            last = graph.node_copy(node, {node.all_input_nodes[0]: last}.__getitem__)
    graph.output(last)
    return fx.GraphModule(old, graph, "Currents")


class Checked(fx.Interpreter):
    """Runs a rewritten network on its example, and sees to it that nothing mixes frames of different length.

    Raises:
        TimeError: in :meth:`run`, if values that had the same number of frames no longer have, or one frame of a
            sequence that has become shorter is asked for.
    """

    def __init__(self, module: fx.GraphModule, steps: int):
        super().__init__(module)
        self.steps = steps
        self.short: dict[fx.Node, int] = {}

    @override
    def run_node(self, n: fx.Node) -> Any:
        args, _ = self.fetch_args_kwargs_from_env(n)
        inputs = n.all_input_nodes
        short = {self.short[i] for i in inputs if i in self.short}
        if len(short) > 1 or (short and any(self._is_long(i) for i in inputs)):
            raise TimeError(f"{n.name} needs values of the same time steps, of which one has fewer now")
        if short and _reads_a_frame(n, args):
            raise TimeError(f"{n.name} reads single time steps, of which there are fewer now")
        value = super().run_node(n)
        self._note(n, value, short)
        return value

    def _is_long(self, node: fx.Node) -> bool:
        value = self.env.get(node)
        return node not in self.short and isinstance(value, Tensor) and value.dim() > 1 and len(value) == self.steps

    def _note(self, n: fx.Node, value: Any, short: set[int]) -> None:
        if n.op == "call_module" and isinstance(self.submodules.get(str(n.target)), TAC):
            frames = {len(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}
            if frames != {self.steps}:
                self.short[n] = max(frames)
            return
        kept = [s for s in short if isinstance(value, (tuple, list)) or _has_frames(value, s)]
        if kept:
            self.short[n] = kept[0]


def _has_frames(value: Any, steps: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] % steps == 0


def _reads_a_frame(node: fx.Node, args: tuple[Any, ...]) -> bool:
    """Whether ``node`` takes one item, or a part, of a tensor's first dimension."""
    named = getattr(node.target, "__name__", str(node.target))
    if named not in ("getitem", "select", "narrow", "unbind", "split", "chunk"):
        return False
    return bool(args) and isinstance(args[0], Tensor)
