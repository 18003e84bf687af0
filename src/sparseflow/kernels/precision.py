"""Whether the user lets PyTorch's own float32 layers round to TF32 on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def tf32_convolution() -> bool:
    """Whether float32 convolutions may round to TF32; by default they may."""
    return _allowed(torch.backends.cudnn, lambda: torch.backends.cudnn.conv)  # type: ignore[attr-defined]


def tf32_matmul() -> bool:
    """Whether float32 matrix products may round to TF32; by default they may not."""
    return _allowed(torch.backends.cuda.matmul, lambda: torch.backends.cuda.matmul)


def _allowed(old: Any, new: Callable[[], Any]) -> bool:
    """PyTorch 2.9 has the switch twice, and refuses to read the old one where the new one was set otherwise."""
    try:
        return bool(old.allow_tf32)
    except RuntimeError:
        return new().fp32_precision == "tf32"
