"""Every neuron that temporal layers know: how to make one, and how to run it in its own framework."""

from __future__ import annotations

from collections.abc import Callable

import snntorch as snn
import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

HIGH = 1e6  # a threshold that is never reached


def spikingjelly(make: Callable[..., nn.Module], **arguments) -> Callable[[float], nn.Module]:
    return lambda threshold: make(v_threshold=threshold, step_mode="m", **arguments)


def snntorch(make: Callable[..., nn.Module], **arguments) -> Callable[[float], nn.Module]:
    return lambda threshold: make(threshold=threshold, init_hidden=True, **arguments)


KINDS: dict[str, Callable[[float], nn.Module]] = {
    "IF hard": spikingjelly(neuron.IFNode),
    "IF soft": spikingjelly(neuron.IFNode, v_reset=None),
    "LIF": spikingjelly(neuron.LIFNode, tau=2.5),
    "LIF to -0.3": spikingjelly(neuron.LIFNode, tau=2.5, v_reset=-0.3),
    "LIF without decay of its input, soft": spikingjelly(neuron.LIFNode, tau=3.0, decay_input=False, v_reset=None),
    "PLIF": spikingjelly(neuron.ParametricLIFNode, init_tau=2.5),
    "PLIF without decay of its input": spikingjelly(neuron.ParametricLIFNode, init_tau=2.5, decay_input=False),
    "Leaky": snntorch(snn.Leaky, beta=0.8),
    "Leaky zero": snntorch(snn.Leaky, beta=0.8, reset_mechanism="zero"),
    "Leaky none": snntorch(snn.Leaky, beta=0.8, reset_mechanism="none"),
    "Leaky at once": snntorch(snn.Leaky, beta=0.8, reset_delay=False),
    "Leaky zero at once": snntorch(snn.Leaky, beta=0.8, reset_mechanism="zero", reset_delay=False),
    "Leaky per channel": snntorch(snn.Leaky, beta=torch.linspace(0.5, 0.9, 6), learn_beta=True),
    "Lapicque": snntorch(snn.Lapicque, beta=0.8),
    "Lapicque zero": snntorch(snn.Lapicque, beta=0.8, reset_mechanism="zero"),
    "Synaptic": snntorch(snn.Synaptic, alpha=0.7, beta=0.8),
    "Synaptic zero": snntorch(snn.Synaptic, alpha=0.7, beta=0.8, reset_mechanism="zero"),
}
SYNAPTIC = {name for name in KINDS if name.startswith("Synaptic")}
PER_CHANNEL = {name for name in KINDS if "per channel" in name}


def stepped(module: nn.Module, currents: Tensor) -> Tensor:
    """Spikes ``[T, N, ...]`` of the framework's own module."""
    if hasattr(module, "step_mode"):
        return module(currents)
    return torch.stack([module(x) for x in currents])


def membrane(module: nn.Module) -> Tensor:
    return module.v if hasattr(module, "step_mode") else module.mem
