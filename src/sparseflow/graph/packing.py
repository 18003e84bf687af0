"""Which values of a traced graph can be packed: what described neurons emit, and what pooling, views, sums, products
and concatenations make of it."""

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
from sparseflow.graph.steps import Layout, Operand
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


class Packing:
    """The values of a graph that can stay packed, and what may be asked of its nodes once they are known.

    Args:
        model: whose modules the graph calls.
        graph: a traced graph.
        example: what the nodes do on the example.
        excluded: layers that may not become part of a block.
        whole: modules that must be called as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: fx.GraphModule,
        example: ExampleValues,
        excluded: Collection[str],
        whole: Collection[str],
    ) -> None:
        self.values, self.written = example.tensors, example.written
        self.modules = dict(model.named_modules())
        self.nodes: list[fx.Node] = list(graph.graph.nodes)
        self.refusals: dict[str, str] = {}
        self.packed: dict[fx.Node, Operand] = {}
        self._excluded, self._whole = excluded, whole
        for node in self.nodes:
            self._find_packed(node)

    # ---- what the nodes are

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that ``node`` calls."""
        if node.op != "call_module" or node.target in self._whole:
            return None
        return self.modules.get(str(node.target))

    def is_view(self, node: fx.Node) -> bool:
        """Whether ``node`` is its first argument under another shape, or unchanged."""
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

    def states_of(self, node: fx.Node) -> tuple[Any, ...]:
        """The states that are passed to a neuron node."""
        return tuple(node.args[2 if node.op == "call_function" else 1 :])

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
        if node.kwargs or len(self.states_of(node)) not in (0, len(spec.states)):
            return "it is called with more than its input and its states"
        if self._layout_of(node, spec) is None:
            return "its input has too few dimensions, or its constants do not belong to channels"
        if not self._outputs_are_known(node, spec):
            return "the graph reads a state of it that a fused block does not keep for every step"
        return ""

    def _outputs_are_known(self, node: fx.Node, spec: NeuronSpec) -> bool:
        """Whether only spikes and membrane are read of the outputs, and states are passed plainly."""
        if any(not isinstance(state, fx.Node) for state in self.states_of(node)):
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
        rank = self.spatial_rank(layer) if layer is not None else max(0, len(shape) - 1 - leading)
        lead = len(shape) - 1 - rank
        if lead < 1 or rank > 3:
            return None
        layout = Layout(shape[:lead], shape[lead], shape[lead + 1 :])
        constants = (spec.threshold, spec.decay, *spec.input_gains, spec.synapse_decay)
        tensors = [c for c in constants if isinstance(c, torch.Tensor) and c.numel() > 1]
        fits = all(c.dim() == 1 + rank and c.shape[0] == c.numel() == layout.channels for c in tensors)
        return layout if fits else None

    def spatial_rank(self, layer: fx.Node) -> int:
        """Spatial dimensions of a layer's maps; 0 for a linear one."""
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
        if not self.is_view(node) or node not in self.values or not node.args or node.args[0] not in self.packed:
            return None
        if getattr(module, "p", 0) and getattr(module, "training", False):
            return None
        if self.values[node].dtype is not torch.float32:  # x.view(torch.int32) has the shape of x
            return None
        source = self.packed[node.args[0]]  # type: ignore[index]
        layout = reshaped(source.packed, self.shape(node)) if source.packed else None
        return Operand(source.node, layout) if layout is not None else None

    def _pooled(self, node: fx.Node) -> Operand | None:
        source = self.first_packed(node)
        window = self.window(node, source)
        if window is None or window.average or source is None or source.packed is None:
            return None
        size = self.shape(node)[len(source.packed.lead) + 1 :] if node in self.values else ()
        if len(self.shape(node)) != len(source.packed.shape):
            return None
        return Operand(node, Layout(source.packed.lead, source.packed.channels, size))

    def window(self, node: fx.Node, source: Operand | None) -> Window | None:
        """The windows of a pooling of a packed value."""
        if source is None or source.packed is None or node not in self.values:
            return None
        return window_of(node, self.module(node), source.packed)

    def first_packed(self, node: fx.Node) -> Operand | None:
        """The first argument, if it is packed."""
        first = node.args[0] if node.args else None
        return self.packed.get(first) if isinstance(first, fx.Node) else None

    def _combined(self, node: fx.Node) -> Operand | None:
        parts = self.parts(node)
        if parts is None:
            return None
        layouts = [part.packed for part in parts[0] if part.packed is not None]
        first = layouts[0]
        if parts[1] == "concat":
            return Operand(node, Layout(first.lead, sum(x.channels for x in layouts), first.size))
        most = sum(x.most for x in layouts) if parts[1] == "add" else 1
        return Operand(node, Layout(first.lead, first.channels, first.size, first.flat, most))

    def parts(self, node: fx.Node) -> tuple[tuple[Operand, ...], Any] | None:
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

    # ---- what a block can take in

    def membrane_of(self, node: fx.Node, name: str) -> fx.Node | None:
        """The node that reads the membrane among a neuron node's outputs."""
        if node in self.values:
            return None
        spec = neuron_spec(self.modules[name])
        assert spec is not None
        return next((user for user in node.users if self._output(user, spec) == "membrane"), None)

    def reads_packed(self, node: fx.Node) -> bool:
        """Whether ``node`` is a layer that can run on the packed value it reads."""
        module, source = self.module(node), self.first_packed(node)
        if module is None or source is None or source.packed is None or len(node.args) != 1 or node.kwargs:
            return False
        kind = layer_kind(module)
        if kind is None or refuse(module) is not None or str(node.target) in self._excluded:
            return False
        if module.weight.dtype is not torch.float32:  # type: ignore[union-attr]
            return False
        if kind == "linear":
            return source.packed.flat or not source.packed.size
        return not source.packed.flat and len(source.packed.size) == self.spatial_rank(node)

    def reads_dense(self, node: fx.Node) -> bool:
        """Whether ``node`` is a layer on a dense tensor, such as the stem: it may be the same at every step."""
        module, source = self.module(node), node.args[0] if node.args else None
        if module is None or not isinstance(source, fx.Node) or len(node.args) != 1 or node.kwargs:
            return False
        known = layer_kind(module) is not None and source in self.values and self.values[source].dim() > 1
        return known and source not in self.packed and source not in self.written and refuse(module) is None

    def is_norm(self, node: fx.Node, layout: Layout) -> bool:
        """Whether ``node`` is a batch norm of what ``layout`` has as its channels."""
        module = self.module(node)
        if not foldable_norm(module) or len(node.args) != 1 or node.kwargs or node not in self.values:
            return False
        channels = 2 if getattr(module, "step_mode", "s") == "m" else 1
        return (
            len(self.shape(node)) - channels == 1 + len(layout.size) and self.shape(node)[channels] == layout.channels
        )

    def residual(self, node: fx.Node, layout: Layout) -> Operand | None:
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
