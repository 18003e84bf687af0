"""SpikingJelly 2.x neurons, encoders and containers. Looks only at an already imported ``spikingjelly``.

SpikingJelly fires at ``v >= v_threshold`` and resets in the same time step (``functional/neuron.py``). Classes are
matched exactly, because subclasses change what is emitted: ILIF, LIAF and the online-learning neurons all derive
from ``LIFNode``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from sparseflow.neuron import Charge, NeuronSpec, Reset, tensor_names
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
# Surrogates whose forward is ``(x >= 0).to(x)``. PoissonPass draws spikes, MultiLevelSpikeCount counts them, and what a
# user's own does is not known.
_HEAVISIDE = frozenset(
    {
        "ATan",
        "DeterministicPass",
        "Erf",
        "FakeNumericalGradient",
        "LeakyKReLU",
        "LogTailedReLU",
        "NonzeroSignLogAbs",
        "PiecewiseExp",
        "PiecewiseLeakyReLU",
        "PiecewiseQuadratic",
        "QPseudoSpike",
        "Rect",
        "S2NN",
        "Sigmoid",
        "SoftSign",
        "SquarewaveFourierSeries",
        "SuperSpike",
    }
)
# What decides the update of a described neuron, beside its surrogate and the parameter of ParametricLIFNode.
_SWITCHES = ("v_threshold", "v_reset", "tau", "decay_input", "_step_mode", "_store_v_seq", "_neuron_precision")
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
        counts = type(module.surrogate_function).__name__ == "MultiLevelSpikeCount"
        opaque = NeuronSpec(emits=Provenance.INTEGER if counts else Provenance.BINARY, states=_memories(module))
        return _DESCRIBED[name](module) if _is_textbook(module) else opaque
    if name == "ILIFNode":
        return NeuronSpec(emits=Provenance.INTEGER, states=("v",))
    if name in _OPAQUE_GRADED:
        return NeuronSpec(emits=Provenance.SPARSE, states=_memories(module))
    if name in _OPAQUE_BINARY:
        return NeuronSpec(states=_memories(module))
    return None


def watched(kind: type[nn.Module]) -> Callable[[dict[str, Any]], tuple[Any, ...]] | None:
    """What reads, from a module's attributes, all that the update of a neuron of a described class depends on."""
    known = kind.__name__ in _DESCRIBED and kind is getattr(sys.modules.get(f"{_ROOT}.neuron"), kind.__name__, None)
    return _switches if known else None


def _switches(attributes: dict[str, Any]) -> tuple[Any, ...]:
    surrogate = attributes["_modules"].get("surrogate_function")
    spiking = None if surrogate is None else surrogate.__dict__.get("spiking")
    return (*map(attributes.get, _SWITCHES), type(surrogate), spiking, attributes["_parameters"].get("w"))


def steps_over_time(module: nn.Module) -> bool:
    """Whether one call takes a whole sequence ``[T, N, *]``: ``step_mode='m'``."""
    if not is_step_module(module):
        return False
    mode = getattr(module, "step_mode", None)  # PSN and the like know no other and do not say so
    return mode == "m" or (mode is None and "s" not in cast(Any, module).supported_step_mode())


def stores_sequence(module: nn.Module) -> bool:
    """Whether the neuron keeps the membrane of every time step in ``v_seq``."""
    return is_memory_module(module) and bool(getattr(module, "store_v_seq", False))


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


def _is_textbook(module: Any) -> bool:
    """Whether the neuron fires at the threshold and computes in float32, with plain numbers as its constants."""
    surrogate = type(module.surrogate_function)
    fires = surrogate.__name__ in _HEAVISIDE and surrogate.__module__ == f"{_ROOT}.surrogate"
    constants = [module.v_threshold, getattr(module, "tau", 1.0), 0.0 if module.v_reset is None else module.v_reset]
    numbers = all(isinstance(value, (int, float)) and math.isfinite(value) for value in constants)
    return fires and numbers and module._neuron_precision is None and _weight_dtype(module) is torch.float32


def _weight_dtype(module: Any) -> torch.dtype:
    return module.w.dtype if "w" in module._parameters else torch.float32


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


def live_constants(module: Any) -> dict[str, Any]:
    """Constants of a described neuron's record that are trained, as its forward computes them, with gradients."""
    return {"decay": module.w.sigmoid()} if type(module).__name__ == "ParametricLIFNode" else {}


def fire(module: Any, v: Any) -> Any:
    """Spikes of membrane ``v``, with the gradient of the neuron's surrogate."""
    return module.surrogate_function(v - module.v_threshold)


_DESCRIBED: dict[str, Callable[[Any], NeuronSpec]] = {"IFNode": _if, "LIFNode": _lif, "ParametricLIFNode": _plif}


STATE_METHODS = ("reset", "detach")
"""Methods by which a forward changes the memory of a stateful module (``functional.reset_net`` calls ``reset``)."""


def layer_class(name: str) -> type[nn.Module] | None:
    """SpikingJelly's wrapper of the torch layer called ``name`` (``"Conv2d"``, ``"Linear"``...), if it is imported."""
    return getattr(sys.modules.get(f"{_ROOT}.layer"), name, None)
