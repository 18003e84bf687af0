"""What one call of a network asks for: the shapes of its layers, how often each runs, and how often its neurons step.

Found by hooks while the network runs once, so that any network will do: multi-step layers that see ``[T * N, ...]``,
and loops over time that call a layer T times.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sparseflow.frameworks import neuron_spec, steps_over_time
from sparseflow.graph.isolation import copied, isolated
from sparseflow.graph.reroll import reroll
from sparseflow.graph.tracer import TraceError
from sparseflow.graph.tracer import trace as graph_of
from sparseflow.lowering import as_arguments
from sparseflow.modules.fused.model import own_forward

from .records import LayerShape


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """A layer in one call of a network: it runs ``calls`` times, on ``rows`` images and time steps each.

    ``fused_calls`` is how often it runs in an accelerated network: once on all steps, unless its input depends on what
    the layer gave a step before, as in a recurrent network.

    >>> call = LayerCall(LayerShape("fc", 128, 10), rows=4, calls=25)
    >>> call.macs, call.total_rows
    (5120, 100)
    """

    shape: LayerShape
    rows: int
    calls: int = 1
    fused_calls: int = 1

    @property
    def total_rows(self) -> int:
        """Images times time steps of all its calls."""
        return self.rows * self.calls

    @property
    def outputs(self) -> int:
        """Values that all its calls give."""
        return self.total_rows * self.shape.outputs

    @property
    def weights(self) -> int:
        """Weights of the layer, without bias."""
        shape = self.shape
        return shape.out_channels * math.prod(shape.kernel) * shape.in_channels // shape.groups

    @property
    def macs(self) -> int:
        """Multiply-adds of one call, dense; times the density, the additions that spikes ask for."""
        return self.rows * self.weights * math.prod(self.shape.out_size)


@dataclasses.dataclass(frozen=True)
class NetCall:
    """One call of a network: its layers, and the steps of its neurons (layers of neurons times T)."""

    layers: tuple[LayerCall, ...]
    neuron_steps: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers, each once, in the order in which they first ran."""
        return tuple(dict.fromkeys(layer.shape.name for layer in self.layers))


def trace(model: nn.Module, example_input: Any) -> NetCall:
    """Run ``model`` once on ``example_input`` and note every convolution, linear layer and neuron that runs.

    Neuron states, buffers and random generators are as before afterwards; gradients are not recorded. A layer that gets
    inputs of several shapes is there once for each. Of a linear layer on ``[..., K]`` every leading index is a row.
    Transposed convolutions are left out: no sparse kernel covers them.

    Args:
        model: any network, accelerated or not.
        example_input: what one forward call takes: a tensor, a tuple of positional or a mapping of keyword arguments.

    Raises:
        ValueError: no convolution or linear layer ran.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 10))
    >>> [(layer.shape.name, layer.shape.out_size, layer.rows) for layer in trace(net, torch.zeros(5, 2, 8, 8)).layers]
    [('0', (6, 6), 5), ('2', (1, 1), 5)]
    """
    args, kwargs = as_arguments(example_input)
    watch = _Watch()
    with own_forward(model), isolated(model):
        for name, module in model.named_modules():
            watch.attach(name, module)
        model(*copied(args), **copied(kwargs))
    if not watch.layers:
        raise ValueError(
            f"no convolution or linear layer of this {type(model).__name__} ran: there is nothing to predict"
        )
    stepwise = _stepwise(model, args, kwargs) if max(watch.layers.values()) > 1 else collections.Counter()
    layers = (
        LayerCall(shape, rows, calls, min(calls, stepwise.get(shape.name, calls)))
        for (shape, rows), calls in watch.layers.items()
    )
    return NetCall(tuple(layers), watch.steps)


def _stepwise(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> collections.Counter[str]:
    """How often each layer is called once loops over time are batched; empty where the forward cannot be traced."""
    try:
        with own_forward(model), torch.no_grad():
            graph = graph_of(model, args, kwargs)
            graph = reroll(graph, args, kwargs) or graph
    except TraceError:
        return collections.Counter()
    return collections.Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_module")


def shapes_of(model: nn.Module, example_input: Any) -> list[LayerShape]:
    """Shapes of the layers of ``model`` in the order in which they first ran; see :func:`trace`.

    >>> import torch
    >>> [shape.name for shape in shapes_of(nn.Sequential(nn.Linear(8, 4)), torch.zeros(2, 8))]
    ['0']
    """
    return [layer.shape for layer in trace(model, example_input).layers]


class _Watch:
    """Counts what runs. Hooks live in an isolated model, which forgets them."""

    def __init__(self) -> None:
        self.layers: collections.Counter[tuple[LayerShape, int]] = collections.Counter()
        self.steps = 0

    def attach(self, name: str, module: nn.Module) -> None:
        if isinstance(module, _ConvNd | nn.Linear) and not isinstance(module, _ConvTransposeNd):

            def note(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
                x = _first(args, kwargs)
                self.layers[_shape(name, layer, x, output), _rows(layer, x)] += 1

            module.register_forward_hook(note, with_kwargs=True)
        elif neuron_spec(module) is not None:
            module.register_forward_hook(self._note_neuron, with_kwargs=True)

    def _note_neuron(self, neuron: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        self.steps += _first(args, kwargs).shape[0] if steps_over_time(neuron) else 1


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _shape(name: str, layer: Any, x: Tensor, y: Tensor) -> LayerShape:
    if isinstance(layer, nn.Linear):
        return LayerShape(name, layer.in_features, layer.out_features)
    dims = len(layer.kernel_size)
    return LayerShape(
        name,
        layer.in_channels,
        layer.out_channels,
        kernel=_plane(layer.kernel_size),
        stride=_plane(layer.stride),
        padding=_padding(layer),
        groups=layer.groups,
        in_size=_plane(x.shape[-dims:]),
        out_size=_plane(y.shape[-dims:]),
    )


def _rows(layer: Any, x: Tensor) -> int:
    own = 1 if isinstance(layer, nn.Linear) else len(layer.kernel_size) + 1
    return math.prod(x.shape[:-own])


def _plane(sizes: Sequence[int]) -> tuple[int, int]:
    """Height and width of what may have one dimension (a row) or three (depth and height are counted as one).

    >>> _plane((3,)), _plane((2, 3)), _plane((2, 3, 4))
    ((1, 3), (2, 3), (6, 4))
    """
    return math.prod(sizes[:-1]), sizes[-1]


def _padding(layer: Any) -> tuple[int, int]:
    """Padding of height and width; of ``"same"`` the larger side."""
    if not isinstance(layer.padding, str):
        height, width = (0, *layer.padding)[-2:]
        return height, width
    if layer.padding == "valid":
        return (0, 0)
    same = (1, *layer.kernel_size)[-2:], (1, *layer.dilation)[-2:]
    height, width = (dilation * (size - 1) - dilation * (size - 1) // 2 for size, dilation in zip(*same, strict=True))
    return height, width
