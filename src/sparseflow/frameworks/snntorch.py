"""snnTorch 1.x neurons. Looks only at an already imported ``snntorch``.

snnTorch fires at ``mem > threshold`` (strictly) and applies the reset at the start of the next step
(``snntorch/_neurons/leaky.py``), with ``reset_delay=False`` also right after the spike.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparseflow.neuron import Charge, NeuronSpec, Reset, ResetTiming, tensor_names
from sparseflow.plan import Provenance

_STATES = {
    "Alpha": ("mem", "syn_exc", "syn_inh"),
    "DeltaLeaky": ("mem", "mem_prev"),
    "Lapicque": ("mem",),
    "Leaky": ("mem",),
    "RLeaky": ("mem", "spk"),
    "RSynaptic": ("mem", "syn", "spk"),
    "SConv2dLSTM": ("mem", "syn"),
    "SLSTM": ("mem", "syn"),
    "Synaptic": ("mem", "syn"),
}
# These take the whole sequence at once and return spikes only where output=True asked for them.
_SEQUENCE = frozenset({"LinearLeaky", "StateLeaky"})
# What decides the update of a described neuron: tensors of each class, and other attributes of all.
_CONSTANTS = {
    "Lapicque": ("threshold", "graded_spikes_factor", "reset_mechanism_val", "R", "C", "time_step"),
    "Leaky": ("threshold", "graded_spikes_factor", "reset_mechanism_val", "beta"),
    "Synaptic": ("threshold", "graded_spikes_factor", "reset_mechanism_val", "alpha", "beta"),
}
_SWITCHES = (
    "spike_grad",
    "state_function",
    "reset_delay",
    "inhibition",
    "state_quant",
    "init_hidden",
    "output",
)
# By the method that computes the membrane, with the number of the same mechanism in reset_mechanism_val.
_RESETS = {"_base_sub": (Reset.SOFT, 0), "_base_zero": (Reset.HARD, 1), "_base_int": (Reset.NONE, 2)}

STATE_METHODS = (
    "reset_mem",
    "init_leaky",
    "init_rleaky",
    "init_lapicque",
    "init_synaptic",
    "init_rsynaptic",
    "init_alpha",
    "init_slstm",
    "init_sconv2dlstm",
    "reset_hidden",
    "detach_hidden",
)
"""Methods by which a forward changes the hidden state of a neuron."""


def imported() -> bool:
    """Whether the user has imported snnTorch; no module of it can exist otherwise."""
    return "snntorch" in sys.modules


def neuron_spec(module: nn.Module) -> NeuronSpec | None:
    """The record of a snnTorch neuron, or ``None`` for any other module."""
    name = type(module).__name__
    if not _is(module, name):
        return None
    if name in _SEQUENCE:
        return NeuronSpec(emits=_emitted(module)) if getattr(module, "output", False) else None
    if name == "LeakyParallel":
        return NeuronSpec(emits=_emitted(module))
    if name not in _STATES:
        return None
    described = _described(module, name) if name in _CONSTANTS else None
    return described or NeuronSpec(emits=_emitted(module), states=_STATES[name], comparator=">")


def watched(kind: type[nn.Module]) -> Callable[[dict[str, Any]], tuple[Any, ...]] | None:
    """What reads, from a module's attributes, all that the update of a neuron of a described class depends on."""
    name = kind.__name__
    if name not in _CONSTANTS or kind is not getattr(sys.modules.get("snntorch"), name, None):
        return None
    return functools.partial(_switches, constants=_CONSTANTS[name])


def _switches(attributes: dict[str, Any], constants: tuple[str, ...]) -> tuple[Any, ...]:
    parameters, buffers = attributes["_parameters"], attributes["_buffers"]
    tensors = [parameters[name] if name in parameters else buffers.get(name) for name in constants]
    return (*map(attributes.get, _SWITCHES), *tensors)


def steps_over_time(module: nn.Module) -> bool:
    """Whether one call takes a whole sequence ``[T, N, C]``."""
    name = type(module).__name__
    return (name in _SEQUENCE or name == "LeakyParallel") and _is(module, name)


def is_spiking_neuron(module: nn.Module) -> bool:
    """Whether ``module`` is one of snnTorch's neurons (``LeakyParallel`` does not derive from ``SpikingNeuron``)."""
    snn = sys.modules.get("snntorch")
    return snn is not None and isinstance(module, (snn.SpikingNeuron, snn.LeakyParallel))


def _is(module: nn.Module, name: str) -> bool:
    return type(module) is getattr(sys.modules.get("snntorch"), name, None)


def _emitted(module: Any) -> Provenance:
    return Provenance.BINARY if _is_ungraded(module) else Provenance.SPARSE


