"""Temporal aggregation: layers that see one weighted sum of K frames. Lossy, opt-in, never part of ``accelerate``."""

from __future__ import annotations

from .chunks import chunk_lengths, decayed_sum
from .convert import AggregatedModel, aggregate
from .modules import TAC, TACTP, Aggregated
from .neurons import Leak, UnknownNeuronError
from .report import Aggregation, LayerAggregation, Mode
from .signal import time_share

__all__ = [
    "TAC",
    "TACTP",
    "Aggregated",
    "AggregatedModel",
    "Aggregation",
    "LayerAggregation",
    "Leak",
    "Mode",
    "UnknownNeuronError",
    "aggregate",
    "chunk_lengths",
    "decayed_sum",
    "time_share",
]
