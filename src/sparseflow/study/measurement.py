"""What a trained network does on the whole test set, and how long one call of it takes, dense and accelerated."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import sparseflow
from sparseflow.bench.compare import alternate, quantiles
from sparseflow.frameworks import neuron_spec

from . import nets
from .datasets import DataSet, Split
from .hardware import Accelerator, cycles
from .predictor import LOOP
from .records import Layer, LayerShape, Quantiles
from .shapes import shapes_of

_COUNTED = 128  # samples of one call that is counted
_TIMED = 8  # samples that timed calls take in turn, so that one with few spikes does not stand for all
_WARM_UP = 2  # rounds

OVER_TIME, MULTI_STEP, COMPILED = (
    "eager, each layer once over all steps",
    "eager, multi-step",
    "compiled, each layer once over all steps",
)
"""Dense paths beside :data:`~sparseflow.study.predictor.LOOP`."""


@dataclasses.dataclass(frozen=True)
class Activity:
    """A network on a whole data set: ``spikes`` are those that its neurons fired, mean per sample."""

    accuracy: float
    spikes: float
    layers: tuple[Layer, ...]

    @property
    def cycles(self) -> float:
        """Of the accelerator, mean per sample: its layers run one after the other."""
        return sum(layer.cycles or 0.0 for layer in self.layers)


@dataclasses.dataclass(frozen=True)
class Latency:
    """20 %, 50 % and 80 % quantiles of a call in ms by path; ``dense`` names the strongest dense path.

    ``error`` says why there is no accelerated one.
    """

    ms: dict[str, Quantiles]
    dense: str
    error: str = ""


def activity(network: nn.Module, data: Split, accelerator: Accelerator | None = None) -> Activity:
    """Accuracy, spikes, densities and cycles over all samples.

    Args:
        network: of :func:`sparseflow.study.nets.build`, in eval mode.
        data: for example the test part of a data set.
        accelerator: of the cycles; default: the published one.

    Returns:
        Means over the samples; of layers in the order in which they run.
    """
    accelerator = accelerator or Accelerator()
    shapes = shapes_of(network, data.spikes[:, :1].float())
    hits = fired = 0
    totals = {shape.name: torch.zeros(2, dtype=torch.float64) for shape in shapes}  # spikes, cycles
    for start in range(0, len(data), _COUNTED):
        part = slice(start, start + _COUNTED)
        with torch.no_grad(), _counting(network, shapes) as (inputs, outputs):
            found = nets.run(network, data.spikes[:, part].float()).mean(0).argmax(1)
        hits += int((found == data.labels[part]).sum())
        fired += sum(outputs)
        for shape in shapes:
            counts = _by_sample(inputs[shape.name], len(found))
            totals[shape.name] += torch.stack([counts.sum(), cycles(shape, counts, accelerator).sum()])
    steps = data.spikes.shape[0]
    means = {name: (total / len(data)).tolist() for name, total in totals.items()}
    layers = tuple(_layer(shape, means[shape.name][0], means[shape.name][1], steps) for shape in shapes)
    return Activity(hits / len(data), fired / len(data), layers)


def _layer(shape: LayerShape, spikes: float, found_cycles: float, steps: int) -> Layer:
    per_step = spikes / steps
    return Layer(shape, per_step, per_step / shape.inputs, found_cycles)


@contextlib.contextmanager
def _counting(network: nn.Module, shapes: list[LayerShape]) -> Iterator[tuple[dict[str, list[Tensor]], list[int]]]:
    """Values that are not zero: of every layer's input per sample and channel, and of every neuron's output."""
    inputs: dict[str, list[Tensor]] = {shape.name: [] for shape in shapes}
    outputs: list[int] = []

    def fired(_neuron: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(int(torch.count_nonzero(output[0] if isinstance(output, tuple) else output)))

    hooks = [module.register_forward_hook(fired) for module in network.modules() if neuron_spec(module) is not None]
    for shape in shapes:
        layer = network.get_submodule(shape.name)
        hooks.append(layer.register_forward_pre_hook(_counter(shape, inputs[shape.name])))
    try:
        yield inputs, outputs
    finally:
        for hook in hooks:
            hook.remove()


def _counter(shape: LayerShape, found: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Appends ``[T * N, C]`` of an input ``[..., C, H, W]``, of a linear layer ``[..., C]``."""
    positions = math.prod(shape.in_size)

    def count(_layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].reshape(-1, shape.in_channels, positions).count_nonzero(2))

    return count


