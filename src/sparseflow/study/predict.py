"""What a network costs on a piece of hardware, predicted from its shapes and densities without running it there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparseflow.observe import Profile
from sparseflow.report import ProfileResult, milliseconds, percent, render

from . import roofline
from .hardware import Accelerator, cycles, positions
from .predictor import (
    PATHS,
    Error,
    Predictor,
    accelerated_net_terms,
    call_of,
    dense_net_terms,
    eager_terms,
    fused_terms,
    shipped,
)
from .records import LayerShape
from .shapes import LayerCall, NetCall, trace

if TYPE_CHECKING:
    from rich.table import Table

CPU, H200 = "cpu", "h200"
Densities = float | Mapping[str, float] | Profile | ProfileResult
Hardware = str | Accelerator


@dataclasses.dataclass(frozen=True)
class LayerPrediction:
    """One layer in one call: times in ms, and cycles where the hardware counts them. ``density`` is of its input."""

    name: str
    density: float
    dense_ms: float
    accelerated_ms: float
    cycles: float | None = None

    @property
    def speedup(self) -> float:
        """Dense over accelerated."""
        return self.dense_ms / self.accelerated_ms


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Cost of one call of a network, predicted.

    Times are ms; a layer's on a CPU hold what runs on its outputs (norms, pools, neurons). ``rest_dense_ms`` and
    ``rest_accelerated_ms`` are what the network takes beside: the steps of its neurons, the call. ``dense_error`` and
    ``accelerated_error`` say how far such predictions were from measurements that they were not fitted to, ``None``
    where nothing was measured, and ``note`` what the figures are.
    """

    hardware: str
    layers: tuple[LayerPrediction, ...]
    rest_dense_ms: float
    rest_accelerated_ms: float
    note: str
    dense_error: Error | None = None
    accelerated_error: Error | None = None

    @property
    def dense_ms(self) -> float:
        """Of the network as it is."""
        return self.rest_dense_ms + sum(layer.dense_ms for layer in self.layers)

    @property
    def accelerated_ms(self) -> float:
        """Of the accelerated network."""
        return self.rest_accelerated_ms + sum(layer.accelerated_ms for layer in self.layers)

    @property
    def speedup(self) -> float:
        """Dense over accelerated."""
        return self.dense_ms / self.accelerated_ms

    @property
    def cycles(self) -> float | None:
        """Of the whole call, layer by layer; ``None`` for hardware whose cycles are not counted."""
        counted = [layer.cycles for layer in self.layers if layer.cycles is not None]
        return sum(counted) if counted else None

    @property
    def totals(self) -> dict[str, float]:
        """Milliseconds by path, as :attr:`sparseflow.study.records.Net.predicted` holds them."""
        return dict(zip(PATHS, (self.dense_ms, self.accelerated_ms), strict=True))

    def __str__(self) -> str:
        line = f"{self.hardware}: dense {milliseconds(self.dense_ms)} ms, accelerated "
        line += f"{milliseconds(self.accelerated_ms)} ms, {self.speedup:.2f}x"
        if self.cycles is not None:
            line += f", {self.cycles:,.0f} cycles"
        errors = {"dense": self.dense_error, "accelerated": self.accelerated_error}
        known = [f"error of {path}: {error}" for path, error in errors.items() if error is not None]
        return render(line, _table(self), *known, self.note)


def predict(
    model: nn.Module | NetCall, densities: Densities, *, example_input: Any = None, hardware: Hardware = CPU
) -> Prediction:
    """Predict what one call of a network costs, dense and accelerated, at given densities.

    Args:
        model: a network, or the layers of one as :func:`sparseflow.study.shapes.trace` gives them.
        densities: share of a layer's inputs that are not zero, 0..1: by layer name (a layer that is left out, as mostly
            the first, has no spikes as input and runs dense), one number for all layers, or what
            :func:`sparseflow.profile` saw of an accelerated network.
        example_input: what one forward call takes, for example ``[T, N, C, H, W]``; shapes, T and N are taken from a
            run on it. Not needed with traced layers.
        hardware: ``"cpu"``, the machine that the costs were fitted on (see ``note``); ``"h200"``, a GPU, by a roofline;
            or an :class:`~sparseflow.study.hardware.Accelerator`, on which dense means that every input is a spike.

    Returns:
        Times and cycles by layer and in total, with the error of such predictions on held-out measurements.

    Raises:
        TypeError: ``example_input`` is missing, or ``densities`` is of another type.
        ValueError: a density outside 0..1, an unknown layer or unknown hardware, or a network without layers.
        BackendUnavailableError: ``hardware="h200"`` without Triton.

    >>> import torch, sparseflow
    >>> net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    >>> prediction = sparseflow.predict(net, {"2": 0.1}, example_input=torch.zeros(4, 64))
    >>> [(layer.name, layer.density) for layer in prediction.layers]
    [('0', 1.0), ('2', 0.1)]
    """
    net = model if isinstance(model, NetCall) else _traced(model, example_input)
    shares = _shares(net, densities)
    if isinstance(hardware, Accelerator):
        return _on_accelerator(net, shares, hardware)
    if hardware not in _BY_NAME:
        raise ValueError(f"hardware must be one of {', '.join(_BY_NAME)} or an Accelerator, got {hardware!r}")
    return _BY_NAME[hardware](net, shares)


