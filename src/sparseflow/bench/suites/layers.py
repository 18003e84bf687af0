"""Twenty layer shapes at nine densities: dense, sparse and dispatched, in alternation, prescan inside the timer.

The baseline ``best dense fp32`` is the fastest of the layer as the user wrote it (``eager``), channels-last, and oneDNN
with its weight reordered ahead of time; ``best dense bf16`` the same in bfloat16. Input and output are contiguous for
sparse and dispatched, as SpikingJelly's multi-step layers pass them. Every run gets another input each round, and finds
caches through which 8 MB were swept, as in a model. The gate is the float64 error budget of the layer.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseflow.bench.compare import alternate, quantiles
from sparseflow.bench.records import Crossover, Gate, Metric, Point, Quantiles, Scope
from sparseflow.dispatch.measure import crossing, sweep_caches
from sparseflow.dispatch.runtime import LayerRuntime, RuntimeConfig
from sparseflow.kernels.base import LinearCall
from sparseflow.kernels.reference import excess
from sparseflow.modules.swap import _cached_conv_call, runtime_of, swap
from sparseflow.plan import LayerPlan, Path, Provenance, Reason

from . import Case, Options, Row
from .shapes import DENSITIES, SHAPES, Shape

SUITE = "layers"
WHAT = "inside the float64 error budget on two inputs"
KERNELS = {"sparse": "sparse layers", "dispatched": "dense or sparse by density"}
_QUICK = ("3x3 256@14", "1x1 1024->256@14")
_QUICK_DENSITIES = (0.01, 0.1, 1.0)
_FP32 = ("eager", "channels_last", "prepacked")


def run(options: Options) -> Iterator[Case]:
    """The suite: a case is a shape, at every density."""
    densities = _QUICK_DENSITIES if options.quick else DENSITIES
    for shape in SHAPES:
        if not options.quick or shape.name in _QUICK:
            yield Case(shape.name, functools.partial(sweep, shape, densities, options.repeats))


_INPUTS = 4


def swapped(layer: nn.Module, mode: str) -> nn.Module:
    """A copy of ``layer`` that runs sparse as ``mode`` says."""
    twin = copy.deepcopy(layer)
    plan = LayerPlan("layer", type(layer).__name__.lower(), Path.DENSE, Reason.NOT_MEASURED, Provenance.BINARY)
    swap(twin, LayerRuntime(plan, RuntimeConfig(mode=mode)))
    return twin


def prepacked(layer: Any, inputs: list[Tensor], dtype: torch.dtype) -> Rotating | None:
    """oneDNN with its weight reordered ahead of time, as a frozen inductor graph runs it; 2-d layers and linear."""
    ops, weight, bias = torch.ops.mkldnn, layer.weight.detach().to(dtype), layer.bias.detach().to(dtype)
    if isinstance(layer, nn.Linear):
        packed = ops._reorder_linear_weight(weight, inputs[0].shape[0])
        return Rotating(lambda x: ops._linear_pointwise(x, packed, bias, "none", [], ""), [x.to(dtype) for x in inputs])
    if not isinstance(layer, nn.Conv2d):
        return None
    arguments = (layer.padding, layer.stride, layer.dilation, layer.groups)
    last = [x.to(dtype, memory_format=torch.channels_last) for x in inputs]
    packed = ops._reorder_convolution_weight(
        weight.to(memory_format=torch.channels_last), *arguments, list(inputs[0].shape)
    )
    return Rotating(lambda x: ops._convolution_pointwise(x, packed, bias, *arguments, "none", [], ""), last)


class Rotating:
    """Runs a layer on another input at every call: a user never sends the same spikes twice."""

    def __init__(self, layer: Callable[[Tensor], Tensor], inputs: list[Tensor]):
        self.layer, self.inputs, self.turn = layer, inputs, 0

    def __call__(self) -> Tensor:
        self.turn = (self.turn + 1) % len(self.inputs)
        return self.layer(self.inputs[self.turn])


def dense_runs(layer: Any, inputs: list[Tensor]) -> dict[str, Rotating]:
    """The dense competitors of one layer, each on its own best layout and dtype."""
    runs = {"eager": Rotating(layer, inputs)}
    runs["bf16"] = Rotating(copy.deepcopy(layer).bfloat16(), [x.bfloat16() for x in inputs])
    if isinstance(layer, nn.Conv2d):
        last = [x.to(memory_format=torch.channels_last) for x in inputs]
        runs["channels_last"] = Rotating(copy.deepcopy(layer).to(memory_format=torch.channels_last), last)
    packed = {"prepacked": torch.float32, "bf16 prepacked": torch.bfloat16}
    more = {name: prepacked(layer, inputs, dtype) for name, dtype in packed.items()}
    return runs | {name: run for name, run in more.items() if run is not None}


def sweep(shape: Shape, densities: Sequence[float], repeats: int) -> Iterator[Row]:
    """All densities of one shape, then its crossovers."""
    plain = shape.layer()
    layers = {"sparse": swapped(plain, "sparse"), "dispatched": swapped(plain, "auto")}
    example = (torch.rand(shape.size) < 0.1).float()
    with torch.no_grad():
        layers["dispatched"](example)
    found = []
    for density in densities:
        points = list(at_density(shape, plain, layers, density, repeats))
        found += [point for point in points if point.kernel == "sparse" and point.baseline == "best dense fp32"]
        yield from points
    yield Crossover(shape.name, "sparse", measured_crossover(found), used_crossover(layers["dispatched"]))


def at_density(shape: Shape, plain: Any, layers: dict[str, nn.Module], density: float, repeats: int) -> Iterator[Point]:
    """Points of one layer at one density; those of a layer that leaves its budget have no figures."""
    generator = torch.Generator().manual_seed(int(density * 1e6))
    inputs = [(torch.rand(shape.size, generator=generator) < density).float() for _ in range(_INPUTS)]
    gates = {name: gate_of(layer, plain, inputs[:2]) for name, layer in layers.items()}
    green = {name: layer for name, layer in layers.items() if gates[name].green}
    ms = timed(plain, green, inputs, repeats) if green else {}
    rho = sum(float(x.mean()) for x in inputs) / len(inputs)
    about = {"config": {"batch": shape.size[0], "density set": density}, "rho": rho, "metric": Metric.LATENCY}
    for kernel, gate in gates.items():
        common = {
            "suite": SUITE,
            "case": shape.name,
            "kernel": kernel,
            "family": KERNELS[kernel],
            "gate": gate,
            **about,
        }
        for name, baseline in over(ms).items() if gate.green else (("best dense fp32", None),):
            times = {"value": ms.get(kernel), "baseline": name, "baseline_value": baseline}
            yield Point(**common, **times, scope=Scope.EXACT, honest=name == "best dense fp32" and gate.green)


def gate_of(layer: Callable[[Tensor], Tensor], plain: Any, inputs: Iterable[Tensor]) -> Gate:
    """Whether ``layer`` stays inside the float64 error budget of ``plain``, which it replaces, on every input."""
    with torch.no_grad():
        call = LinearCall() if isinstance(plain, nn.Linear) else _cached_conv_call(plain)
        worst = max(excess(layer(x), x, plain.weight, plain.bias, call) for x in inputs)
    return Gate(True, WHAT) if worst <= 1.0 else Gate(False, WHAT, (f"{worst:.3g} budgets from float64",))


def timed(plain: Any, layers: dict[str, nn.Module], inputs: list[Tensor], repeats: int) -> dict[str, Quantiles]:
    """20 %, 50 % and 80 % quantiles in ms of every dense variant and of ``layers``, in alternation."""
    with torch.no_grad():
        runs = dense_runs(plain, inputs) | {name: Rotating(layer, inputs) for name, layer in layers.items()}
        alternate(runs, 2)
        return {name: quantiles(values) for name, values in alternate(runs, repeats, sweep_caches).items()}


def over(ms: dict[str, Quantiles]) -> dict[str, Quantiles]:
    """The baselines of a point, by name: the fastest dense variants by median, and the layer as it was.

    >>> over({"eager": (1, 3.0, 4), "prepacked": (1, 2.0, 3), "bf16": (1, 1.0, 2)})["best dense fp32"]
    (1, 2.0, 3)
    """
    fp32 = [ms[name] for name in _FP32 if name in ms]
    bf16 = [value for name, value in ms.items() if name.startswith("bf16")]
    fastest = {"best dense fp32": min(fp32, key=_median), "best dense bf16": min(bf16, key=_median)}
    return fastest | {"eager": ms["eager"]}


def _median(value: Quantiles) -> float:
    return value[1]


def measured_crossover(points: Sequence[Point]) -> float | None:
    """Where the time of sparse over that of the best dense reaches 1, interpolated; 0 or the last density without one.

    ``None`` where a point has no figure.
    """
    ratios = [point.speedup for point in points]
    if None in ratios or not ratios:
        return None
    loads = [point.config["density set"] for point in points]
    return crossing(1.0, loads, [1.0 / ratio for ratio in ratios if ratio])


def used_crossover(layer: nn.Module) -> float | None:
    """What the dispatcher measured for itself and goes by; ``None`` where no sparse kernel covers the layer."""
    runtime = runtime_of(layer)
    found = runtime.describe().crossover if runtime is not None else None
    return found.density if found is not None else None
