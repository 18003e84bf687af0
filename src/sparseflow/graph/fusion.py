"""From a traced graph to fused blocks: which nodes become one kernel, and which values stay packed between them.

Three passes over the graph. First, which values can be packed: what described neurons emit, and what pooling, views,
sums, products and concatenations make of it. Then every neuron claims what feeds it: a max pooling, the residual
addition, the batch norm, and the layer whose input is packed; layers that no neuron claims take their batch norm and
addition with them. Last, everything is put in order, and one unpack stands where something else looks at a packed
value.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx, nn

from sparseflow.graph.claim import Claim
from sparseflow.graph.packing import Packing
from sparseflow.graph.pooling import Window
from sparseflow.graph.steps import Block, Combine, Eager, FusedGraph, Layout, Operand, Pool, Step, Unpack
from sparseflow.graph.values import ExampleValues, is_addition


def fuse(
    model: nn.Module,
    graph: fx.GraphModule,
    example: ExampleValues,
    excluded: Collection[str] = (),
    whole: Collection[str] = (),
) -> FusedGraph:
    """Find the fused blocks of ``graph``, traced from ``model``.

    Args:
        model: whose modules the graph calls.
        graph: a traced, and where its forward loops over time a re-rolled, graph.
        example: what the nodes do on the example (:func:`~sparseflow.graph.values.example_values`).
        excluded: layers that may not become part of a block.
        whole: modules that must be called as they are, because somebody has hooked them.
    """
    packing = Packing(model, graph, example, excluded, whole)
    steps = _Fuser(packing, example.writers).steps()
    contiguous = frozenset(node for node, tensor in example.tensors.items() if tensor.is_contiguous())
    return FusedGraph(graph, steps, packing.refusals, contiguous, bool(example.written))


class _Fuser:
    """Hands out the nodes of a graph to steps."""

    def __init__(self, packing: Packing, writers: Collection[fx.Node]) -> None:
        self._packing, self._writers = packing, writers
        self._made: dict[fx.Node, Step] = {}
        self._claimed: set[fx.Node] = set()

    def steps(self) -> tuple[Step, ...]:
        """All steps in order; what nothing needs is left out."""
        for node in self._packing.nodes:
            if self._packing.neuron_name(node) is not None and node in self._packing.packed:
                self._claim_neuron(node)
        for node in self._packing.nodes:
            if node not in self._claimed and node not in self._packing.written and self._packing.reads_packed(node):
                self._claim_layer(node)
        for node in self._packing.nodes:
            if node not in self._claimed and node not in self._made:
                self._claim_other(node)
        return _needed(_in_order(self._packing.nodes, self._made, self._packing.packed), self._writers)

    def _claim_neuron(self, node: fx.Node) -> None:
        name = self._packing.neuron_name(node)
        layout = self._packing.packed[node].packed
        assert name is not None
        assert layout is not None
        claim, current = self._claim_behind(node, layout)
        self._keep(
            Block(
                node,
                (*claim.nodes, node),
                claim.source(current),
                layout,
                claim.layer,
                claim.norm,
                claim.residual,
                name,
                self._packing.states_of(node),
                self._packing.membrane_of(node, name),
                self._packing.over_time(node),
                claim.pool,
                claim.repeated,
            )
        )

    def _claim_behind(self, node: fx.Node, layout: Layout) -> tuple[Claim, fx.Node]:
        """What the kernel of a neuron node can compute of the neuron's input, and the node where it begins."""
        far, near = (Claim(self._packing, self._claimed, layout) for _ in range(2))
        current = self._packing.neuron_input(node)
        begin = far.behind(current)
        begin = far.take_pool(far.take_repetition(begin) if self._packing.over_time(node) else begin)
        begin = far.take_layer(far.take_norm(far.take_addition(begin)))
        if far.layer is not None or (far.pool is None and not far.repeated):
            return far, begin
        return near, near.take_layer(near.take_norm(near.take_addition(near.behind(current))))

    def _claim_layer(self, node: fx.Node) -> None:
        """A layer without a neuron behind it: its batch norm and the addition that follow come along."""
        rank = self._packing.spatial_rank(node)
        shape = self._packing.shape(node)
        lead = len(shape) - 1 - rank
        layout = Layout(shape[:lead], shape[lead], shape[lead + 1 :])
        nodes, norm, residual = [node], None, None
        user = _only_user(node)
        if user is not None and user not in self._claimed and self._packing.is_norm(user, layout):
            norm = str(user.target)
            nodes.append(user)
            user = _only_user(user)
        if user is not None and user not in self._claimed and is_addition(user) and self._packing.shape(user) == shape:
            other = next((arg for arg in user.args if arg is not nodes[-1]), None)
            if isinstance(other, fx.Node) and self._comes_before(other, user):
                residual = self._packing.residual(other, layout)
                nodes += [user] if residual is not None else []
        source = self._packing.first_packed(node)
        assert source is not None
        self._keep(Block(nodes[-1], tuple(nodes), source, layout, str(node.target), norm, residual))

    def _comes_before(self, other: fx.Node, user: fx.Node) -> bool:
        return other in self._packing.values and self._packing.shape(other) == self._packing.shape(user)

    def _claim_other(self, node: fx.Node) -> None:
        packed = self._packing.packed.get(node)
        if packed is None:
            source = self._packing.first_packed(node)
            window = self._packing.window(node, source)
            if window is not None and window.average and source is not None and source.packed is not None:
                size = self._packing.shape(node)[len(source.packed.lead) + 1 :]
                layout = Layout(source.packed.lead, source.packed.channels, size)
                self._keep(_pool_step(node, source, layout, window))
            else:
                self._keep(Eager(node, (node,)))
            return
        if packed.node is not node:  # a view of something packed
            return
        parts = self._packing.parts(node)
        if parts is not None:
            self._keep(Combine(node, (node,), *parts))
            return
        source = self._packing.first_packed(node)
        window = self._packing.window(node, source)
        assert window is not None
        assert source is not None
        assert packed.packed is not None
        self._keep(_pool_step(node, source, packed.packed, window))

    def _keep(self, step: Step) -> None:
        self._made[step.out] = step
        self._claimed.update(step.nodes)
        if isinstance(step, Block) and step.membrane is not None:
            self._claimed.add(step.membrane)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _pool_step(node: fx.Node, source: Operand, layout: Layout, window: Window) -> Pool:
    arguments = (window.average, window.kernel, window.stride, window.padding, window.dilation, window.include_pad)
    return Pool(node, (node,), source, layout, *arguments)


