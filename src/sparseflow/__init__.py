"""sparseflow: spiking neural networks in PyTorch, computed only where there are spikes.

>>> import sparseflow
>>> sparseflow.__version__
'0.1.0'
"""

from __future__ import annotations

from .api import accelerate, analyze, calibrate, disabled, refresh, report, restore
from .dispatch.cache import Calibration
from .errors import (
    BackendUnavailableError,
    CalibrationError,
    MismatchError,
    NothingAcceleratedWarning,
    SparseflowError,
    UnsupportedModelError,
)
from .frameworks import register_neuron
from .neuron import NeuronSpec
from .observe import profile, verify
from .plan import BlockPlan, LayerPlan, Path, Plan, Provenance, Reason
from .pruning import PruningRecord, keep_zero_blocks, prune_blocks
from .stepping import run
from .temporal import AggregatedModel, aggregate
from .version import __version__

__all__ = [
    "AggregatedModel",
    "BackendUnavailableError",
    "BlockPlan",
    "Calibration",
    "CalibrationError",
    "LayerPlan",
    "MismatchError",
    "NeuronSpec",
    "NothingAcceleratedWarning",
    "Path",
    "Plan",
    "Provenance",
    "PruningRecord",
    "Reason",
    "SparseflowError",
    "UnsupportedModelError",
    "__version__",
    "accelerate",
    "aggregate",
    "analyze",
    "calibrate",
    "disabled",
    "keep_zero_blocks",
    "profile",
    "prune_blocks",
    "refresh",
    "register_neuron",
    "report",
    "restore",
    "run",
    "verify",
]
