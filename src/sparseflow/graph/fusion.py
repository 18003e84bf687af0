"""From a traced graph to fused blocks: which nodes become one kernel, and which values stay packed between them.

Three passes over the graph. First, which values can be packed: what described neurons emit, and what pooling, views,
sums, products and concatenations make of it. Then every neuron claims what feeds it: a max pooling, the residual
addition, the batch norm, and the layer whose input is packed; layers that no neuron claims take their batch norm and
addition with them. Last, everything is put in order, and one unpack stands where something else looks at a packed
value.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from sparseflow.frameworks import is_unknown_neuron, neuron_spec, spikingjelly, steps_over_time, stores_sequence
from sparseflow.graph.eligibility import layer_kind, refuse
from sparseflow.graph.pooling import Window, window_of
from sparseflow.graph.steps import Block, Combine, Eager, FusedGraph, Layout, Operand, Pool, Step, Unpack, Windows
from sparseflow.graph.timeops import neuron_sequence
from sparseflow.graph.values import (
    ExampleValues,
    complement_of,
    concatenated,
    foldable_norm,
    is_addition,
    product_of,
)
from sparseflow.neuron import NeuronSpec
from sparseflow.plan import Provenance

MAX_COUNT = 255
_VIEW_METHODS = frozenset({"flatten", "unflatten", "view", "reshape", "contiguous", "detach", "squeeze", "unsqueeze"})
_VIEW_FUNCTIONS = (torch.flatten, torch.unflatten, torch.reshape, torch.squeeze, torch.unsqueeze)
_DROPOUTS = frozenset({"Dropout", "Dropout2d"})
_IDENTITIES = (nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


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
    fuser = _Fuser(model, graph, example, excluded, whole)
    contiguous = frozenset(node for node, tensor in example.tensors.items() if tensor.is_contiguous())
    return FusedGraph(graph, fuser.steps(), fuser.refusals, contiguous, bool(example.written))


class _Fuser:
    def __init__(
        self,
        model: nn.Module,
        graph: fx.GraphModule,
        example: ExampleValues,
        excluded: Collection[str],
        whole: Collection[str],
    ) -> None:
        self.values, self.excluded, self.whole = example.tensors, excluded, whole
        self.writers, self.written = example.writers, example.written
        self.modules = dict(model.named_modules())
        self.refusals: dict[str, str] = {}
        self.nodes: list[fx.Node] = list(graph.graph.nodes)
        self.packed: dict[fx.Node, Operand] = {}
        for node in self.nodes:
            self._find_packed(node)
        self.made: dict[fx.Node, Step] = {}
        self.claimed: set[fx.Node] = set()

    # ---- what the nodes are

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that ``node`` calls."""
        if node.op != "call_module" or node.target in self.whole:
            return None
        return self.modules.get(str(node.target))

    def _is_view(self, node: fx.Node) -> bool:
        if node.op == "call_method":
            return node.target in _VIEW_METHODS
        if node.op == "call_function":
            return node.target in _VIEW_FUNCTIONS
        module = self.module(node)
        if module is None or "forward" in module.__dict__:
            return False
        return isinstance(module, _IDENTITIES) or spikingjelly.is_layer(module, _DROPOUTS)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of the tensor that ``node`` makes on the example."""
        return tuple(self.values[node].shape)

    def neuron_name(self, node: fx.Node) -> str | None:
        """Qualified name of the neuron that ``node`` calls, for all time steps or for one."""
        module = self.module(node)
        if module is not None and (neuron_spec(module) or is_unknown_neuron(module)):
            return str(node.target)
        if node.op == "call_function" and node.target is neuron_sequence:
            owner = node.args[0]
            return str(owner.target) if isinstance(owner, fx.Node) and owner.op == "get_attr" else None
        return None

    def over_time(self, node: fx.Node) -> bool:
        """Whether a neuron node takes all time steps at once."""
        module = self.module(node)
        return module is None or steps_over_time(module)

    def neuron_input(self, node: fx.Node) -> fx.Node:
        """The current that a neuron node integrates."""
        return node.args[1 if node.op == "call_function" else 0]  # type: ignore[return-value]

    # ---- which values are packed

    def _find_packed(self, node: fx.Node) -> None:
        if node in self.written:
            return
        layout = self._emitted(node)
        if layout is not None:
            self.packed[node] = Operand(node, layout)
            return
        for rule in (self._spikes_of_tuple, self._viewed, self._pooled, self._combined):
            found = rule(node)
            if found is not None:
                self.packed[node] = found
                return

    def _emitted(self, node: fx.Node) -> Layout | None:
        """Layout of the spikes of a neuron that a fused block can compute."""
        name = self.neuron_name(node)
        if name is None:
            return None
        spec = neuron_spec(self.modules[name])
        why = self._why_not(node, name, spec)
        if why:
            self.refusals[name] = why
            return None
        assert spec is not None
        return self._layout_of(node, spec)

    def _why_not(self, node: fx.Node, name: str, spec: NeuronSpec | None) -> str:
        if spec is None or not spec.described:
            return f"the update rule of {type(self.modules[name]).__name__} in this configuration is not known"
        if spec.emits is not Provenance.BINARY:
            return "it emits graded spikes"
        if stores_sequence(self.modules[name]):
            return "it stores the membrane of every step (store_v_seq)"
        source = self.neuron_input(node)
        if source not in self.values or self.values[source].dtype is not torch.float32:
            return "its input is not float32"
        if node.kwargs or len(self._states(node)) not in (0, len(spec.states)):
            return "it is called with more than its input and its states"
        if self._layout_of(node, spec) is None:
            return "its input has too few dimensions, or its constants do not belong to channels"
        if not self._outputs_are_known(node, spec):
            return "the graph reads a state of it that a fused block does not keep for every step"
        return ""

    def _states(self, node: fx.Node) -> tuple[Any, ...]:
        """The states that are passed to a neuron node."""
        return tuple(node.args[2 if node.op == "call_function" else 1 :])

    def _outputs_are_known(self, node: fx.Node, spec: NeuronSpec) -> bool:
        """Whether only spikes and membrane are read of the outputs, and states are passed plainly."""
        if any(not isinstance(state, fx.Node) for state in self._states(node)):
            return False
        outputs = [self._output(user, spec) for user in node.users]
        return node in self.values or (None not in outputs and outputs.count("membrane") <= 1)

    def _output(self, user: fx.Node, spec: NeuronSpec) -> str | None:
        """``"spikes"`` or ``"membrane"``: what a getitem of a neuron's outputs reads; ``None``: neither.

        snnTorch returns ``(spk, *states)`` with the membrane last.
        """
        if user.op != "call_function" or user.target is not operator.getitem or not isinstance(user.args[1], int):
            return None
        index = user.args[1]
        if index == spec.output_index:
            return "spikes"
        return "membrane" if index in (len(spec.states), -1) else None

    def _layout_of(self, node: fx.Node, spec: NeuronSpec) -> Layout | None:
        shape = self.shape(self.neuron_input(node))
        layer = self._layer_behind(self.neuron_input(node))
        leading = 2 if self.over_time(node) else 1
        rank = self._spatial_rank(layer) if layer is not None else max(0, len(shape) - 1 - leading)
        lead = len(shape) - 1 - rank
        if lead < 1 or rank > 3:
            return None
        layout = Layout(shape[:lead], shape[lead], shape[lead + 1 :])
        constants = (spec.threshold, spec.decay, *spec.input_gains, spec.synapse_decay)
        tensors = [c for c in constants if isinstance(c, torch.Tensor) and c.numel() > 1]
        fits = all(c.dim() == 1 + rank and c.shape[0] == c.numel() == layout.channels for c in tensors)
        return layout if fits else None

    def _spatial_rank(self, layer: fx.Node) -> int:
        kind = layer_kind(self.modules[str(layer.target)]) or "linear"
        return 0 if kind == "linear" else int(kind[-2])

    def _layer_behind(self, node: fx.Node) -> fx.Node | None:
        """The layer whose output, normalised, pooled or added to, ``node`` is: it says which dimension is channels."""
        for _ in range(16):
            module = self.module(node)
            if module is not None and layer_kind(module) is not None:
                return node
            sources = [
                n for n in node.all_input_nodes if n in self.values and len(self.shape(n)) >= len(self.shape(node))
            ]
            if not sources or node not in self.values:
                return None
            node = sources[0]
        return None

    def _spikes_of_tuple(self, node: fx.Node) -> Operand | None:
        """The spikes among a neuron's outputs."""
        if node.op != "call_function" or node.target is not operator.getitem:
            return None
        source = node.args[0]
        if not isinstance(source, fx.Node) or source not in self.packed or source in self.values:
            return None
        spec = neuron_spec(self.modules[self.neuron_name(source) or ""])
        assert spec is not None
        return self.packed[source] if self._output(node, spec) == "spikes" else None

    def _viewed(self, node: fx.Node) -> Operand | None:
        """The same spikes under another shape that a layout can express."""
        module = self.module(node)
        if not self._is_view(node) or node not in self.values or not node.args or node.args[0] not in self.packed:
            return None
        if getattr(module, "p", 0) and getattr(module, "training", False):
            return None
        if self.values[node].dtype is not torch.float32:  # x.view(torch.int32) has the shape of x
            return None
        source = self.packed[node.args[0]]  # type: ignore[index]
        layout = reshaped(source.packed, self.shape(node)) if source.packed else None
        return Operand(source.node, layout) if layout is not None else None

    def _pooled(self, node: fx.Node) -> Operand | None:
        source = self._first_packed(node)
        window = self._window(node, source)
        if window is None or window.average or source is None or source.packed is None:
            return None
        size = self.shape(node)[len(source.packed.lead) + 1 :] if node in self.values else ()
        if len(self.shape(node)) != len(source.packed.shape):
            return None
        return Operand(node, Layout(source.packed.lead, source.packed.channels, size))

    def _window(self, node: fx.Node, source: Operand | None) -> Window | None:
        if source is None or source.packed is None or node not in self.values:
            return None
        return window_of(node, self.module(node), source.packed)

    def _first_packed(self, node: fx.Node) -> Operand | None:
        first = node.args[0] if node.args else None
        return self.packed.get(first) if isinstance(first, fx.Node) else None

    def _combined(self, node: fx.Node) -> Operand | None:
        parts = self._parts(node)
        if parts is None:
            return None
        layouts = [part.packed for part in parts[0] if part.packed is not None]
        first = layouts[0]
        if parts[1] == "concat":
            return Operand(node, Layout(first.lead, sum(x.channels for x in layouts), first.size))
        most = sum(x.most for x in layouts) if parts[1] == "add" else 1
        return Operand(node, Layout(first.lead, first.channels, first.size, first.flat, most))

    def _parts(self, node: fx.Node) -> tuple[tuple[Operand, ...], Any] | None:
        """Operands and operation of a sum, product or concatenation of packed values of equal layout."""
        if is_addition(node):
            return self._alike(node.args, "add")  # type: ignore[arg-type]
        factors = product_of(node)
        if factors is not None:
            for a, b in (factors, factors[::-1]):
                inner = complement_of(b)
                if inner is not None:
                    return self._alike((a, inner), "and_not")
            return self._alike(factors, "and")
        parts = concatenated(node)
        if parts is None or not parts[0] or parts[0][0] not in self.packed:
            return None
        layout = self.packed[parts[0][0]].packed
        along_channels = layout is not None and parts[1] % len(layout.shape) == len(layout.lead)
        return self._alike(parts[0], "concat") if along_channels else None

    def _alike(self, nodes: tuple[fx.Node, ...], op: str) -> tuple[tuple[Operand, ...], str] | None:
        operands = [self.packed.get(node) for node in nodes]
        found = tuple(operand for operand in operands if operand is not None and operand.packed is not None)
        if len(found) < len(nodes):
            return None
        layouts = [operand.packed for operand in found if operand.packed is not None]
        if op == "concat":
            same = len({(x.lead, x.size) for x in layouts}) == 1 and not any(x.flat for x in layouts)
        else:
            same = len({(x.lead, x.channels, x.size, x.flat) for x in layouts}) == 1
        fits = sum(x.most for x in layouts) <= MAX_COUNT if op == "add" else all(x.most == 1 for x in layouts)
        return (found, op) if same and fits else None

    # ---- which nodes are one block

    def steps(self) -> tuple[Step, ...]:
        """All steps in order; what nothing needs is left out."""
        for node in self.nodes:
            if self.neuron_name(node) is not None and node in self.packed:
                self._claim_neuron(node)
        for node in self.nodes:
            if node not in self.claimed and node not in self.written and self._reads_packed(node):
                self._claim_layer(node)
        for node in self.nodes:
            if node not in self.claimed and node not in self.made:
                self._claim_other(node)
        return _needed(_in_order(self.nodes, self.made, self.packed), self.writers)

    def _claim_neuron(self, node: fx.Node) -> None:
        name = self.neuron_name(node)
        layout = self.packed[node].packed
        assert name is not None
        assert layout is not None
        chain, current = self._chain_behind(node, layout)
        self._keep(
            Block(
                node,
                (*chain.nodes, node),
                chain.source(current),
                layout,
                chain.layer,
                chain.norm,
                chain.residual,
                name,
                self._states(node),
                self._membrane_of(node, name),
                self.over_time(node),
                chain.pool,
                chain.repeated,
            )
        )

    def _chain_behind(self, node: fx.Node, layout: Layout) -> tuple[_Chain, fx.Node]:
        """What the kernel of a neuron node can compute of the neuron's input, and the node where it begins."""
        far, near, current = _Chain(self, layout), _Chain(self, layout), self.neuron_input(node)
        begin = far.behind(current)
        begin = far.take_pool(far.take_repetition(begin) if self.over_time(node) else begin)
        begin = far.take_layer(far.take_norm(far.take_addition(begin)))
        if far.layer is not None or (far.pool is None and not far.repeated):
            return far, begin
        return near, near.take_layer(near.take_norm(near.take_addition(near.behind(current))))

    def _membrane_of(self, node: fx.Node, name: str) -> fx.Node | None:
        if node in self.values:
            return None
        spec = neuron_spec(self.modules[name])
        assert spec is not None
        return next((user for user in node.users if self._output(user, spec) == "membrane"), None)

    def _reads_packed(self, node: fx.Node) -> bool:
        """Whether ``node`` is a layer that can run on the packed value it reads."""
        module, source = self.module(node), self._first_packed(node)
        if module is None or source is None or source.packed is None or len(node.args) != 1 or node.kwargs:
            return False
        kind = layer_kind(module)
        if kind is None or refuse(module) is not None or str(node.target) in self.excluded:
            return False
        if module.weight.dtype is not torch.float32:  # type: ignore[union-attr]
            return False
        if kind == "linear":
            return source.packed.flat or not source.packed.size
        return not source.packed.flat and len(source.packed.size) == self._spatial_rank(node)

    def _reads_dense(self, node: fx.Node) -> bool:
        """Whether ``node`` is a layer on a dense tensor, such as the stem: it may be the same at every step."""
        module, source = self.module(node), node.args[0] if node.args else None
        if module is None or not isinstance(source, fx.Node) or len(node.args) != 1 or node.kwargs:
            return False
        known = layer_kind(module) is not None and source in self.values and self.values[source].dim() > 1
        return known and source not in self.packed and source not in self.written and refuse(module) is None

    def _claim_layer(self, node: fx.Node) -> None:
        """A layer without a neuron behind it: its batch norm and the addition that follow come along."""
        rank = self._spatial_rank(node)
        shape = self.shape(node)
        lead = len(shape) - 1 - rank
        layout = Layout(shape[:lead], shape[lead], shape[lead + 1 :])
        nodes, norm, residual = [node], None, None
        user = _only_user(node)
        if user is not None and user not in self.claimed and self._is_norm(user, layout):
            norm = str(user.target)
            nodes.append(user)
            user = _only_user(user)
        if user is not None and user not in self.claimed and is_addition(user) and self.shape(user) == shape:
            other = next((arg for arg in user.args if arg is not nodes[-1]), None)
            if isinstance(other, fx.Node) and self._comes_before(other, user):
                residual = self._residual(other, layout)
                nodes += [user] if residual is not None else []
        source = self._first_packed(node)
        assert source is not None
        self._keep(Block(nodes[-1], tuple(nodes), source, layout, str(node.target), norm, residual))

    def _comes_before(self, other: fx.Node, user: fx.Node) -> bool:
        return other in self.values and self.shape(other) == self.shape(user)

    def _is_norm(self, node: fx.Node, layout: Layout) -> bool:
        """Whether ``node`` is a batch norm of what ``layout`` has as its channels."""
        module = self.module(node)
        if not foldable_norm(module) or len(node.args) != 1 or node.kwargs or node not in self.values:
            return False
        channels = 2 if getattr(module, "step_mode", "s") == "m" else 1
        return (
            len(self.shape(node)) - channels == 1 + len(layout.size) and self.shape(node)[channels] == layout.channels
        )

    def _residual(self, node: fx.Node, layout: Layout) -> Operand | None:
        """How a block of ``layout`` reads what is added to its sums."""
        packed = self.packed.get(node)
        if node in self.written:
            return None
        if packed is not None and packed.packed is not None:
            x = packed.packed
            same = (x.images, x.channels, x.size, x.flat) == (layout.images, layout.channels, layout.size, False)
            return packed if same else None
        dense = node in self.values and self.values[node].dtype is torch.float32
        same = dense and math.prod(self.shape(node)) == math.prod(layout.shape)
        tail = (layout.channels, *layout.size)
        return Operand(node) if same and self.shape(node)[-len(tail) :] == tail else None

    def _claim_other(self, node: fx.Node) -> None:
        packed = self.packed.get(node)
        if packed is None:
            source = self._first_packed(node)
            window = self._window(node, source)
            if window is not None and window.average and source is not None and source.packed is not None:
                size = self.shape(node)[len(source.packed.lead) + 1 :]
                layout = Layout(source.packed.lead, source.packed.channels, size)
                self._keep(_pool_step(node, source, layout, window))
            else:
                self._keep(Eager(node, (node,)))
            return
        if packed.node is not node:  # a view of something packed
            return
        parts = self._parts(node)
        if parts is not None:
            self._keep(Combine(node, (node,), *parts))
            return
        source = self._first_packed(node)
        window = self._window(node, source)
        assert window is not None
        assert source is not None
        assert packed.packed is not None
        self._keep(_pool_step(node, source, packed.packed, window))

    def _keep(self, step: Step) -> None:
        self.made[step.out] = step
        self.claimed.update(step.nodes)
        if isinstance(step, Block) and step.membrane is not None:
            self.claimed.add(step.membrane)