def _is_ungraded(module: Any) -> bool:
    factor = getattr(module, "graded_spikes_factor", 1.0)
    return not isinstance(factor, nn.Parameter) and bool(torch.all(torch.as_tensor(factor) == 1))


def _described(module: Any, name: str) -> NeuronSpec | None:
    """The record of a neuron that does what its class is known for; ``None`` where anything else is asked of it."""
    reset = _reset(module)
    textbook = not module.state_quant and not module.inhibition and _fires_above(module.spike_grad)
    if reset is None or not textbook or not _is_ungraded(module):
        return None
    if not all(_is_float32(getattr(module, constant)) for constant in _CONSTANTS[name]):
        return None
    return _UPDATES[name](module, states=_STATES[name], threshold=_float32(module.threshold), comparator=">", **reset)


def _is_float32(value: torch.Tensor) -> bool:
    """Whether an operation of ``value`` with float32 tensors is one in float32."""
    number = value.is_floating_point() or not (value.is_complex() or value.dtype is torch.bool)
    return number and (value.dim() == 0 or torch.promote_types(value.dtype, torch.float32) is torch.float32)


def _float32(value: torch.Tensor) -> torch.Tensor:
    """``value`` as it enters an operation with float32 tensors."""
    return value.detach().to(torch.float32)


def _fires_above(spike_grad: Any) -> bool:
    """Whether the surrogate is one of snnTorch's, all of which are ``(x > 0).float()``; a user's own may be anything.

    Their functions have no names to go by, so this asks in which module they were written.
    """
    if spike_grad is sys.modules["snntorch"].SpikingNeuron._surrogate_bypass:
        return True
    return getattr(spike_grad, "__globals__", None) is vars(sys.modules["snntorch.surrogate"])


def _reset(module: Any) -> dict[str, Any] | None:
    """How and when the membrane is reset; ``None`` where the neuron contradicts itself.

    The mechanism is chosen when the neuron is made, as ``state_function``. Assigning ``reset_mechanism`` or loading a
    state dict changes only ``reset_mechanism_val``, which is what the reset without delay goes by, and nothing else.
    """
    function = module.state_function
    kind, number = _RESETS.get(getattr(function, "__name__", ""), (None, 0))
    if kind is None or getattr(function, "__self__", None) is not module:
        return None
    if getattr(module, "reset_delay", True):
        return {"reset": kind, "reset_timing": ResetTiming.NEXT_STEP}
    if int(module.reset_mechanism_val) != number:
        return None
    return {"reset": kind, "reset_timing": ResetTiming.BOTH}


def _leaky(module: Any, **common: Any) -> NeuronSpec:
    names = tensor_names(module, {"decay": "beta", "threshold": "threshold"})
    return NeuronSpec(charge=Charge.DECAY, decay=_float32(module.beta.clamp(0, 1)), **common, **names)


def _synaptic(module: Any, **common: Any) -> NeuronSpec:
    names = tensor_names(module, {"decay": "beta", "synapse_decay": "alpha", "threshold": "threshold"})
    decays = {"decay": _float32(module.beta.clamp(0, 1)), "synapse_decay": _float32(module.alpha.clamp(0, 1))}
    return NeuronSpec(charge=Charge.SYNAPTIC, **decays, **common, **names)


def _lapicque(module: Any, **common: Any) -> NeuronSpec:
    """``beta`` only helps to find R and C when the neuron is made; its forward goes by R, C and the time step.

    They may be whole numbers, so every term is computed as the forward computes it and rounded once after that.
    """
    gains = (module.R, 1 / (module.R * module.C), module.time_step)
    decay = 1 - (module.time_step / (module.R * module.C))
    r, rate, step = map(_float32, gains)
    names = tensor_names(module, {"threshold": "threshold"})
    return NeuronSpec(charge=Charge.DECAY_GAIN, decay=_float32(decay), input_gains=(r, rate, step), **common, **names)


_TRAINED = {"beta": "decay", "alpha": "synapse_decay"}  # attributes by field of the record, all clamped to 0..1


def live_constants(module: Any) -> dict[str, Any]:
    """Constants of a described neuron's record that may be trained, as its forward computes them, with gradients."""
    names = _CONSTANTS[type(module).__name__]
    decays = {field: getattr(module, name).clamp(0, 1) for name, field in _TRAINED.items() if name in names}
    return decays | {"threshold": module.threshold}


def fire(module: Any, mem: Any) -> Any:
    """Spikes of membrane ``mem``, with the gradient of the neuron's surrogate."""
    return module.fire(mem)


_UPDATES: dict[str, Callable[..., NeuronSpec]] = {"Lapicque": _lapicque, "Leaky": _leaky, "Synaptic": _synaptic}
