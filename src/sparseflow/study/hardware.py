"""Clock cycles of an event-driven accelerator, counted from spikes by the formulas of a published design.

The design is the one on which *Surrogates, Spikes, and Sparsity: Performance Analysis and Characterization of SNN
Hyperparameters on Hardware* (arXiv 2603.24891) measures; the formulas are read off its public register-transfer code.
Every layer has an encoder, which looks for spikes ``P`` positions at a time, and ``EC`` neuron units, which add weights
to membrane potentials side by side. For a convolution with kernel ``k_h x k_w``, ``F`` positions of a map and ``s``
spikes in an input channel and time step::

    ceil(C_out / EC) * sum_t [ sum_c max(k_h k_w s, 2 s + 2 ceil(F / P) + 3) + H_out W_out ]

and for a linear layer with ``N`` neurons and ``s_t`` spikes in step ``t``::

    (N // EC + 1) * sum_t [ max(s_t, 1) + 2 ]

The published kernels are 3 x 3 with stride 1 (9 taps). For others we count every tap of every spike, since the design
spends a cycle also on a tap that falls outside the map, or between strides. It has no groups; we let them follow one
another, each with its own input channels. :mod:`sparseflow.study.simulator` runs the pipeline cycle by cycle.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .records import LayerShape

_CHUNKS = 4  # the published design looks at a quarter of a map at a time
_ENCODER_STATES = 3  # fetch a map, hand its spikes over, go to the next channel
_STEP_STATES = 2  # of a linear layer: fire, go to the next step


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """An event-driven accelerator.

    Args:
        encoder_width: positions that an encoder looks at in a cycle (P); ``None`` for a quarter of the layer's map, as
            in the published design.
        neuron_units: output channels, or neurons of a linear layer, computed side by side (EC): a number, or one for
            every layer by name.
        clock_mhz: clock frequency in MHz. It only turns cycles into time; the default is a usual one for an FPGA.

    Raises:
        ValueError: one of them is not positive.

    >>> Accelerator(neuron_units={"conv1": 8}).units(LayerShape("conv1", 2, 16))
    8
    """

    encoder_width: int | None = None
    neuron_units: int | Mapping[str, int] = 16
    clock_mhz: float = 100.0

    def __post_init__(self) -> None:
        units = self.neuron_units.values() if isinstance(self.neuron_units, Mapping) else [self.neuron_units]
        widths = [] if self.encoder_width is None else [self.encoder_width]
        if min(*units, *widths, self.clock_mhz, math.inf) <= 0:
            raise ValueError(f"encoder width, neuron units and clock have to be positive: {self}")

    def units(self, shape: LayerShape) -> int:
        """Neuron units of a layer. Raises :class:`ValueError` where they are given by name, but not for this layer."""
        if not isinstance(self.neuron_units, Mapping):
            return self.neuron_units
        if shape.name not in self.neuron_units:
            raise ValueError(f"{shape.name}: no neuron units; they are given for {', '.join(self.neuron_units)}")
        return self.neuron_units[shape.name]

    def chunks(self, shape: LayerShape) -> int:
        """Times the encoder loads positions until it has seen a whole map, ``ceil(F / P)``."""
        width = self.encoder_width or -(-positions(shape) // _CHUNKS)
        return -(-positions(shape) // width)

    def ms(self, cycles: Tensor | float) -> Tensor | float:
        """Milliseconds of so many cycles.

        >>> Accelerator(clock_mhz=200).ms(1_000_000)
        5.0
        """
        return cycles / (self.clock_mhz * 1e3)


class Phases(NamedTuple):
    """Cycles per image, float64 ``[N]`` each: busy ones of every phase, and what a layer takes.

    ``total`` is less than the sum, since a convolution's encoder already works on the next channel while the units add
    up the last one. Of a linear layer ``encode`` is not in ``total``: it comes first, and the formula leaves it out.
    """

    encode: Tensor
    accumulate: Tensor
    fire: Tensor
    total: Tensor


def positions(shape: LayerShape) -> int:
    """What an encoder has to look through (F): a channel's map, or all inputs of a linear layer."""
    return shape.in_channels if shape.linear else math.prod(shape.in_size)


