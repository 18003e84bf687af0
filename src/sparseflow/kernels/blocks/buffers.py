"""Buffers of a fused plan that are used again at every call, so that a call allocates nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from .spikes import PackedSpikes


class BufferPool:
    """Free tensors by shape and dtype.

    Who takes a tensor owns it; giving it back says that nobody reads it any more. What is never given back is freed
    like any other tensor.

    >>> pool = BufferPool()
    >>> first = pool.take((2, 3), torch.float32)
    >>> pool.give(first)
    >>> pool.take((2, 3), torch.float32) is first
    True
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device
        self._free: dict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor."""
        free = self._free.get((shape, dtype))
        return free.pop() if free else torch.empty(shape, dtype=dtype, device=self.device)

    def give(self, tensor: Tensor) -> None:
        """Take back a tensor that :meth:`take` gave."""
        self._free.setdefault((tuple(tensor.shape), tensor.dtype), []).append(tensor)

    def give_spikes(self, spikes: PackedSpikes) -> None:
        """Take back everything that packed spikes consist of, unless it belongs to somebody for good."""
        if spikes.kept:
            return
        for part in (spikes.bits, spikes.counts, spikes.row_counts, spikes.nonzero):
            if part is not None:
                self.give(part)
