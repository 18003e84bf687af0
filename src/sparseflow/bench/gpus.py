"""Which GPU to measure on: the one named, else the idle one with the most free memory."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence

import torch

_IDLE_PERCENT = 5
_QUERY = ["nvidia-smi", "--query-gpu=uuid,memory.free,utilization.gpu", "--format=csv,noheader,nounits"]


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One visible GPU: PyTorch's index, free memory in MiB and utilisation in percent."""

    index: int
    free_mib: int
    busy_percent: int


def pick(gpus: Sequence[Gpu], wanted: int | None = None) -> int:
    """Index of the GPU to use.

    Raises:
        ValueError: there is none, or the wanted one is not among them.

    >>> pick([Gpu(0, 90_000, 97), Gpu(1, 40_000, 0), Gpu(2, 70_000, 2)])
    2
    >>> pick([Gpu(0, 90_000, 97), Gpu(1, 40_000, 0)], wanted=0)
    0
    """
    if not gpus:
        raise ValueError("no CUDA device is visible")
    if wanted is not None:
        if wanted not in {gpu.index for gpu in gpus}:
            raise ValueError(f"there is no device {wanted}; visible: {[gpu.index for gpu in gpus]}")
        return wanted
    idle = [gpu for gpu in gpus if gpu.busy_percent <= _IDLE_PERCENT]
    return max(idle or gpus, key=lambda gpu: gpu.free_mib).index


def parse(listing: str, uuids: Sequence[str]) -> list[Gpu]:
    """The GPUs of ``uuids`` (by PyTorch's index) in what ``nvidia-smi`` printed; unknown figures count as 0.

    >>> parse("GPU-a, 100, 3\\nGPU-b, 200, [N/A]", ["b"])
    [Gpu(index=0, free_mib=200, busy_percent=0)]
    """
    rows = {}
    for line in filter(None, map(str.strip, listing.splitlines())):
        uuid, free, busy = (field.strip() for field in line.split(","))
        rows[uuid.removeprefix("GPU-")] = (_number(free), _number(busy))
    known = [rows.get(uuid.removeprefix("GPU-"), (0, 0)) for uuid in uuids]
    return [Gpu(index, *figures) for index, figures in enumerate(known)]


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def visible() -> list[Gpu]:
    """The GPUs PyTorch sees. Without ``nvidia-smi`` they all count as idle and empty."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    uuids = [str(torch.cuda.get_device_properties(index).uuid) for index in range(count)]
    try:
        listing = subprocess.run(_QUERY, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        listing = ""
    return parse(listing, uuids)