def _by_sample(counts: list[Tensor], samples: int) -> Tensor:
    """``[N, T, C]`` of what came in order of time."""
    return torch.cat(counts).unflatten(0, (-1, samples)).transpose(0, 1).double()


def latency(
    make: Callable[[], nn.Module], data: DataSet, *, repeats: int = 25, batch: int = 1, compiled: bool = False
) -> Latency:
    """Time calls of a network on test samples, dense and accelerated, in alternation.

    The dense path is the strongest of the eager ones: snnTorch's loop over time as the user writes it, the same network
    with each layer once over all steps, which is what SpikingJelly's multi-step mode does, and that with weights in
    channels_last order. ``torch.compile`` is left out unless ``compiled`` is set, since it takes minutes a network.

    The accelerated network is timed only after every sparse layer and fused block stayed inside its error budget
    against float64 (:func:`sparseflow.verify`).

    Args:
        make: gives the trained network, a new one at every call.
        data: its test part.
        repeats: alternations.
        batch: samples of a call.
        compiled: also time the network under ``torch.compile``.
    """
    samples = [part.float() for part in data.test.spikes[:, : _TIMED * batch].split(batch, dim=1)]
    whole = [sample for sample in samples if sample.shape[1] == batch]
    dense = _dense_paths(make, compiled, whole[0])
    runs = {name: _Call(run, whole) for name, run in dense.items()}
    with torch.no_grad():
        network, error = _accelerated(make(), whole[0])
        if not error:
            runs["accelerated"] = _Call(functools.partial(_from_rest, network), whole)
        alternate(runs, _WARM_UP)
        found = {name: quantiles(times) for name, times in alternate(runs, repeats).items()}
    strongest = min(dense, key=lambda name: found[name][1])
    return Latency({"dense": found[strongest], **found}, strongest, error)


class _Call:
    """Runs on one sample after the other."""

    def __init__(self, run: Callable[[Tensor], object], samples: list[Tensor]):
        self.run, self.samples = run, itertools.cycle(samples)

    def __call__(self) -> None:
        self.run(next(self.samples))


def _from_rest(network: nn.Module, spikes: Tensor) -> Tensor:
    nets.reset(network)
    return network(spikes)


def _dense_paths(
    make: Callable[[], nn.Module], compiled: bool, sample: Tensor
) -> dict[str, Callable[[Tensor], object]]:
    network = make()
    name = OVER_TIME if nets.loops(network) else MULTI_STEP
    paths: dict[str, Callable[[Tensor], object]] = {
        name: functools.partial(nets.run, network),
        f"{name}, channels_last": functools.partial(nets.run, make().to(memory_format=torch.channels_last)),
    }
    if nets.loops(network):
        paths[LOOP] = functools.partial(_from_rest, network)
    if compiled:
        fast: Any = torch.compile(functools.partial(nets.run, network))
        with torch.no_grad():
            for _ in range(3):
                fast(sample)
        paths[COMPILED] = fast
    return paths


def _accelerated(network: nn.Module, sample: Tensor) -> tuple[nn.Module, str]:
    """The network, accelerated, and why it must not be timed."""
    nets.reset(network)
    with warnings.catch_warnings():
        # Where nothing is accelerated, what is timed is the network as it is; the study says so by the times.
        warnings.simplefilter("ignore", sparseflow.NothingAcceleratedWarning)
        sparseflow.accelerate(network, sample)
    try:
        with sparseflow.verify(network):
            _from_rest(network, sample)
    except sparseflow.MismatchError as error:
        return network, str(error)
    return network, ""
