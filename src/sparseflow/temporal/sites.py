"""Where a traced network can be aggregated: a layer, what follows it frame by frame, and the neuron behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor, fx, nn

from sparseflow.frameworks import is_unknown_neuron, neuron_spec, steps_over_time
from sparseflow.graph.eligibility import layer_kind
from sparseflow.graph.timeops import is_known_function, neuron_sequence
from sparseflow.graph.values import foldable_norm

_NOT_AFFINE = ("MaxPool", "max_pool")
_ONCE = "its input is the same at every step, and computed once already"


@dataclasses.dataclass(frozen=True)
class Site:
    """One place for a temporal layer.

    Attributes:
        name: of the layer.
        neuron: name of the neuron.
        nodes: the layer's node and those behind it, in order, up to the neuron's.
        call: the neuron's node.
        source: what goes into the layer.
        sequence: whether that, and so all between it and the neuron, is ``[T, N, ...]`` and not flat.
        mixed: whether some of ``nodes`` takes sequences and some single frames.
        steps: T on the example.
        affine: whether everything in ``nodes`` is, so that a chunk's currents are exactly those of its frames.
    """

    name: str
    neuron: str
    nodes: tuple[fx.Node, ...]
    call: fx.Node
    source: fx.Node
    sequence: bool
    mixed: bool
    steps: int
    affine: bool


def find_sites(graph: fx.GraphModule, values: Mapping[fx.Node, Tensor]) -> tuple[list[Site], dict[str, str]]:
    """Sites of ``graph`` in order, and for every other layer that runs over time why it is none.

    Args:
        graph: traced, and where its forward loops over time re-rolled.
        values: shapes on the example (:func:`~sparseflow.graph.values.example_values`).
    """
    modules = dict(graph.named_modules())
    sites: list[Site] = []
    refused: dict[str, str] = {}
    for node in graph.graph.nodes:
        name = _neuron_name(node, modules)
        if name is None:
            continue
        found = _site(node, name, modules, values)
        if not isinstance(found, Site):
            refused[name] = found
        elif found.mixed:
            refused[name] = f"some of what is between {found.name} and it takes sequences, and some single frames"
        else:
            sites.append(found)
    twice = {site.name for site in sites if sum(other.name == site.name for other in sites) > 1}
    refused |= {site.neuron: "its layer is called more than once" for site in sites if site.name in twice}
    return [site for site in sites if site.name not in twice], refused


def _neuron_name(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    if node.op == "call_module":
        module = modules[str(node.target)]
        return str(node.target) if neuron_spec(module) or is_unknown_neuron(module) else None
    if node.op == "call_function" and node.target is neuron_sequence:
        owner = node.args[0]
        return str(owner.target) if isinstance(owner, fx.Node) else None
    return None


def _site(call: fx.Node, neuron: str, modules: Mapping[str, nn.Module], values: Mapping[fx.Node, Tensor]) -> Site | str:
    if call.op == "call_module" and not steps_over_time(modules[neuron]):
        return "it is called once a time step, and the loop could not be computed for all steps at once"
    current = call.args[1 if call.op == "call_function" else 0]
    if not isinstance(current, fx.Node) or current not in values:
        return "its input is not one tensor"
    steps, samples = (int(size) for size in values[current].shape[:2])
    lead, sequence = (steps, samples), True  # what a neuron is given over time is a sequence
    nodes: list[fx.Node] = []
    forms: set[bool] = set()
    while not nodes or not _is_layer(nodes[0], modules):
        why = _why_not(current, modules, values, lead)
        if why:
            return why
        nodes.insert(0, current)
        if is_time_view(current, values, lead):
            sequence = not sequence
        else:
            forms.add(sequence)
        current = current.all_input_nodes[0]
    if not _has_time(current, values, lead):
        return _ONCE
    affine = not any(part in _what(node, modules) for node in nodes for part in _NOT_AFFINE)
    name = str(nodes[0].target)
    return Site(name, neuron, tuple(nodes), call, current, sequence, len(forms) > 1, steps, affine)


def _is_layer(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    return node.op == "call_module" and layer_kind(modules[str(node.target)]) is not None


def _what(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    if node.op == "call_module":
        return type(modules[str(node.target)]).__name__
    return getattr(node.target, "__name__", str(node.target))


def _why_not(
    node: fx.Node, modules: Mapping[str, nn.Module], values: Mapping[fx.Node, Tensor], lead: tuple[int, int]
) -> str:
    """Why ``node`` cannot stand between a temporal layer's input and its neuron; empty if it can."""
    if node.op not in ("call_module", "call_function", "call_method"):
        return "no convolution or linear layer is behind its input alone"
    what = _what(node, modules)
    if len(node.all_input_nodes) != 1:
        return f"{what} joins its input with something else"
    if len(node.users) != 1:
        return f"the output of {what} is also read elsewhere"
    if not _has_time(node, values, lead):
        return _ONCE
    if node.op == "call_module":
        return "" if _per_frame(modules[str(node.target)]) else f"{what} is not computed frame by frame"
    return "" if is_time_view(node, values, lead) or is_known_function(what) else f"{what} is not known"


def _per_frame(module: nn.Module) -> bool:
    """Layers, normalisations by constants, pooling and the like: whatever treats samples alone."""
    if layer_kind(module) is not None or foldable_norm(module):
        return True
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return False
    return neuron_spec(module) is None and not is_unknown_neuron(module) and next(module.children(), None) is None


def _has_time(node: fx.Node, values: Mapping[fx.Node, Tensor], lead: tuple[int, int]) -> bool:
    """Whether the first dimensions of a value are all frames: ``[T, N, ...]`` or ``[T * N, ...]``."""
    if node not in values:
        return False
    shape = values[node].shape
    return tuple(shape[:2]) == tuple(lead) or (len(shape) > 0 and shape[0] == lead[0] * lead[1])


def is_time_view(node: fx.Node, values: Mapping[fx.Node, Tensor], lead: tuple[int, int]) -> bool:
    """Whether ``node`` only puts T and N together or apart."""
    sources = node.all_input_nodes
    if len(sources) != 1 or node not in values or sources[0] not in values or node.op == "call_module":
        return False
    joined, apart = (lead[0] * lead[1],), tuple(lead)
    before, after = tuple(values[sources[0]].shape), tuple(values[node].shape)
    return (before[:2] == apart and after == joined + before[2:]) or (
        before[:1] == joined and after == apart + before[1:]
    )
