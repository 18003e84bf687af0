"""Settings that are not per call: where the cache lives, what measuring may cost."""

from __future__ import annotations

import dataclasses
import os
import pathlib


@dataclasses.dataclass(frozen=True)
class MeasureBudget:
    """What first-use measurement may cost. Times in milliseconds, but for ``compile_s`` in seconds.

    A layer whose dense time alone exceeds ``layer_ms`` is still measured, once per point. Where all layers of a model
    are predicted to take more than ``model_ms`` a progress bar is shown, and past it a layer gets a fifth. Once
    compiling GPU kernels for a model has taken ``compile_s``, only the first variant of each further layer is compiled.
    """

    layer_ms: float = 50.0
    model_ms: float = 2000.0
    compile_s: float = 60.0


def cache_dir() -> pathlib.Path:
    """Directory of measured crossovers; ``SPARSEFLOW_CACHE_DIR`` overrides the platform's user cache."""
    override = os.environ.get("SPARSEFLOW_CACHE_DIR")
    if override:
        return pathlib.Path(override)
    import platformdirs

    return pathlib.Path(platformdirs.user_cache_dir("sparseflow", appauthor=False))
