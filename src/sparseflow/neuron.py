"""The canonical record of a spiking neuron: what it emits, and, where one is known, its exact update rule."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import torch

from sparseflow.plan import Provenance

Scalar = float | torch.Tensor


class Charge(enum.StrEnum):
    """Membrane update before firing, in the framework's own order of operations.

    ``v`` is the membrane, ``x`` the input, ``r`` the resting value (``reset_value``, or 0 under a soft reset), ``d``
    the record's ``decay``, ``g1 g2 g3`` its ``input_gains`` and ``a`` its ``synapse_decay``. The order is part of the
    meaning: another one rounds differently, and one rounding can flip a spike.
    """

    INTEGRATE = "v + x"
    LEAK_INPUT = "v + (x - (v - r)) / d"
    LEAK = "v - (v - r) / d + x"
    LEAK_INPUT_RATE = "v + (x - (v - r)) * d"
    LEAK_RATE = "v - (v - r) * d + x"
    DECAY = "d * v + x"
    DECAY_GAIN = "x * g1 * g2 * g3 + d * v"
    SYNAPTIC = "syn = a * syn + x; d * v + syn"


class Reset(enum.StrEnum):
    """What a spike does to the membrane: ``HARD`` sets it to a value, ``SOFT`` subtracts the threshold."""

    HARD = "hard"
    SOFT = "soft"
    NONE = "none"


class ResetTiming(enum.StrEnum):
    """When the reset acts.

    ``SAME_STEP``: right after the spike. ``NEXT_STEP`` (snnTorch's default): when the next step's membrane is computed,
    if the membrane it starts from is above the threshold; a hard reset acts before a ``DECAY`` charge and after any
    other, a soft one after. ``BOTH`` (snnTorch's ``reset_delay=False``): as ``NEXT_STEP``, and then the difference
    between this spike and that reset, ``s - r`` of {-1, 0, 1}, is applied to the membrane that has just fired.
    """

    SAME_STEP = "same"
    NEXT_STEP = "next"
    BOTH = "both"


@dataclasses.dataclass(frozen=True, eq=False)
class NeuronSpec:
    """What sparseflow knows about one neuron.

    Every neuron with a record is followed as a source of spikes. A record with ``charge=None`` is *opaque*: its
    output is known, its update rule is not, and the neuron is always run as it is.

    Attributes:
        emits: zeros of the output: ``BINARY`` for {0, 1}, ``INTEGER`` for counts (ILIF), ``SPARSE`` for graded or
            signed spikes.
        output_index: position of the spikes in a tuple output; ignored when the neuron returns one tensor.
        states: attributes that hold the neuron's memory between time steps: the membrane first, then the synaptic
            current where the neuron has one.
        charge: membrane update before firing, or ``None`` for an opaque neuron.
        decay, input_gains, synapse_decay: ``d``, ``(g1, g2, g3)`` and ``a`` of ``charge``, dimensionless.
        threshold: membrane value at which the neuron fires, in the unit of the membrane.
        comparator: ``">="`` (SpikingJelly) or ``">"`` (snnTorch).
        reset, reset_value, reset_timing: what a spike does to the membrane, and when.
        learnable: names among ``decay``, ``synapse_decay`` and ``threshold`` that are trained parameters.
        per_channel: names among the same that are tensors of more than one element.

    Raises:
        ValueError: ``comparator`` is neither ``">="`` nor ``">"``, or ``emits`` is ``DENSE``.

    Example:
        >>> NeuronSpec(charge=Charge.LEAK_INPUT, decay=2.0, states=("v",)).described
        True
        >>> NeuronSpec().described
        False
    """

    emits: Provenance = Provenance.BINARY
    output_index: int = 0
    states: tuple[str, ...] = ()
    charge: Charge | None = None
    decay: Scalar = 1.0
    input_gains: tuple[Scalar, Scalar, Scalar] = (1.0, 1.0, 1.0)
    synapse_decay: Scalar = 1.0
    threshold: Scalar = 1.0
    comparator: str = ">="
    reset: Reset = Reset.HARD
    reset_value: float = 0.0
    reset_timing: ResetTiming = ResetTiming.SAME_STEP
    learnable: tuple[str, ...] = ()
    per_channel: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.comparator not in (">=", ">"):
            raise ValueError(f"comparator must be '>=' or '>', got {self.comparator!r}")
        if self.emits is Provenance.DENSE:
            raise ValueError("a neuron that emits DENSE values is not a source of spikes; leave it unregistered")

    @property
    def described(self) -> bool:
        """Whether the update rule is known, so that a kernel could compute this neuron."""
        return self.charge is not None


def tensor_names(module: torch.nn.Module, attributes: dict[str, str]) -> dict[str, Any]:
    """``learnable`` and ``per_channel`` of a record, from the attributes of ``module`` that hold its constants.

    ``attributes`` maps record fields to attribute names, e.g. ``{"decay": "beta"}``.
    """
    values = {field: getattr(module, name) for field, name in attributes.items()}
    return {
        "learnable": tuple(f for f, value in values.items() if isinstance(value, torch.nn.Parameter)),
        "per_channel": tuple(f for f, value in values.items() if isinstance(value, torch.Tensor) and value.numel() > 1),
    }
