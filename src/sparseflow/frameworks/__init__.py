"""What sparseflow knows of SpikingJelly, snnTorch and the users' own neurons.

Neither framework is imported from here: a module of theirs can only exist once the user has imported them.
"""

from sparseflow.frameworks.registry import (
    emitted,
    is_container,
    is_time_leaf,
    is_unknown_neuron,
    neuron_spec,
    register_neuron,
    state_methods,
    state_tensors,
    unregister_neuron,
)
from sparseflow.frameworks.spec import Charge, NeuronSpec, Reset, ResetTiming
from sparseflow.frameworks.state import StateSnapshot, restore_state, snapshot_state

__all__ = [
    "Charge",
    "NeuronSpec",
    "Reset",
    "ResetTiming",
    "StateSnapshot",
    "emitted",
    "is_container",
    "is_time_leaf",
    "is_unknown_neuron",
    "neuron_spec",
    "register_neuron",
    "restore_state",
    "snapshot_state",
    "state_methods",
    "state_tensors",
    "unregister_neuron",
]
