"""Packed weights of one layer: fresh at every call, and packed only when that pays."""

from __future__ import annotations

import math
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from sparseflow.kernels.base import HostKernel
from sparseflow.plan import Crossover

_WITNESSES = 64


class WeightState(NamedTuple):
    """What tells one state of a weight from the next; the tensor itself, since an address may be used again."""

    source: weakref.ref[Tensor]
    address: int
    version: int

    @classmethod
    def of(cls, weight: Tensor) -> WeightState:
        """The state ``weight`` is in. One made in inference mode counts no versions."""
        return cls(weakref.ref(weight), weight.data_ptr(), -1 if weight.is_inference() else weight._version)

    def same(self, other: WeightState | None) -> bool:
        """Equality; references are compared as objects, because equal ones would compare the elements of tensors."""
        return other is not None and self.source is other.source and self[1:] == other[1:]


class _Token(NamedTuple):
    """What a packed copy was made from, and for whom."""

    state: WeightState
    variant: str
    dtype: torch.dtype

    def same(self, other: _Token | None) -> bool:
        """Equality of all parts."""
        return other is not None and self.state.same(other.state) and self[1:] == other[1:]


class _Packed(NamedTuple):
    """A packed copy; ``values`` is ``None`` where the weight has none that sparse may use."""

    token: _Token
    values: Tensor | None
    witness: Tensor

    def fresh(self, weight: Tensor, kernel: HostKernel, offset: int) -> bool:
        """Whether a sample of ``weight`` is still what was packed."""
        if self.values is not None and weight.dtype == kernel.dtype:
            return kernel.matches(weight, self.values, self.token.variant, offset)
        return torch.equal(_witness(weight), self.witness)


class PackedWeight:
    """The packed copy of a weight, rebuilt when the weight changed.

    A change is seen by the tensor's identity, address and version counter, and, since writes through ``.data`` move
    none of them, by comparing a sample of its elements, at positions that differ from call to call (under autocast:
    always the same ones). A weight that changes at every call, as in training, is packed only where the layer gains
    more than packing costs; so is one that is wanted in two forms in turn.

    A weight with an infinity or NaN is never packed: dense multiplies it by the zeros too, and that is not zero.
    """

    def __init__(self) -> None:
        self._token: _Token | None = None
        self._packed: _Packed | None = None
        self._calls = 0
        self._expected: float = math.inf
        self._offset = 0

    def invalidate(self) -> None:
        """Forget the packed copy."""
        self._token = self._packed = None

    def get(
        self, weight: Tensor, kernel: HostKernel, variant: str, crossover: Crossover, gain_ms: float
    ) -> Tensor | None:
        """The packed weight; ``None`` where it cannot be used or packing costs more than ``gain_ms`` a call brings."""
        token = _Token(WeightState.of(weight), variant, kernel.dtype)
        if not token.same(self._token):
            self._restart(token)
        self._calls += 1
        held = self._packed  # read once: other threads may replace it
        if held is not None and token.same(held.token):
            self._offset += 1
            if held.fresh(weight, kernel, self._offset):
                return held.values
            self._restart(token)
        if crossover.pack_ms > gain_ms * max(self._expected, self._calls):
            return None
        cast = weight.detach().to(kernel.dtype)
        values = kernel.pack(cast, variant) if finite(cast) else None
        self._packed = _Packed(token, values, _witness(weight).clone())
        return values

    def _restart(self, token: _Token) -> None:
        if self._token is not None:
            self._expected = float(self._calls)
        self._token, self._packed, self._calls = token, None, 0


def finite(weight: Tensor) -> bool:
    """Whether ``weight`` holds neither infinity nor NaN; waits for its device."""
    return not weight.numel() or all(map(math.isfinite, torch.stack(torch.aminmax(weight)).tolist()))


def _witness(weight: Tensor) -> Tensor:
    """A view of elements spread evenly over the memory of ``weight``, whatever its strides."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    count = max(0, min(_WITNESSES, span)) if weight.numel() else 0
    return weight.detach().as_strided((count,), (span // max(count, 1),), weight.storage_offset())
