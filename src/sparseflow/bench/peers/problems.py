"""What the peers compute, and the float64 reference their results are held to before any time counts."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseflow.bench.records import Gate
from sparseflow.kernels.base import LinearCall
from sparseflow.kernels.reference import error_budget, oracle

_EPS = torch.finfo(torch.float32).eps
_LEAK = 0.5
_GAIN = 0.7  # standard deviation of the currents in thresholds: about one neuron in thirteen fires
_NEURON_ROUNDINGS = 8  # operations between a sum and the comparison with the threshold
_CHUNK = 25  # time steps whose float64 currents are held at once
_MEMORY_EACH = 4 << 30
_WORKERS = 12  # how many processes hold the problem at the same time, this one included


class Reference(Protocol):
    """Judges results for one input. ``densities`` are those of the right results, by name."""

    @property
    def densities(self) -> dict[str, float]:
        """Empty where results are not spikes."""
        ...

    def judge(self, output: Tensor, precision: str) -> Gate:
        """Green where ``output`` is right."""
        ...


class Problem(Protocol):
    """Data of one case. ``x`` and ``w`` are the shapes of one input and of the weights."""

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        ...

    @property
    def densities(self) -> tuple[float, ...]:
        """Densities of the inputs, each of which is measured."""
        ...

    @property
    def name(self) -> str:
        """The case's name."""
        ...

    @property
    def x(self) -> tuple[int, ...]:
        """Shape of one input."""
        ...

    @property
    def w(self) -> tuple[int, int]:
        """Shape of the weights ``[N, K]``."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """The scale parameters of its points."""
        ...

    def weight(self, generator: torch.Generator) -> Tensor:
        """Weights ``[N, K]`` in float32."""
        ...

    def reference(self, x: Tensor, weight: Tensor) -> Reference:
        """The oracle for one input."""
        ...


@dataclasses.dataclass(frozen=True)
class Product:
    """Spikes ``[rows, K]`` times weights ``[N, K]`` transposed; a row is a sample at a time step.

    >>> Product(4096, 1024, 4).name
    'spikes x 4096x1024, batch*T 4'
    """

    inputs: int
    outputs: int
    rows: int
    densities: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2)
    device: str = "cpu"

    @property
    def name(self) -> str:
        """As in the tables."""
        return f"spikes x {self.inputs}x{self.outputs}, batch*T {self.rows}{_on(self.device)}"

    @property
    def x(self) -> tuple[int, ...]:
        """``[rows, K]``."""
        return self.rows, self.inputs

    @property
    def w(self) -> tuple[int, int]:
        """``[N, K]``."""
        return self.outputs, self.inputs

    @property
    def config(self) -> dict[str, Any]:
        """Layer and rows."""
        return {"width": self.outputs, "inputs": self.inputs, "batch": self.rows, "T": 1}

    def weight(self, generator: torch.Generator) -> Tensor:
        """Gaussian, currents of unit variance at full density."""
        return torch.randn(self.w, generator=generator) / math.sqrt(self.inputs)

    def reference(self, x: Tensor, weight: Tensor) -> Reference:
        """The product in float64."""
        return ProductReference(x, weight)


class ProductReference:
    """Holds a product to its float64 error budget (:func:`sparseflow.kernels.reference.error_budget`)."""

    what = "every output within twice the error of PyTorch's dense product of the same precision, and a rounding band"

    densities: dict[str, float] = {}

    def __init__(self, x: Tensor, weight: Tensor):
        self._operands = x, weight
        self._budgets: dict[str, tuple[Tensor, Tensor]] = {}

    def judge(self, output: Tensor, precision: str) -> Gate:
        """``precision`` is ``fp32`` or ``bf16``, in which case the weights are rounded to it first."""
        exact, budget = self._of(precision)
        if output.shape != exact.shape:
            return Gate(False, self.what, (f"shape {tuple(output.shape)}, not {tuple(exact.shape)}",))
        worst = float(((output.double() - exact).abs() / budget).nan_to_num(nan=math.inf).max())
        return Gate(worst <= 1.0, self.what, () if worst <= 1.0 else (f"{worst:.3g} budgets off",))

    def _of(self, precision: str) -> tuple[Tensor, Tensor]:
        if precision not in self._budgets:
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            x, weight = (tensor.to(dtype) for tensor in self._operands)
            call = LinearCall()
            self._budgets[precision] = oracle(x, weight, None, call), error_budget(x, weight, None, call)
        return self._budgets[precision]


@dataclasses.dataclass(frozen=True)
class LifLayer:
    """The layer of Open Neuromorphic's table: linear, then LIF neurons, over T steps. Spikes ``[T, N, C]`` in and out.

    Its input is spikes, where that table's is noise: noise has no zeros, and no layer inside a spiking network sees it.

    >>> LifLayer(512, 0.05).name
    'linear + LIF 512, B 16, T 500, spikes 5%'
    """

    neurons: int
    density: float = 0.05
    batch: int = 16
    steps: int = 500
    device: str = "cpu"

    @property
    def name(self) -> str:
        """As in the tables."""
        sizes = f"{self.neurons}, B {self.batch}, T {self.steps}"
        return f"linear + LIF {sizes}, spikes {self.density:.0%}{_on(self.device)}"

    @property
    def densities(self) -> tuple[float, ...]:
        """The one that the weights are made for."""
        return (self.density,)

    @property
    def x(self) -> tuple[int, ...]:
        """``[T, N, C]``."""
        return self.steps, self.batch, self.neurons

    @property
    def w(self) -> tuple[int, int]:
        """``[C, C]``."""
        return self.neurons, self.neurons

    @property
    def config(self) -> dict[str, Any]:
        """Width, batch, T, and the neuron's equations, which are the same for all."""
        neuron = "v = v / 2 + W x; fires where v reaches 1; then v = 0"
        return {"width": self.neurons, "batch": self.batch, "T": self.steps, "neuron": neuron}

    def weight(self, generator: torch.Generator) -> Tensor:
        """Gaussian, of a size that makes about one neuron in thirteen fire at this density of the input."""
        return torch.randn(self.w, generator=generator) * (_GAIN / math.sqrt(self.neurons * self.density))

    def reference(self, x: Tensor, weight: Tensor) -> Reference:
        """The layer in float64."""
        return LifReference(x, weight)