def predict_latency(
    shapes: Iterable[LayerShape],
    densities: Densities,
    *,
    steps: int,
    batch: int = 1,
    calls: int = 1,
    hardware: Hardware = CPU,
) -> Prediction:
    """The same for layers of which only the shapes are known, with a neuron behind every output.

    Args:
        shapes: the layers in their order.
        densities: as of :func:`predict`.
        steps: time steps T of a call of the network.
        batch: images N of a call.
        calls: how often a layer runs in it: once on all steps, or ``steps`` times in a user's own loop over time.
        hardware: as of :func:`predict`.

    Raises:
        ValueError: as of :func:`predict`, or ``calls`` does not divide ``steps``.

    >>> predict_latency([LayerShape("fc", 64, 10)], 0.5, steps=4, hardware=Accelerator(neuron_units=5)).cycles
    408.0
    """
    return predict(call_of(shapes, steps=steps, batch=batch, calls=calls), densities, hardware=hardware)


def _traced(model: nn.Module, example_input: Any) -> NetCall:
    if not isinstance(model, nn.Module):
        raise TypeError(f"predict expects a torch.nn.Module or a NetCall, got {type(model).__name__}")
    if example_input is None:
        raise TypeError("predict needs example_input to see the shapes of the layers: what one forward call takes")
    return trace(model, example_input)


def _shares(net: NetCall, densities: Densities) -> dict[str, float]:
    """Density by layer, of every layer."""
    if isinstance(densities, Profile):
        densities = densities.result()
    if isinstance(densities, ProfileResult):
        given = {layer.name: layer.density for layer in densities.layers if layer.density is not None}
    elif isinstance(densities, Mapping):
        given = dict(densities)
    elif isinstance(densities, int | float):
        given = dict.fromkeys(net.names, float(densities))
    else:
        raise TypeError(f"densities are a number, a mapping or a profile, got {type(densities).__name__}")
    if unknown := [name for name in given if name not in net.names]:
        raise ValueError(f"no layer is called {', '.join(unknown)}; there are {', '.join(net.names)}")
    if wrong := [f"{name}: {share}" for name, share in given.items() if not 0.0 <= share <= 1.0]:
        raise ValueError(f"densities are shares in 0..1, got {', '.join(wrong)}")
    return dict.fromkeys(net.names, 1.0) | given


def _on_cpu(net: NetCall, shares: dict[str, float]) -> Prediction:
    fitted = shipped()
    layers = tuple(_cpu_layer(call, shares[call.shape.name], fitted) for call in net.layers)
    dense, accelerated, machine = fitted.dense_net, fitted.accelerated_net, fitted.machine
    rest = dataclasses.replace(net, layers=())
    return Prediction(
        f"{machine['cpu']}, {machine['threads']} threads",
        layers,
        dense.ms(dense_net_terms(rest, fitted.layers)),
        accelerated.ms(accelerated_net_terms(rest, {}, fitted.layers)),
        "Predicted by costs fitted on this machine; another one has others. Dense is the model as it is (eager).",
        dense.error,
        accelerated.error,
    )


def _cpu_layer(call: LayerCall, density: float, fitted: Predictor) -> LayerPrediction:
    dense_ms = fitted.dense_net.ms(eager_terms(call, fitted.layers))
    ways = [fitted.accelerated_net.ms(fused_terms(call, share, fitted.layers)) for share in (density, 1.0)]
    return LayerPrediction(call.shape.name, density, dense_ms, min(ways))


def _on_h200(net: NetCall, shares: dict[str, float]) -> Prediction:
    pairs = [(call, shares[call.shape.name]) for call in net.layers]
    layers = tuple(LayerPrediction(call.shape.name, share, *roofline.layer_ms(call, share)) for call, share in pairs)
    note = "A roofline in float32 without TF32, for layers alone, without neurons: a floor, predicted and not measured."
    return Prediction("NVIDIA H200", layers, 0.0, 0.0, note)


_BY_NAME = {CPU: _on_cpu, H200: _on_h200}


def _on_accelerator(net: NetCall, shares: dict[str, float], accelerator: Accelerator) -> Prediction:
    layers = tuple(_accelerator_layer(call, shares[call.shape.name], accelerator) for call in net.layers)
    note = (
        "Cycles by formula, all images and steps of the call one after another, layer by layer; spikes spread evenly."
    )
    return Prediction(f"event-driven accelerator at {accelerator.clock_mhz:g} MHz", layers, 0.0, 0.0, note)


def _accelerator_layer(call: LayerCall, density: float, accelerator: Accelerator) -> LayerPrediction:
    taken, every = (_spread_cycles(call, share, accelerator) for share in (density, 1.0))
    ms = accelerator.clock_mhz * 1e3
    return LayerPrediction(call.shape.name, density, every / ms, taken / ms, taken)


def _spread_cycles(call: LayerCall, density: float, accelerator: Accelerator) -> float:
    """Of all rows of a call with its spikes spread evenly over channels and steps."""
    shape = call.shape
    channels = 1 if shape.linear else shape.in_channels
    counts = torch.full((1, 1, channels), density * positions(shape), dtype=torch.float64)
    return call.total_rows * float(cycles(shape, counts, accelerator))


def _table(prediction: Prediction) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, header in enumerate(("layer", "density", "dense ms", "accelerated ms", "cycles")):
        table.add_column(header, justify="right" if index else "left", no_wrap=True)
    for layer in prediction.layers:
        count = "-" if layer.cycles is None else f"{layer.cycles:,.0f}"
        times = milliseconds(layer.dense_ms), milliseconds(layer.accelerated_ms)
        table.add_row(*map(Text, (layer.name, percent(layer.density), *times, count)))
    rest = milliseconds(prediction.rest_dense_ms), milliseconds(prediction.rest_accelerated_ms)
    table.add_row("rest", "-", *rest, "-", style="dim")
    return table
