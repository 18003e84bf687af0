"""Notices writes into memory that move no version counter, for the price of one native call."""

from __future__ import annotations

from collections.abc import Sequence

import torch  # noqa: F401  (for the example)
from torch import Tensor

from . import engine
from .records import WatchedStruct


class MemoryWatch:
    """A piece of every tensor on the CPU, compared at every call, and samples of all of one tensor, another each call.

    A write through ``.data`` changes neither a tensor's version nor its address. One of all values is seen at once,
    one of a few values sooner or later.

    >>> weight = torch.zeros(100)
    >>> watch = MemoryWatch([weight])
    >>> watch.holds()
    True
    >>> _ = weight.data.fill_(1.0)
    >>> watch.holds()
    False
    """

    def __init__(self, tensors: Sequence[Tensor]):
        here = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.numel()]
        self._kept = here  # their memory is read
        self._watched = (WatchedStruct * len(here))(*map(_struct, here))
        self._turn = 0
        engine.library().sf_watch(self._watched, len(here))

    def holds(self) -> bool:
        """Whether nothing seems to have been written to."""
        n = len(self._kept)
        if not n:
            return True
        self._turn = (self._turn + 1) % n
        return engine.library().sf_watched_hold(self._watched, n, self._turn) != 0


def _struct(tensor: Tensor) -> WatchedStruct:
    # Of a tensor with gaps or another order of its values only the first one is known to be its own.
    values, size = tensor.numel() if tensor.is_contiguous() else 1, tensor.itemsize
    at = values // 2 * size
    return WatchedStruct(tensor.data_ptr(), values * size, at, min(WatchedStruct.PIECE, values * size - at))
