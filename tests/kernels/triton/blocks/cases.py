"""Neurons, spikes and states for the tests of fused blocks; everything is tiny, since the interpreter is slow."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from sparseflow.kernels.blocks import reference
from sparseflow.kernels.blocks.records import Dynamics, State
from sparseflow.kernels.blocks.spikes import PackedSpikes, pack, unpack
from sparseflow.neuron import Charge, Reset, ResetTiming

NEURONS = tuple(itertools.product(Charge, Reset, ResetTiming, (">=", ">")))


def neuron_of(
    charge: Charge, reset: Reset, timing: ResetTiming, comparator: str, channels: int | None = None
) -> Dynamics:
    """A neuron with odd constants, one a channel where ``channels`` is given."""

    def constant(value: float) -> float | Tensor:
        return value if channels is None else value * (1 + 0.1 * torch.rand(channels))

    divides = charge in (Charge.LEAK, Charge.LEAK_INPUT)
    return Dynamics(
        charge,
        comparator,
        reset,
        timing,
        reset_value=0.125 if reset is Reset.HARD else 0.0,
        threshold=constant(0.75),
        decay=constant(1.7 if divides else 0.9),
        input_gains=(constant(1.3), constant(0.7), constant(1.1)),
        synapse_decay=constant(0.6),
    )


LIF = Dynamics(Charge.LEAK_INPUT, ">=", Reset.HARD, ResetTiming.SAME_STEP, 0.0, 1.0, decay=2.0)
IF_AT_ONE = Dynamics(Charge.INTEGRATE, ">=", Reset.SOFT, ResetTiming.SAME_STEP, 0.0, 1.0)


def state_of(neuron: Dynamics, shape: tuple[int, int, int], steps: int, *, fresh: bool, seq: bool = False) -> State:
    """A state with random membranes, or one that starts at an eighth and holds NaN before."""
    v = torch.empty(shape) if fresh else torch.randn(shape)
    syn = None if not neuron.synaptic else torch.empty(shape) if fresh else torch.randn(shape)
    return State(v, syn, fresh, 0.125, torch.empty(steps, *shape) if seq else None)


def copied(state: State) -> State:
    """The same state in memory of its own."""
    tensors = {name: getattr(state, name) for name in ("v", "syn", "v_seq")}
    return dataclasses.replace(state, **{name: None if t is None else t.clone() for name, t in tensors.items()})


def same_state(a: State, b: State) -> bool:
    """Whether two states hold the same bits."""
    pairs = ((getattr(a, name), getattr(b, name)) for name in ("v", "syn", "v_seq"))
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


def draw(
    lead: tuple[int, ...], channels: int, size: tuple[int, ...], density: float, *, most: int = 1, seed: int = 0
) -> PackedSpikes:
    """Random spikes ``[*lead, channels, *size]``, counts up to ``most``, as the Triton kernels get them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*lead, channels, *size)
    x = (torch.rand(shape, generator=generator) < density) * torch.randint(1, most + 1, shape, generator=generator)
    packed = dataclasses.replace(pack(x.float(), len(lead)), row_counts=None)
    if most > 1 and packed.counts is None:
        packed = dataclasses.replace(packed, counts=reference.channels_last(x, len(lead)).to(torch.uint8))
    return packed


def assert_same(found: PackedSpikes, wanted: PackedSpikes) -> None:
    """Equal shape, values, bits (those past the last channel included) and count."""
    assert (found.lead, found.channels, found.size, found.dims) == (
        wanted.lead,
        wanted.channels,
        wanted.size,
        wanted.dims,
    )
    assert torch.equal(unpack(found), unpack(wanted))
    assert torch.equal(found.bits, wanted.bits)
    assert found.row_counts is None
    assert found.nonzero is not None
    assert wanted.nonzero is not None
    assert found.nonzero.tolist() == wanted.nonzero.tolist()
