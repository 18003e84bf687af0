"""Aggregating a trained network over time: which way, by how much, and at what cost."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import override

from sparseflow.config import MeasureBudget
from sparseflow.dispatch.measure import fastest
from sparseflow.graph.isolation import copied, isolated
from sparseflow.graph.reroll import reroll
from sparseflow.graph.stepping import reset
from sparseflow.graph.tracer import trace
from sparseflow.graph.values import example_values
from sparseflow.lowering import as_arguments, raise_layers

from .modules import TAC, Aggregated
from .neurons import UnknownNeuronError
from .report import Aggregation, LayerAggregation, Mode
from .rewrite import Checked, Choice, TimeError, rewrite
from .signal import time_share
from .sites import Site, find_sites

Validate = Callable[[nn.Module], float] | Iterable[tuple[Any, Tensor]]
MAX_TIME_SHARE = 0.1
"""Up to this share of variance in time, input counts as rate-coded."""
_SIZES = (16, 8, 4, 2)
_REFUSALS = (TimeError, UnknownNeuronError, RuntimeError, IndexError, TypeError, ValueError)


class AggregatedModel(nn.Module):
    """What :func:`sparseflow.aggregate` returns: called like the model, with its own copy of the weights.

    Attributes:
        network: the graph with its temporal layers.
        report: what was done.
    """

    def __init__(self, network: fx.GraphModule, report: Aggregation):
        super().__init__()
        self.network, self.report = network, report

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's; where time was collapsed, outputs over time are shorter."""
        return self.network(*args, **kwargs)


def aggregate(
    model: nn.Module,
    example_input: Any,
    *,
    mode: Literal["auto", "collapse", "preserve"] = "auto",
    group_size: int | Literal["auto"] = "auto",
    validate: Validate | None = None,
    max_drop: float = 0.01,
) -> AggregatedModel:
    """A copy of a trained network whose layers see weighted sums of K frames. Lossy, unlike ``accelerate``.

    What to do is read from the data. ``mode="auto"`` collapses time where the frames of the first aggregated layer's
    input vary no more than independent sampling explains (:func:`sparseflow.temporal.time_share` up to 10 %) and, with
    ``validate``, the frames can be shuffled without losing more than ``max_drop``; otherwise it preserves time. With
    ``validate`` every layer, in order, gets the largest K (16, 8, 4, 2) that keeps the accuracy within ``max_drop`` of
    the exact network's, and stays exact if none does. Where a collapse finds no K, preserving is tried.

    Collapsed (:class:`sparseflow.temporal.TAC`): behind the first such layer every frame stands for K steps, and the
    neurons of further layers leak accordingly. Preserved (:class:`sparseflow.temporal.TACTP`): every step of a chunk
    gets the chunk's mean current. Layers that the graph does not show as layer, frame-by-frame operations and neuron
    (a residual addition in between, a layer called twice) stay exact and say so.

    Args:
        model: SpikingJelly in multi-step mode, or a forward that loops over time (snnTorch). Not changed.
        example_input: as for :func:`sparseflow.accelerate`: real data, since the decision is made from it.
        mode: ``"collapse"`` or ``"preserve"`` take the decision away.
        group_size: K for every aggregated layer, checked only if ``validate`` is given; ``"auto"`` needs ``validate``.
        validate: accuracy in 0..1 of a model, or batches ``(input, labels)`` to find it on: the class is the largest
            of the model's first output, summed over time where that is ``[T, N, classes]``.
        max_drop: accuracy that may be lost, in 0..1, all layers together.

    Returns:
        The aggregated network, in the mode (training or evaluation) of ``model``; trainable. ``.report`` says what was
        done to each layer, what it did to accuracy and spike counts, and measured times.

    Raises:
        ValueError: ``mode`` or ``group_size`` is none of these, ``"auto"`` comes without ``validate``, or
            ``validate`` is empty.
        sparseflow.graph.tracer.TraceError: the forward cannot be traced.

    >>> import sparseflow
    >>> from spikingjelly.activation_based import layer, neuron
    >>> net = nn.Sequential(layer.Linear(8, 4, step_mode="m"), neuron.LIFNode(step_mode="m")).eval()
    >>> frames = (torch.rand(16, 2, 8) < 0.5).float()
    >>> small = sparseflow.aggregate(net, frames, mode="collapse", group_size=8)
    >>> small(frames).shape
    torch.Size([2, 2, 4])
    """
    if mode not in ("auto", "collapse", "preserve"):
        raise ValueError(f"mode must be 'auto', 'collapse' or 'preserve', got {mode!r}")
    if group_size != "auto" and (not isinstance(group_size, int) or group_size < 1):
        raise ValueError(f"group_size must be 'auto' or a positive number, got {group_size!r}")
    if group_size == "auto" and validate is None:
        raise ValueError("group_size='auto' needs validate: K is chosen by the accuracy it leaves")
    args, kwargs = as_arguments(example_input)
    with torch.no_grad():
        search = _Search(model, args, kwargs, validate, max_drop)
        found = search.run(mode, group_size)
    return found.train(model.training)


