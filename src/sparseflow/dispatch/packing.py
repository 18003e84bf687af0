"""Packed weights of one layer: fresh at every call, and packed only when that pays."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparseflow.kernels.base import Kernel
from sparseflow.plan import Crossover


def _version(weight: Tensor) -> int:
    return -1 if weight.is_inference() else weight._version


class PackedWeight:
    """The packed copy of a weight, rebuilt when the weight changed.

    A change is seen by the tensor's address and version counter, and, since writes through ``.data`` move neither, by
    comparing a sample of positions that differs from call to call. A weight that changes at every call, as in
    training, is packed only where the layer gains more than packing costs.
    """

    def __init__(self) -> None:
        self._token: tuple[object, ...] | None = None
        self._packed: tuple[Tensor, str, torch.dtype] | None = None
        self._calls = 0
        self._expected: float = math.inf
        self._offset = 0

    def invalidate(self) -> None:
        """Forget the packed copy."""
        self._token = self._packed = None

    def get(self, weight: Tensor, kernel: Kernel, variant: str, crossover: Crossover, gain_ms: float) -> Tensor | None:
        """The packed weight, or ``None`` where packing it costs more than ``gain_ms`` a call brings back."""
        token = (weight.data_ptr(), _version(weight))
        if token != self._token:
            self._restart(token)
        self._calls += 1
        if self._packed is not None and self._packed[1:] == (variant, kernel.dtype):
            self._offset += 1
            if kernel.matches(weight, self._packed[0], variant, self._offset):
                return self._packed[0]
            self._restart(token)
        if crossover.pack_ms > gain_ms * max(self._expected, self._calls):
            return None
        packed = kernel.pack(weight, variant)
        self._packed = (packed, variant, kernel.dtype)
        return packed

    def _restart(self, token: tuple[object, ...]) -> None:
        if self._token is not None:
            self._expected = float(self._calls)
        self._token, self._packed, self._calls = token, None, 0