class LifReference:
    """Spikes of the layer in float64, and where rounding may flip one.

    Up to its first flip a neuron follows the float64 membrane within a budget: that of the currents (twice the dense
    float32 error and ``(sqrt(n) + 1) u`` times the sum of magnitudes, as for products), carried along by the leak, and
    the roundings of the update itself. A first flip where the membrane was farther than that from the threshold is
    wrong. What a neuron does after a flip follows from it and is not judged.
    """

    what = "against float64: no neuron's first flip lies farther from the threshold than the rounding of its membrane"

    def __init__(self, x: Tensor, weight: Tensor):
        self.spikes = torch.empty(x.shape[0], x.shape[1], weight.shape[0], dtype=torch.bool)
        self.at_risk = torch.empty_like(self.spikes)
        v = torch.zeros(self.spikes.shape[1:], dtype=torch.float64)
        band = torch.zeros_like(v)
        for t, (current, budget) in enumerate(_currents(x, weight)):
            v = _LEAK * v + current
            rounding = _NEURON_ROUNDINGS * _EPS / 2 * (v.abs() + current.abs())
            band = _LEAK * band + budget + rounding
            fired = v >= 1.0
            self.spikes[t], self.at_risk[t] = fired, (v - 1.0).abs() <= band
            v, band = v.masked_fill(fired, 0.0), band.masked_fill(fired, 0.0)

    @property
    def densities(self) -> dict[str, float]:
        """Share of neurons and steps that fire."""
        return {"output": float(self.spikes.float().mean())}

    def judge(self, output: Tensor, precision: str) -> Gate:
        """``output`` is ``[T, N, C]`` of zeros and ones, computed in float32."""
        assert precision == "fp32", precision
        if output.shape != self.spikes.shape:
            return Gate(False, self.what, (f"shape {tuple(output.shape)}, not {tuple(self.spikes.shape)}",))
        flipped = torch.zeros(self.spikes.shape[1:], dtype=torch.bool)
        wrong = torch.zeros_like(flipped)
        for t, spikes in enumerate(output):
            flips = spikes != self.spikes[t].to(spikes.dtype)
            wrong |= flips & ~flipped & ~self.at_risk[t]
            flipped |= flips
        share, count = float(flipped.float().mean()), int(wrong.sum())
        why = (f"{count} neurons first differ far from the threshold; {share:.3%} differ at all",) if count else ()
        return Gate(not count, f"{self.what} ({share:.3%} of the neurons had a flip)", why)


def _currents(x: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Currents ``[N, C]`` in float64 and their budgets, step by step."""
    exact_weight, magnitudes = weight.double(), weight.abs()
    for chunk in x.split(_CHUNK):
        exact = F.linear(chunk.double(), exact_weight)
        worst = 2 * (F.linear(chunk, weight) - exact).abs().max()
        terms = chunk.count_nonzero(-1).unsqueeze(-1).double()
        budget = worst + (terms.sqrt() + 1) * (_EPS / 2) * F.linear(chunk, magnitudes)
        yield from zip(exact, budget, strict=True)


def largest_layer(limit: int = 16384) -> int:
    """Neurons of the largest layer, a power of two up to ``limit``, of which all workers together fit in memory.

    Each may take 4 GB, and all together half of the machine's memory. A worker holds the weights, two inputs, the
    currents and the spikes.
    """
    total = _physical_memory() / 2
    neurons = limit
    while neurons > 256 and _footprint(neurons) > min(_MEMORY_EACH, total / _WORKERS):
        neurons //= 2
    return neurons


def _footprint(neurons: int) -> int:
    layer = LifLayer(neurons)
    return 4 * (neurons**2 + 4 * math.prod(layer.x))


def _physical_memory() -> int:
    """Bytes; 16 GB where the system does not say."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 16 << 30


def _on(device: str) -> str:
    return "" if device == "cpu" else f", {device}"


def write_raw(tensor: Tensor, path: Path) -> str:
    """Store float32 values as the workers read them."""
    target = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=torch.float32)
    target.copy_(tensor.reshape(-1))
    return str(path)


def read_raw(path: Path, shape: Sequence[int]) -> Tensor:
    """What a worker stored."""
    return torch.from_file(str(path), size=math.prod(shape), dtype=torch.float32).reshape(tuple(shape))


def spikes(problem: Problem, density: float, generator: torch.Generator) -> Tensor:
    """One input of independent spikes, in float32."""
    return torch.empty(problem.x).bernoulli_(density, generator=generator)