@dataclasses.dataclass(frozen=True)
class _Trial:
    """A choice for every site, the network it makes, and its accuracy after each layer that was chosen."""

    chosen: dict[str, Choice]
    network: fx.GraphModule
    accuracy: float | None
    after: dict[str, float]
    refused: dict[str, str]


class _Search:
    """Tries temporal layers in one network."""

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        validate: Validate | None,
        max_drop: float,
    ):
        self.model = _deepcopy(model)
        raise_layers(self.model)
        self.model.eval()
        self.args, self.kwargs, self.max_drop = args, kwargs, max_drop
        # Every layer and K goes through it once more.
        self.validate = list(validate) if isinstance(validate, Iterator) else validate
        self.graph = _traced(self.model, args, kwargs)
        self.values = example_values(self.model, self.graph, args, kwargs).tensors
        self.sites, self.refused = find_sites(self.graph, self.values)
        self.base = self._accuracy(self.graph)

    def run(self, mode: str, group_size: int | Literal["auto"]) -> AggregatedModel:
        share = self._time_share()
        order = self._order_drop()
        rate_coded = share <= MAX_TIME_SHARE and (order is None or order <= self.max_drop)
        wanted = [Mode.COLLAPSE, Mode.PRESERVE] if rate_coded else [Mode.PRESERVE]
        if mode != "auto":
            wanted = [Mode(mode)]
        trial, used = self._exact(), Mode.EXACT
        for candidate in wanted:
            trial, used = self._tried(candidate, group_size), candidate
            if trial.chosen:
                break
        accuracy = None if self.base is None or trial.accuracy is None else (self.base, trial.accuracy)
        layers = self._layers(trial)
        report = Aggregation(used if trial.chosen else Mode.EXACT, share, order, accuracy, self._ms(trial), layers)
        return AggregatedModel(trial.network, report)

    # ---- what the data says

    def _time_share(self) -> float:
        if not self.sites:
            return 0.0
        return time_share(self._recorded(self.graph)[self.sites[0].source.name])

    def _order_drop(self) -> float | None:
        """What shuffling the frames costs; ``None`` without ``validate`` or where the input has no frames."""
        steps = max((site.steps for site in self.sites), default=0)
        leaves = [leaf for leaf in tree_leaves(self.args) if isinstance(leaf, Tensor)]
        if self.base is None or not leaves or leaves[0].dim() < 2 or leaves[0].shape[0] != steps or steps < 2:
            return None
        shuffled = self._accuracy(_Shuffled(self.graph, steps))
        return None if shuffled is None else self.base - shuffled

    def _recorded(self, network: fx.GraphModule) -> dict[str, Any]:
        """Values of a network's nodes on the example, by name; flat inputs of sites as sequences."""
        recorder = _Recorder(network)
        with isolated(self.model):
            reset(self.model)
            args, kwargs = copied((self.args, self.kwargs))
            recorder.run(*_positional(network, args, kwargs))
        for site in self.sites:
            value = recorder.found.get(site.source.name)
            if isinstance(value, Tensor) and not site.sequence and len(value) % site.steps == 0:
                recorder.found[site.source.name] = value.unflatten(0, (site.steps, -1))
        return recorder.found

    def _accuracy(self, network: nn.Module) -> float | None:
        if self.validate is None:
            return None
        if callable(self.validate):
            return float(self.validate(network))
        right = total = 0
        for inputs, labels in self.validate:
            reset(network)
            args, kwargs = as_arguments(inputs)
            right += int((scores(network(*args, **kwargs)).argmax(-1).cpu() == labels.cpu()).sum())
            total += len(labels)
        reset(network)
        if not total:
            raise ValueError("validate has no samples")
        return right / total

    # ---- trying

    def _exact(self) -> _Trial:
        return _Trial({}, self.graph, self.base, {}, {})

    def _tried(self, mode: Mode, group_size: int | Literal["auto"]) -> _Trial:
        trial = self._exact()
        for site in self.sites:
            frames = -(-site.steps // _hold(trial.network, site))
            entered = frames < site.steps
            if group_size == "auto":
                sizes = [size for size in _SIZES if size <= frames]
            else:
                sizes = [] if mode is Mode.COLLAPSE and entered else [group_size]
            why = f"{frames} frames are left of {site.steps}" if not sizes else ""
            for size in sizes:
                choice = Choice(size, mode is Mode.PRESERVE)
                found = self._attempt(trial, site, choice)
                if isinstance(found, _Trial):
                    trial = found
                    break
                why = found
            else:
                trial = dataclasses.replace(trial, refused=trial.refused | {site.name: why})
        return trial

    def _attempt(self, trial: _Trial, site: Site, choice: Choice) -> _Trial | str:
        """``trial`` with one more layer aggregated, or why not."""
        chosen = trial.chosen | {site.name: choice}
        try:
            network = rewrite(self.graph, self.sites, chosen, self.values)
            with isolated(self.model):
                reset(self.model)
                args, kwargs = copied((self.args, self.kwargs))
                Checked(network, site.steps).run(*_positional(network, args, kwargs))
        except _REFUSALS as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        accuracy = self._accuracy(network)
        if accuracy is not None and self.base is not None and accuracy < self.base - self.max_drop - 1e-9:
            return f"K = {choice.group_size} would leave {accuracy:.1%} accuracy of {self.base:.1%}"
        after = trial.after if accuracy is None else trial.after | {site.name: accuracy}
        return _Trial(chosen, network, accuracy, after, trial.refused)

    # ---- what it did

    def _layers(self, trial: _Trial) -> tuple[LayerAggregation, ...]:
        exact = self._recorded(self.graph)
        now = self._recorded(trial.network)
        rows = [self._layer(site, trial, exact, now) for site in self.sites]
        rows += [LayerAggregation("", name, Mode.EXACT, note=why) for name, why in self.refused.items()]
        return tuple(rows)

    def _layer(self, site: Site, trial: _Trial, exact: Mapping[str, Any], now: Mapping[str, Any]) -> LayerAggregation:
        block, before = _block(trial.network, site), _count(exact[site.call.name])
        if block is None:
            found = now.get(site.call.name)
            spikes = None if found is None else (before, _count(found))
            return LayerAggregation(
                site.name, site.neuron, Mode.EXACT, note=trial.refused.get(site.name, ""), spikes=spikes
            )
        call = _call_of(trial.network, site)
        given: list[Any] = [now[arg.name] if isinstance(arg, fx.Node) else arg for arg in call.args]
        return LayerAggregation(
            site.name,
            site.neuron,
            Mode.COLLAPSE if isinstance(block, TAC) else Mode.PRESERVE,
            block.group_size,
            "" if site.affine else "pooling a chunk's currents by their maximum is not pooling those of its frames",
            trial.after.get(site.name),
            (before, _count(now[call.name])),
            self._layer_ms(block, exact[site.source.name], *given),
        )

    def _layer_ms(self, block: Aggregated, frames: Tensor, source: Tensor, *states: Tensor) -> tuple[float, float]:
        """Layer and neuron in one call for all frames, against the temporal layer on what it is given."""
        plain = TAC(block.layer, block.neuron, 1)

        def run(which: Aggregated, x: Tensor) -> Callable[[], object]:
            return lambda: (reset(which), which(x, *states))

        with isolated(self.model):
            ms = fastest({"exact": run(plain, frames), "now": run(block, source)}, MeasureBudget().layer_ms).ms
        return ms["exact"], ms["now"]

    def _ms(self, trial: _Trial) -> tuple[float, float]:
        def run(network: nn.Module) -> Callable[[], object]:
            return lambda: (reset(network), network(*self.args, **self.kwargs))

        with isolated(self.model):
            runs = {"exact": run(self.graph), "now": run(trial.network)}
            ms = fastest(runs, MeasureBudget().layer_ms).ms
        return ms["exact"], ms["now"]


def scores(output: Any) -> Tensor:
    """``[N, classes]`` of a network's output: its first tensor, summed over time where that is ``[T, N, classes]``.

    >>> scores((torch.ones(4, 2, 3), None)).shape
    torch.Size([2, 3])
    """
    first = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    return first.sum(0) if first.dim() == 3 else first


class _Shuffled(nn.Module):
    """A network that sees the frames of its input in another order."""

    def __init__(self, network: nn.Module, steps: int):
        super().__init__()
        self.network = network
        self.order = torch.randperm(steps, generator=torch.Generator().manual_seed(0))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        def shuffled(leaf: Any) -> Any:
            has_frames = isinstance(leaf, Tensor) and leaf.dim() > 1 and len(leaf) == len(self.order)
            return leaf[self.order.to(leaf.device)] if has_frames else leaf

        return self.network(*tree_map(shuffled, args), **kwargs)


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what every node made."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.found: dict[str, Any] = {}

    @override
    def run_node(self, n: fx.Node) -> Any:
        self.found[n.name] = super().run_node(n)
        return self.found[n.name]


def _deepcopy(model: nn.Module) -> nn.Module:
    """A copy also of a model whose neurons hold a state that gradients flow through, which PyTorch does not copy."""
    held = [leaf for module in model.modules() for leaf in tree_leaves(vars(module)) if isinstance(leaf, Tensor)]
    memo = {id(leaf): leaf.detach().clone() for leaf in held if not leaf.is_leaf}
    return copy.deepcopy(model, memo)


def _traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    graph = trace(model, args, kwargs)
    return reroll(graph, args, kwargs) or graph


def _positional(network: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
    names = [str(node.target) for node in network.graph.nodes if node.op == "placeholder"]
    return [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]


def _call_of(network: fx.GraphModule, site: Site) -> fx.Node:
    name = f"temporal_{site.name.replace('.', '_')}"
    return next(node for node in network.graph.nodes if node.op == "call_module" and node.target == name)


def _block(network: fx.GraphModule, site: Site) -> Aggregated | None:
    return network._modules.get(f"temporal_{site.name.replace('.', '_')}")  # type: ignore[return-value]


def _hold(network: fx.GraphModule, site: Site) -> int:
    block = _block(network, site)
    return 1 if block is None else block.hold


def _count(output: Any) -> float:
    """Spikes in what a neuron returned."""
    return float(next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)).count_nonzero())
