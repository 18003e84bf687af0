"""sparseflow: spiking neural networks in PyTorch, computed only where there are spikes.

>>> import sparseflow
>>> sparseflow.__version__
'0.1.0'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from .study.predict import predict

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
    "predict",
    "profile",
    "prune_blocks",
    "refresh",
    "register_neuron",
    "report",
    "restore",
    "run",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Load on first use what most programs never ask for."""
    if name == "predict":
        from .study.predict import predict

        return predict
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
