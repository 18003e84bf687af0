"""snnTorch 1.x neurons. Looks only at an already imported ``snntorch``.

snnTorch fires at ``mem > threshold`` (strictly) and applies the reset at the start of the next step
(``snntorch/_neurons/leaky.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparseflow.frameworks.spec import Charge, NeuronSpec, Reset, ResetTiming, tensor_names
from sparseflow.plan import Provenance

_STATES = {
    "Alpha": ("syn_exc", "syn_inh", "mem"),
    "DeltaLeaky": ("mem", "mem_prev"),
    "Lapicque": ("mem",),
    "Leaky": ("mem",),
    "RLeaky": ("spk", "mem"),
    "RSynaptic": ("spk", "syn", "mem"),
    "SConv2dLSTM": ("syn", "mem"),
    "SLSTM": ("syn", "mem"),
    "Synaptic": ("syn", "mem"),
}
# These take the whole sequence at once and return spikes only where output=True asked for them.
_SEQUENCE = frozenset({"LinearLeaky", "StateLeaky"})
_RESETS = {"subtract": Reset.SOFT, "zero": Reset.HARD, "none": Reset.NONE}

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
    if type(module) is not getattr(sys.modules.get("snntorch"), name, None):
        return None
    if name in _SEQUENCE:
        return NeuronSpec(emits=_emitted(module)) if getattr(module, "output", False) else None
    if name == "LeakyParallel":
        return NeuronSpec(emits=_emitted(module))
    if name not in _STATES:
        return None
    if name in _DESCRIBED and _is_plain(module):
        return _DESCRIBED[name](module)
    return NeuronSpec(emits=_emitted(module), states=_STATES[name], comparator=">")


def is_spiking_neuron(module: nn.Module) -> bool:
    """Whether ``module`` is one of snnTorch's neurons (``LeakyParallel`` does not derive from ``SpikingNeuron``)."""
    snn = sys.modules.get("snntorch")
    return snn is not None and isinstance(module, (snn.SpikingNeuron, snn.LeakyParallel))


def _emitted(module: Any) -> Provenance:
    factor = getattr(module, "graded_spikes_factor", 1.0)
    if isinstance(factor, nn.Parameter) or not bool(torch.all(torch.as_tensor(factor) == 1)):
        return Provenance.SPARSE
    return Provenance.BINARY


def _is_plain(module: Any) -> bool:
    """Whether the textbook update applies: no quantised state, no winner-take-all, reset at the next step."""
    return not module.state_quant and not module.inhibition and getattr(module, "reset_delay", True)


def _common(module: Any) -> dict[str, Any]:
    return {
        "emits": _emitted(module),
        "states": ("mem",),
        "threshold": module.threshold.detach(),
        "comparator": ">",
        "reset": _RESETS[module.reset_mechanism],
        "reset_timing": ResetTiming.NEXT_STEP,
    }


def _leaky(module: Any) -> NeuronSpec:
    names = tensor_names(module, {"decay": "beta", "threshold": "threshold"})
    return NeuronSpec(charge=Charge.DECAY, decay=module.beta.detach().clamp(0, 1), **_common(module), **names)


_DESCRIBED: dict[str, Callable[[Any], NeuronSpec]] = {"Leaky": _leaky}
