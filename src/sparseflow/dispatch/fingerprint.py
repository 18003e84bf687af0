"""What a measured crossover depends on besides the layer: the machine and the libraries."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import pathlib
import platform

import torch

from sparseflow import kernels
from sparseflow.kernels.cpu import engine
from sparseflow.version import __version__

SCHEMA = 1


def cpu_model() -> str:
    """The processor's marketing name, or its architecture where the system does not say."""
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.lru_cache(maxsize=1)
def fingerprint() -> dict[str, str | int]:
    """Machine, library versions and kernel sources a crossover is valid for.

    The GPU is part of each crossover's key instead: asking for its name would start CUDA where nobody uses it.
    """
    return {
        "schema": SCHEMA,
        "sparseflow": __version__,
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "isa": engine.isa() if engine.available() else "none",
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "triton": _triton_version(),
        "kernels": _source_digest(),
    }


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _source_digest() -> str:
    """A changed kernel has other crossovers, whatever the version says."""
    folder = pathlib.Path(kernels.__file__).parent
    sources = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cpp", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def digest(record: dict[str, str | int]) -> str:
    """Short name of a fingerprint, for file names."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
