"""The environment record: what a figure has to be read with."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .dispatch.fingerprint import cpu_model
from .kernels.cpu import engine
from .version import __version__

_PACKAGES = ("spikingjelly", "snntorch", "triton", "numpy")


def environment() -> dict[str, Any]:
    """Machine, processor, native engine, threads and versions; ``commit`` is present in a source checkout only.

    >>> record = environment()
    >>> record["torch"] == torch.__version__, record["threads"] == torch.get_num_threads()
    (True, True)
    """
    commit = _commit()
    return {
        "sparseflow": __version__,
        **({"commit": commit} if commit else {}),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "engine": engine.isa() if engine.available() else f"none: {engine.reason()}",
        "gpu": _gpu(),
        "torch": torch.__version__,
        **{name: _version(name) for name in _PACKAGES},
    }


def _gpu() -> str:
    """Name and compute capability of the current GPU, and the CUDA (or ROCm) version that PyTorch was built with."""
    if not torch.cuda.is_available():
        return "none"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    toolkit = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return f"{properties.name} (capability {properties.major}.{properties.minor}), {toolkit}"


def _usable_cores() -> int:
    # A container or taskset may allow fewer processors than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@functools.lru_cache(maxsize=1)
def _commit() -> str | None:
    """Short hash of the checkout this package is imported from, ``+`` where it has changes; ``None`` elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    describe = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        found = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
