"""What of the input of a neuron its kernel can compute."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx

from sparseflow.graph.packing import Packing
from sparseflow.graph.pooling import window_of
from sparseflow.graph.steps import Layout, Operand, Windows
from sparseflow.graph.values import is_addition


class Claim:
    """What a neuron claims: walks back from it over what one kernel can compute with it."""

    def __init__(self, packing: Packing, claimed: Collection[fx.Node], layout: Layout) -> None:
        self._packing, self._claimed, self._layout = packing, claimed, layout
        self.nodes: tuple[fx.Node, ...] = ()
        self.layer: str | None = None
        self.norm: str | None = None
        self.residual: Operand | None = None
        self.pool: Windows | None = None
        self.repeated = False

    def behind(self, node: fx.Node) -> fx.Node:
        """``node`` or what it is a view of, as long as nobody else looks and channels and pixels stay what they are."""
        while self._mine(node) and self._packing.is_view(node) and self._same_pixels(node.args[0]):
            self.nodes = (node, *self.nodes)
            node = node.args[0]  # type: ignore[assignment]
        return node

    def take_repetition(self, node: fx.Node) -> fx.Node:
        """Claim ``x.unsqueeze(0).expand(T, ...)``: what is behind it is computed once for all time steps."""
        one = node.args[0] if node.op == "call_method" and node.target == "expand" else None
        if not (self._mine(node) and isinstance(one, fx.Node) and self._mine(one)):
            return node
        inner = one.args[0] if one.op == "call_method" and one.target == "unsqueeze" else None
        if not isinstance(inner, fx.Node) or inner not in self._packing.values:
            return node
        shape, whole = self._packing.shape(inner), self._layout.shape
        repeats = self._packing.shape(one) == (1, *shape) and self._packing.shape(node) == whole == (whole[0], *shape)
        if not repeats or len(self._layout.lead) < 2:
            return node
        self.nodes = (one, node, *self.nodes)
        self.repeated = True
        return self.behind(inner)

    def take_pool(self, node: fx.Node) -> fx.Node:
        """Claim a max pooling of sums over windows side by side; what is behind it has larger maps."""
        sums, size = node.args[0] if node.args else None, self._layout.size
        if not (
            self._mine(node) and isinstance(sums, fx.Node) and sums in self._packing.values and self._same_pixels(node)
        ):
            return node
        shape, rank = self._packing.shape(sums), len(size)
        layout = Layout(shape[: len(shape) - 1 - rank], self._layout.channels, shape[len(shape) - rank :])
        window = window_of(node, self._packing.module(node), layout)
        if window is None or window.average or not window.side_by_side or layout.shape != shape or not layout.lead:
            return node
        self.nodes = (node, *self.nodes)
        self._layout, self.pool = layout, Windows(layout.pixels, window.kernel)
        return self.behind(sums)

    def take_addition(self, node: fx.Node) -> fx.Node:
        """Claim ``node`` if it adds something to what is normalised or computed by a layer."""
        if not (self._mine(node) and is_addition(node)) or self.repeated:
            return node
        options = [(a, b) for a, b in (node.args, node.args[::-1]) if self._packing.shape(a) == self._packing.shape(b)]  # type: ignore[arg-type]
        ranked = sorted(options, key=lambda pair: self._work(pair[0]), reverse=True)  # type: ignore[arg-type]
        for main, other in ranked:
            residual = self._packing.residual(other, self._layout)  # type: ignore[arg-type]
            if residual is not None and main is not other:
                self.residual = residual
                self.nodes = (node, *self.nodes)
                return self.behind(main)  # type: ignore[arg-type]
        return node

    def take_norm(self, node: fx.Node) -> fx.Node:
        """Claim a batch norm whose result nobody else reads."""
        if not (self._mine(node) and self._packing.is_norm(node, self._layout)):
            return node
        self.norm = str(node.target)
        self.nodes = (node, *self.nodes)
        return self.behind(node.args[0])  # type: ignore[arg-type]

    def take_layer(self, node: fx.Node) -> fx.Node:
        """Claim the layer: on packed spikes it is part of the kernel, on a dense tensor it runs in front of it."""
        if self._mine(node) and (self._joins(node) or self._packing.reads_dense(node)):
            self.layer = str(node.target)
            self.nodes = (node, *self.nodes)
            return node.args[0]  # type: ignore[return-value]
        return node

    def source(self, node: fx.Node) -> Operand:
        """What the block reads in the end."""
        packed = self._packing.packed.get(node)
        return packed if self.layer is not None and packed is not None else Operand(node)

    def _work(self, node: fx.Node) -> int:
        """How much is gained by having ``node`` in the kernel: elements of the weight behind it."""
        node = self.behind_quietly(node)
        if self._mine(node) and self._packing.is_norm(node, self._layout):
            node = self.behind_quietly(node.args[0])  # type: ignore[arg-type]
        if self._mine(node) and self._joins(node):
            return self._packing.module(node).weight.numel()  # type: ignore[union-attr,operator,return-value]
        return 0

    def behind_quietly(self, node: fx.Node) -> fx.Node:
        """:meth:`behind` without claiming."""
        claimed = self.nodes
        node = self.behind(node)
        self.nodes = claimed
        return node

    def _mine(self, node: fx.Node) -> bool:
        """Whether nobody else reads ``node``, and it may be computed as late as the neuron."""
        packing = self._packing
        if len(node.users) != 1 or node not in packing.values or node in self._claimed:
            return False
        return packing.written.isdisjoint((node, *node.all_input_nodes))

    def _joins(self, node: fx.Node) -> bool:
        """Whether ``node`` is a layer on packed spikes whose channels are those of the neuron."""
        suits = self._packing.reads_packed(node) and self._packing.spatial_rank(node) == len(self._layout.size)
        return suits and not self.repeated

    def _same_pixels(self, source: Any) -> bool:
        tail = (self._layout.channels, *self._layout.size)
        known = isinstance(source, fx.Node) and source in self._packing.values
        return known and self._packing.shape(source)[-len(tail) :] == tail
