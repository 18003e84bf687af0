"""From training choices to hardware cost: train a grid of networks, count spikes, measure and predict their cost.

>>> from sparseflow.study import Grid
>>> len(Grid(datasets=("digits",), seeds=3).choices())
135
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .grid import Grid
    from .records import Choice, Layer, LayerShape, Matched, Net, Neuron, Status, Study, Surrogate
    from .runner import Measuring, run_study
    from .storage import load, save
    from .training import Training

# Imported when they are used: a study needs optuna and scikit-learn, which sparseflow does not.
_MODULES = {
    "grid": ("Grid",),
    "records": ("Choice", "Layer", "LayerShape", "Matched", "Net", "Neuron", "Status", "Study", "Surrogate"),
    "runner": ("Measuring", "run_study"),
    "storage": ("load", "save"),
    "training": ("Training",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Choice",
    "Grid",
    "Layer",
    "LayerShape",
    "Matched",
    "Measuring",
    "Net",
    "Neuron",
    "Status",
    "Study",
    "Surrogate",
    "Training",
    "load",
    "run_study",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