def _in_order(nodes: list[fx.Node], made: dict[fx.Node, Step], packed: dict[fx.Node, Operand]) -> list[Step]:
    """Every step where its last node stands, unpacks in front of the first that needs them."""
    steps: list[Step] = []
    unpacked: set[fx.Node] = set()
    for node in nodes:
        step = made.get(node)
        if step is None:
            continue
        for operand in step.operands:
            if operand.packed is None and operand.node in packed and operand.node not in unpacked:
                unpacked.add(operand.node)
                steps.append(Unpack(operand.node, (), packed[operand.node]))
        steps.append(step)
    return steps


def _needed(steps: list[Step], writers: Collection[fx.Node]) -> tuple[Step, ...]:
    """Steps without those whose result nobody reads and that have no effect."""
    wanted: set[tuple[fx.Node, bool]] = set()
    kept: list[Step] = []
    for step in reversed(steps):
        results = {(step.out, step.makes_packed)}
        if isinstance(step, Block) and step.membrane is not None:
            results.add((step.membrane, False))
        effect = isinstance(step, Block) and step.neuron is not None
        pure = step.out.op == "call_function" and step.out not in writers and not step.out.is_impure()
        effect = effect or (isinstance(step, Eager) and not pure)
        if effect or results & wanted:
            kept.append(step)
            wanted |= {(operand.node, operand.packed is not None) for operand in step.operands}
    return tuple(reversed(kept))
