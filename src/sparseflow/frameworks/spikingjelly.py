"""SpikingJelly 2.x neurons, encoders and containers. Looks only at an already imported ``spikingjelly``.

SpikingJelly fires at ``v >= v_threshold`` and resets in the same time step (``functional/neuron.py``). Classes are
matched exactly, because subclasses change what is emitted: ILIF, LIAF and the online-learning neurons all derive
from ``LIFNode``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from sparseflow.frameworks.spec import Charge, NeuronSpec, Reset, tensor_names
from sparseflow.plan import Provenance

_ROOT = "spikingjelly.activation_based"

_OPAQUE_BINARY = frozenset(
    {
        "ActivationAwareIFNode",
        "CUBALIFNode",
        "ComplementaryLIFNode",
        "EIFNode",
        "GatedLIFNode",
        "HalfThresholdIFNode",
        "ILCCUBALIFNode",
        "ILCIFNode",
        "ILCLIFNode",
        "IzhikevichNode",
        "KLIFNode",
        "MPBNLIFNode",
        "MaskedPSN",
        "NoisyCUBALIFNode",
        "NoisyILCCUBALIFNode",
        "OTTTLIFNode",
        "PSN",
        "QIFNode",
        "RAFNode",
        "SLTTLIFNode",
        "SimpleIFNode",
        "SimpleLIFNode",
        "SlidingPSN",
        "save_v_LIFNode",
    }
)
_OPAQUE_GRADED = frozenset(
    {
        "DSRIFNode",
        "DSRLIFNode",
        "FewSpikeNode",
        "HGNode",
        "OutlierAwareThresholdNode",
        "STBIFNode",
        "TernaryIFNode",
        "TernaryLIFNode",
    }
)
_PACKAGES = {"save_v_LIFNode": "model.spike_dhs"}
_ENCODERS = ("PoissonEncoder", "LatencyEncoder", "PeriodicEncoder", "WeightedPhaseEncoder")
_CONTAINERS = (
    "MultiStepContainer",
    "SeqToANNContainer",
    "StepModeContainer",
    "TLastMultiStepContainer",
    "TLastSeqToANNContainer",
)


def imported() -> bool:
    """Whether the user has imported SpikingJelly; no module of it can exist otherwise."""
    return f"{_ROOT}.base" in sys.modules


def neuron_spec(module: nn.Module) -> NeuronSpec | None:
    """The record of a SpikingJelly neuron, or ``None`` for any other module."""
    name = type(module).__name__
    if not _is(module, _PACKAGES.get(name, "neuron"), name) or not _emits_spikes(module):
        return None
    if name in _DESCRIBED:
        return _DESCRIBED[name](module)
    if name == "ILIFNode":
        return NeuronSpec(emits=Provenance.INTEGER, states=("v",))
    if name in _OPAQUE_GRADED:
        return NeuronSpec(emits=Provenance.SPARSE, states=_memories(module))
    if name in _OPAQUE_BINARY:
        return NeuronSpec(states=_memories(module))
    return None


def encodes_spikes(module: nn.Module) -> bool:
    """Whether ``module`` turns analog input into {0, 1} spikes."""
    return type(module).__name__ in _ENCODERS and _is(module, "encoding", type(module).__name__)


def is_step_module(module: nn.Module) -> bool:
    """Whether ``module`` switches between single-step and multi-step input."""
    base = sys.modules.get(f"{_ROOT}.base")
    return base is not None and isinstance(module, base.StepModule)


def is_memory_module(module: nn.Module) -> bool:
    """Whether ``module`` keeps state in ``_memories`` between calls."""
    base = sys.modules.get(f"{_ROOT}.base")
    return base is not None and isinstance(module, base.MemoryModule)


def is_container(module: nn.Module) -> bool:
    """Whether ``module`` only applies its children over time and holds no state of its own."""
    return any(_is(module, "layer", name) for name in _CONTAINERS)


def is_layer(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether ``type(module)`` is one of SpikingJelly's wrappers called ``names``."""
    name = type(module).__name__
    return name in names and _is(module, "layer", name)


def _is(module: nn.Module, package: str, name: str) -> bool:
    return type(module) is getattr(sys.modules.get(f"{_ROOT}.{package}"), name, None)


def _emits_spikes(module: nn.Module) -> bool:
    """A surrogate with ``spiking=False`` replaces the step by its smooth primitive."""
    return getattr(getattr(module, "surrogate_function", None), "spiking", True)


def _memories(module: nn.Module) -> tuple[str, ...]:
    return tuple(module.__dict__.get("_memories", ()))


def _reset(module: Any) -> dict[str, Any]:
    if module.v_reset is None:
        return {"reset": Reset.SOFT}
    return {"reset": Reset.HARD, "reset_value": module.v_reset}


def _if(module: Any) -> NeuronSpec:
    return NeuronSpec(charge=Charge.INTEGRATE, threshold=module.v_threshold, states=("v",), **_reset(module))


def _lif(module: Any) -> NeuronSpec:
    charge = Charge.LEAK_INPUT if module.decay_input else Charge.LEAK
    return NeuronSpec(charge=charge, decay=module.tau, threshold=module.v_threshold, states=("v",), **_reset(module))


def _plif(module: Any) -> NeuronSpec:
    charge = Charge.LEAK_INPUT_RATE if module.decay_input else Charge.LEAK_RATE
    return NeuronSpec(
        charge=charge,
        decay=module.w.detach().sigmoid(),
        threshold=module.v_threshold,
        states=("v",),
        **_reset(module),
        **tensor_names(module, {"decay": "w"}),
    )


_DESCRIBED: dict[str, Callable[[Any], NeuronSpec]] = {"IFNode": _if, "LIFNode": _lif, "ParametricLIFNode": _plif}


STATE_METHODS = ("reset", "detach")
"""Methods by which a forward changes the memory of a stateful module (``functional.reset_net`` calls ``reset``)."""


def layer_class(name: str) -> type[nn.Module] | None:
    """SpikingJelly's wrapper of the torch layer called ``name`` (``"Conv2d"``, ``"Linear"``...), if it is imported."""
    return getattr(sys.modules.get(f"{_ROOT}.layer"), name, None)
