"""Which implementation of the fused blocks' operations serves a device."""

from __future__ import annotations

import torch

from sparseflow.kernels.select import why_not_triton

from .buffers import BufferPool
from .records import BlockOps


def block_ops(device: torch.device, backend: str, pool: BufferPool) -> tuple[BlockOps | None, str]:
    """The operations for ``device`` under ``backend=``; ``None`` and why where there are none."""
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        return _triton(device)
    if device.type != "cpu":
        return None, f"fused blocks run on CPU and CUDA tensors, and these are on {device}"
    if backend == "torch":
        return None, "backend='torch' has no fused blocks"
    from sparseflow.kernels.cpu import engine

    if not engine.available():
        return None, engine.reason()
    from sparseflow.kernels.cpu.blocks import NativeBlockOps

    return NativeBlockOps(pool), ""


def _triton(device: torch.device) -> tuple[BlockOps | None, str]:
    unavailable = why_not_triton(device)
    if unavailable:
        return None, unavailable
    from sparseflow.kernels.triton.blocks.ops import TritonBlockOps

    return TritonBlockOps(), ""