class _Chain:
    """Walks back from a neuron over what one kernel can compute with it."""

    def __init__(self, fuser: _Fuser, layout: Layout) -> None:
        self._fuser, self._layout = fuser, layout
        self.nodes: tuple[fx.Node, ...] = ()
        self.layer: str | None = None
        self.norm: str | None = None
        self.residual: Operand | None = None
        self.pool: Windows | None = None
        self.repeated = False

    def behind(self, node: fx.Node) -> fx.Node:
        """``node`` or what it is a view of, as long as nobody else looks and channels and pixels stay what they are."""
        while self._mine(node) and self._fuser._is_view(node) and self._same_pixels(node.args[0]):
            self.nodes = (node, *self.nodes)
            node = node.args[0]  # type: ignore[assignment]
        return node

    def take_repetition(self, node: fx.Node) -> fx.Node:
        """Claim ``x.unsqueeze(0).expand(T, ...)``: what is behind it is computed once for all time steps."""
        one = node.args[0] if node.op == "call_method" and node.target == "expand" else None
        if not (self._mine(node) and isinstance(one, fx.Node) and self._mine(one)):
            return node
        inner = one.args[0] if one.op == "call_method" and one.target == "unsqueeze" else None
        if not isinstance(inner, fx.Node) or inner not in self._fuser.values:
            return node
        shape, whole = self._fuser.shape(inner), self._layout.shape
        repeats = self._fuser.shape(one) == (1, *shape) and self._fuser.shape(node) == whole == (whole[0], *shape)
        if not repeats or len(self._layout.lead) < 2:
            return node
        self.nodes = (one, node, *self.nodes)
        self.repeated = True
        return self.behind(inner)

    def take_pool(self, node: fx.Node) -> fx.Node:
        """Claim a max pooling of sums over windows side by side; what is behind it has larger maps."""
        sums, size = node.args[0] if node.args else None, self._layout.size
        if not (
            self._mine(node) and isinstance(sums, fx.Node) and sums in self._fuser.values and self._same_pixels(node)
        ):
            return node
        shape, rank = self._fuser.shape(sums), len(size)
        layout = Layout(shape[: len(shape) - 1 - rank], self._layout.channels, shape[len(shape) - rank :])
        window = window_of(node, self._fuser.module(node), layout)
        if window is None or window.average or not window.side_by_side or layout.shape != shape or not layout.lead:
            return node
        self.nodes = (node, *self.nodes)
        self._layout, self.pool = layout, Windows(layout.pixels, window.kernel)
        return self.behind(sums)

    def take_addition(self, node: fx.Node) -> fx.Node:
        """Claim ``node`` if it adds something to what is normalised or computed by a layer."""
        if not (self._mine(node) and is_addition(node)) or self.repeated:
            return node
        options = [(a, b) for a, b in (node.args, node.args[::-1]) if self._fuser.shape(a) == self._fuser.shape(b)]  # type: ignore[arg-type]
        ranked = sorted(options, key=lambda pair: self._work(pair[0]), reverse=True)  # type: ignore[arg-type]
        for main, other in ranked:
            residual = self._fuser._residual(other, self._layout)  # type: ignore[arg-type]
            if residual is not None and main is not other:
                self.residual = residual
                self.nodes = (node, *self.nodes)
                return self.behind(main)  # type: ignore[arg-type]
        return node

    def take_norm(self, node: fx.Node) -> fx.Node:
        """Claim a batch norm whose result nobody else reads."""
        if not (self._mine(node) and self._fuser._is_norm(node, self._layout)):
            return node
        self.norm = str(node.target)
        self.nodes = (node, *self.nodes)
        return self.behind(node.args[0])  # type: ignore[arg-type]

    def take_layer(self, node: fx.Node) -> fx.Node:
        """Claim the layer: on packed spikes it is part of the kernel, on a dense tensor it runs in front of it."""
        if self._mine(node) and (self._joins(node) or self._fuser._reads_dense(node)):
            self.layer = str(node.target)
            self.nodes = (node, *self.nodes)
            return node.args[0]  # type: ignore[return-value]
        return node

    def source(self, node: fx.Node) -> Operand:
        """What the block reads in the end."""
        packed = self._fuser.packed.get(node)
        return packed if self.layer is not None and packed is not None else Operand(node)

    def _work(self, node: fx.Node) -> int:
        """How much is gained by having ``node`` in the kernel: elements of the weight behind it."""
        node = self.behind_quietly(node)
        if self._mine(node) and self._fuser._is_norm(node, self._layout):
            node = self.behind_quietly(node.args[0])  # type: ignore[arg-type]
        if self._mine(node) and self._joins(node):
            return self._fuser.module(node).weight.numel()  # type: ignore[union-attr,operator,return-value]
        return 0

    def behind_quietly(self, node: fx.Node) -> fx.Node:
        """:meth:`behind` without claiming."""
        claimed = self.nodes
        node = self.behind(node)
        self.nodes = claimed
        return node

    def _mine(self, node: fx.Node) -> bool:
        """Whether nobody else reads ``node``, and it may be computed as late as the neuron."""
        fuser = self._fuser
        if len(node.users) != 1 or node not in fuser.values or node in fuser.claimed:
            return False
        return fuser.written.isdisjoint((node, *node.all_input_nodes))

    def _joins(self, node: fx.Node) -> bool:
        """Whether ``node`` is a layer on packed spikes whose channels are those of the neuron."""
        suits = self._fuser._reads_packed(node) and self._fuser._spatial_rank(node) == len(self._layout.size)
        return suits and not self.repeated

    def _same_pixels(self, source: Any) -> bool:
        tail = (self._layout.channels, *self._layout.size)
        known = isinstance(source, fx.Node) and source in self._fuser.values
        return known and self._fuser.shape(source)[-len(tail) :] == tail


def reshaped(layout: Layout, shape: tuple[int, ...]) -> Layout | None:
    """The layout under which packed spikes have another shape; ``None`` where channels or pixels would be torn apart.

    >>> reshaped(Layout((4, 2), 8, (3, 3)), (8, 8, 3, 3)).lead
    (8,)
    >>> reshaped(Layout((4, 2), 8, (3, 3)), (4, 2, 72)).flat
    True
    >>> reshaped(Layout((4, 2), 8, (3, 3)), (4, 2, 9, 8)) is None
    True
    """
    plain = (layout.channels, *layout.size)
    features = (layout.channels * math.prod(layout.size),)
    options = [(features, True)] if layout.flat else [(plain, False), (features, bool(layout.size))]
    for tail, flat in options:
        lead = shape[: len(shape) - len(tail)]
        if lead and shape[len(shape) - len(tail) :] == tail and math.prod(lead) == layout.images:
            return Layout(lead, layout.channels, layout.size, flat, layout.most)
    return None


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
