"""What sparseflow knows of SpikingJelly, snnTorch and the users' own neurons.

Neither framework is imported from here: a module of theirs can only exist once the user has imported them.
"""

from sparseflow.frameworks.registry import (
    emitted,
    fingerprint,
    fire,
    is_container,
    is_time_leaf,
    is_unknown_neuron,
    live_spec,
    neuron_spec,
    register_neuron,
    state_methods,
    state_tensors,
    steps_over_time,
    stores_sequence,
    unregister_neuron,
)
from sparseflow.frameworks.state import (
    StateSnapshot,
    read_state,
    restore_state,
    snapshot_state,
    state_table,
    write_state,
)
from sparseflow.neuron import Charge, NeuronSpec, Reset, ResetTiming

__all__ = [
    "Charge",
    "NeuronSpec",
    "Reset",
    "ResetTiming",
    "StateSnapshot",
    "emitted",
    "fingerprint",
    "fire",
    "is_container",
    "is_time_leaf",
    "is_unknown_neuron",
    "live_spec",
    "neuron_spec",
    "read_state",
    "register_neuron",
    "restore_state",
    "snapshot_state",
    "state_methods",
    "state_table",
    "state_tensors",
    "steps_over_time",
    "stores_sequence",
    "unregister_neuron",
    "write_state",
]
