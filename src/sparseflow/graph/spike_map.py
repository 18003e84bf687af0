"""The answer of this package: which layers are fed by spikes, and what follows each of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx, nn

from sparseflow.frameworks import neuron_spec
from sparseflow.graph.eligibility import candidates, layer_kind
from sparseflow.graph.isolation import copied, isolated
from sparseflow.graph.recorder import Feed, LabelMode, Recorder
from sparseflow.graph.tracer import NORMS, TraceError, run_traced
from sparseflow.plan import Provenance

_VIEWS = frozenset({"flatten", "unflatten", "view", "reshape", "contiguous", "permute", "transpose"})


@dataclasses.dataclass(frozen=True)
class LayerSite:
    """One convolution or linear layer that ran.

    Attributes:
        name: qualified module name.
        kind: ``"conv2d"``, ``"linear"``... as in :func:`layer_kind`.
        provenance: the least that is known of its input over all calls.
        norm: the normalisation that alone consumes its output, if any.
        neuron: the neuron that directly follows layer or normalisation, if any.
        detail: what feeds it, e.g. ``"add(layer1.0.sn2, layer1.1.sn2)"``.
        calls: how often the example run called it.
    """

    name: str
    kind: str
    provenance: Provenance
    norm: str | None
    neuron: str | None
    detail: str
    calls: int


@dataclasses.dataclass(frozen=True)
class SpikeMap:
    """All layers that ran, in the order of first execution.

    ``method`` is ``"fx"`` when the model could be traced, else ``"dynamic"``, and then ``fallback_detail`` says why
    not; a dynamic map knows every provenance but neither ``norm`` nor ``neuron``.
    """

    layers: tuple[LayerSite, ...]
    method: str
    fallback_detail: str = ""


def spike_map(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> SpikeMap:
    """Follow spikes through ``model`` on an example and report what feeds each convolution and linear layer.

    Nothing in the model changes: state, buffers, random generators, hooks, gradients and training flags are as
    before. A wrong label can cost time, never a wrong result, because the sparse path looks at the values.

    Args:
        model: any module.
        args, kwargs: what the model is called with, e.g. one batch ``[T, N, C, H, W]``.

    Raises:
        Exception: whatever ``model(*args, **kwargs)`` itself raises.

    Example:
        >>> import torch
        >>> from sparseflow.frameworks import register_neuron, unregister_neuron
        >>> class Step(nn.Module):
        ...     def forward(self, x):
        ...         return (x > 1).to(x)
        >>> register_neuron(Step)
        >>> found = spike_map(nn.Sequential(nn.Linear(4, 4), Step(), nn.Linear(4, 2)), (torch.rand(1, 4),))
        >>> [(site.name, site.provenance.name, site.neuron) for site in found.layers]
        [('0', 'DENSE', '1'), ('2', 'BINARY', None)]
        >>> unregister_neuron(Step)
    """
    kwargs = kwargs or {}
    try:
        return _traced(model, args, kwargs)
    except TraceError as error:
        return _watched(model, args, kwargs, str(error))


def _traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SpikeMap:
    recorder = Recorder(model)
    with isolated(model):
        graph = run_traced(model, recorder, args, kwargs)
    followers = _Followers(model, graph)
    return SpikeMap(_sites(model, recorder.feeds, followers), "fx")


def _watched(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], why: str) -> SpikeMap:
    recorder = Recorder(model)
    with isolated(model):
        args, kwargs = copied((args, kwargs))
        recorder.label_inputs(args, kwargs)
        with recorder.attached(), LabelMode(recorder):
            model(*args, **kwargs)
    return SpikeMap(_sites(model, recorder.feeds, None), "dynamic", why)


def _sites(model: nn.Module, feeds: dict[str, Feed], followers: _Followers | None) -> tuple[LayerSite, ...]:
    layers = candidates(model)
    sites = []
    for name, feed in feeds.items():
        norm, neuron = followers.of(name) if followers is not None else (None, None)
        kind = layer_kind(layers[name])
        assert kind is not None
        label = feed.label
        sites.append(LayerSite(name, kind, label.provenance, norm, neuron, label.describe(), feed.calls))
    return tuple(sites)


class _Followers:
    """Looks up, in a traced graph, the normalisation and the neuron behind a layer."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self._model = model
        self._nodes: dict[str, fx.Node] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                self._nodes.setdefault(node.target, node)

    def of(self, layer: str) -> tuple[str | None, str | None]:
        """Names of the normalisation and the neuron, each ``None`` where the layer is followed by something else."""
        node = self._next(self._nodes.get(layer))
        norm = None
        if node is not None and isinstance(self._module(node), NORMS):
            norm = str(node.target)
            node = self._next(node)
        is_neuron = node is not None and neuron_spec(self._module(node)) is not None
        return norm, str(node.target) if node is not None and is_neuron else None

    def _next(self, node: fx.Node | None) -> fx.Node | None:
        """The module call that alone consumes ``node``, reached through views only."""
        while node is not None and len(node.users) == 1:
            node = next(iter(node.users))
            if node.op == "call_module":
                return node
            if node.op != "call_method" or node.target not in _VIEWS:
                return None
        return None

    def _module(self, node: fx.Node) -> nn.Module:
        return self._model.get_submodule(str(node.target))
