"""Finding the layers that are fed by spikes."""

from sparseflow.graph.eligibility import candidates, layer_kind, refuse
from sparseflow.graph.spike_map import LayerSite, SpikeMap, spike_map
from sparseflow.graph.tracer import TraceError, trace

__all__ = [
    "LayerSite",
    "SpikeMap",
    "TraceError",
    "candidates",
    "layer_kind",
    "refuse",
    "spike_map",
    "trace",
]
