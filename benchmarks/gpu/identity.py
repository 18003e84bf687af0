"""What figures are valid for: commit, kernels, device and versions."""

from __future__ import annotations

from typing import Any

import torch

from sparseflow.dispatch.fingerprint import fingerprint
from sparseflow.env import environment


def identity(device: int, commit: str = "") -> dict[str, Any]:
    """The record that every line carries; ``commit`` where the checkout does not know it."""
    record = environment()
    properties = torch.cuda.get_device_properties(device)
    return {
        "commit": commit or record.get("commit", "unknown"),
        "kernels": fingerprint()["kernels"],
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **{name: record[name] for name in ("sparseflow", "python", "torch", "triton", "spikingjelly")},
    }