def phases(shape: LayerShape, counts: Tensor, accelerator: Accelerator) -> Phases:
    """Cycles of a layer and of its phases.

    Args:
        shape: the layer.
        counts: spikes ``[N, T, C_in]`` that come in, per image, time step and input channel. They may be fractions. Of
            a linear layer the last dimension may also be summed up already, ``[N, T, 1]``.
        accelerator: what the layer runs on.

    Raises:
        ValueError: ``counts`` does not fit the layer, or is negative.

    >>> phases(LayerShape("fc", 4, 8), torch.tensor([[[3.0], [0.0]]]), Accelerator(neuron_units=4)).total
    tensor([24.], dtype=torch.float64)
    """
    counts = _checked(shape, counts)
    return (_linear if shape.linear else _convolution)(shape, counts, accelerator)


def cycles(shape: LayerShape, counts: Tensor, accelerator: Accelerator) -> Tensor:
    """Cycles of a layer, float64 ``[N]``; arguments and errors as of :func:`phases`.

    >>> shape = LayerShape("conv", 1, 4, (3, 3), padding=(1, 1), in_size=(4, 4), out_size=(4, 4))
    >>> cycles(shape, torch.tensor([[[0.0]], [[5.0]]]), Accelerator(neuron_units=4))
    tensor([27., 61.], dtype=torch.float64)
    """
    return phases(shape, counts, accelerator).total


def network_cycles(
    layers: Iterable[tuple[LayerShape, Tensor]], accelerator: Accelerator, *, pipelined: bool = False
) -> Tensor:
    """Cycles per image of a whole network, float64 ``[N]``; ``layers`` are shapes and counts as of :func:`phases`.

    In the published design a layer starts when the one before it has stored the spikes of all time steps, so that an
    image takes the sum over the layers. ``pipelined`` gives the slowest layer instead: the interval between images of a
    stream if every spike memory existed twice, which the published design does not have.

    Raises:
        ValueError: there are no layers, or counts do not fit one.
    """
    found = [cycles(shape, counts, accelerator) for shape, counts in layers]
    if not found:
        raise ValueError("a network needs at least one layer")
    stacked = torch.stack(found)
    return stacked.amax(0) if pipelined else stacked.sum(0)


def _checked(shape: LayerShape, counts: Tensor) -> Tensor:
    widths = {shape.in_channels, 1} if shape.linear else {shape.in_channels}
    if counts.dim() != 3 or counts.shape[-1] not in widths:
        raise ValueError(f"{shape.name}: counts are [N, T, {shape.in_channels}], got {list(counts.shape)}")
    if counts.numel() and counts.min() < 0:
        raise ValueError(f"{shape.name}: negative spike counts")
    return counts.to(torch.float64)


def _convolution(shape: LayerShape, counts: Tensor, accelerator: Accelerator) -> Phases:
    passes = -(-(shape.out_channels // shape.groups) // accelerator.units(shape))
    accumulate = math.prod(shape.kernel) * counts
    encode = 2 * counts + 2 * accelerator.chunks(shape) + _ENCODER_STATES
    slower = torch.maximum(accumulate, encode).sum((1, 2))
    fire = torch.full_like(slower, counts.shape[1] * shape.groups * math.prod(shape.out_size))
    return Phases(*(passes * part for part in (encode.sum((1, 2)), accumulate.sum((1, 2)), fire, slower + fire)))


def _linear(shape: LayerShape, counts: Tensor, accelerator: Accelerator) -> Phases:
    passes = shape.out_channels // accelerator.units(shape) + 1
    spikes = counts.sum(2)
    encode = (2 * spikes + 2 * accelerator.chunks(shape)).sum(1)
    accumulate = passes * spikes.clamp(min=1).sum(1)
    fire = torch.full_like(accumulate, passes * _STEP_STATES * counts.shape[1])
    return Phases(encode, accumulate, fire, accumulate + fire)
