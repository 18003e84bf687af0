"""Packed weights on a device: their values are not looked at where that would make a call wait."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
from typing import Any

import torch
from torch import Tensor

from sparseflow.kernels.base import Kernel
from sparseflow.plan import Crossover

from .mailbox import Mailbox
from .packing import WeightState, finite

logger = logging.getLogger("sparseflow")
_SETTLED = 32  # calls with one weight after which waiting for the device once is nothing
_MAX_COPIES = 2

_Form = tuple[type, str, torch.dtype]


@dataclasses.dataclass
class _Copy:
    """One packed copy. ``captured`` ones are read by a CUDA graph: they are kept, and written in place."""

    kernel: Kernel
    variant: str
    values: Any
    state: WeightState | None
    inspected: bool
    captured: bool = False
    stream: torch.cuda.Stream | None = None
    ready: torch.cuda.Event | None = None

    def mark_ready(self) -> None:
        """Remember where in the device's work the copy is complete."""
        device = leaves(self.values)[0].device
        if device.type == "cuda":
            self.stream, self.ready = torch.cuda.current_stream(device), torch.cuda.Event()
            self.ready.record(self.stream)

    def on_current_stream(self) -> Any:
        """The values, for work on the current stream, which may not be the one they were packed on."""
        if self.stream is not None and self.ready is not None:
            current = torch.cuda.current_stream(self.stream.device)
            if current != self.stream:
                current.wait_event(self.ready)
                for leaf in leaves(self.values):
                    leaf.record_stream(current)
        return self.values


class ResidentWeight:
    """The packed copies of one weight, for kernels whose calls must not wait for the device.

    A change is seen by the tensor's identity, address and version counter; a write through ``.data`` moves none of
    them and is seen only after :meth:`refresh`. A weight with an infinity or NaN is not used, as on the CPU. While the
    weight changes every few calls, as in training, whether it is finite arrives some calls later, through ``mailbox``;
    once it has settled, it is looked at, which waits for the device once a change.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._state: WeightState | None = None
        self._calls = 0
        self._expected: float = math.inf
        self._asked = self._read = self._poisoned = False
        self._copies: dict[_Form, _Copy] = {}
        self._orphans: list[_Copy] = []
        self._lock = threading.RLock()

    @property
    def settled(self) -> bool:
        """Whether the weight changes so rarely that waiting for the device at each change is nothing."""
        return max(self._expected, self._calls) >= _SETTLED

    def meet(self, weight: Tensor) -> None:
        """Count a call with ``weight``, and notice whether it changed."""
        state = WeightState.of(weight)
        if not state.same(self._state):
            self._restart(state)
        self._calls += 1

    def get(self, weight: Tensor, kernel: Kernel, crossover: Crossover, gain_ms: float) -> Any:
        """The packed form of the ``weight`` last met; ``None`` where it cannot be used or is not worth packing.

        Packing is worth it where it costs less than ``gain_ms`` a call brings. May launch work on the device, and waits
        for it only where a settled weight changed.
        """
        settled = self.settled
        if self._poisoned and (self._read or (self._asked and not settled)):
            return None
        copy = self._copies.get((type(kernel), crossover.variant, kernel.dtype))
        usable = copy is not None and copy.state is self._state and (copy.inspected or not settled)
        if not usable:
            if crossover.pack_ms > gain_ms * max(self._expected, self._calls):
                return None
            copy = self._pack(weight, kernel, crossover.variant, settled)
        return None if copy is None or self._poisoned else copy.on_current_stream()

    def captured(self, weight: Tensor, kernel: Kernel, variant: str) -> Any:
        """The packed weight for a call that is being captured, ``None`` if there is no current copy; packs nothing."""
        copy = self._copies.get((type(kernel), variant, kernel.dtype))
        if copy is None or self._poisoned or not WeightState.of(weight).same(copy.state):
            return None
        copy.captured = True
        return copy.values

    def refresh(self, weight: Tensor) -> None:
        """Pack ``weight`` anew now into the copies that captured graphs read; the others are packed when next used."""
        with self._lock:
            self._restart(WeightState.of(weight))
            self._expected = math.inf
            for form, copy in list(self._copies.items()):
                copy.state = None
                if not copy.captured:
                    del self._copies[form]
                elif leaves(copy.values)[0].device == weight.device:
                    self._pack(weight, copy.kernel, copy.variant, settled=True)

    def _restart(self, state: WeightState) -> None:
        if self._state is not None:
            self._expected = float(self._calls)
        self._state, self._calls, self._asked, self._read = state, 0, False, False

    def _pack(self, weight: Tensor, kernel: Kernel, variant: str, settled: bool) -> _Copy | None:
        # Tensors made in inference mode could not be written again outside of it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            cast = weight.detach().to(kernel.dtype)
            self._check(cast, settled)
            held = self._copies.get((type(kernel), variant, kernel.dtype))
            if self._poisoned and not (held is not None and held.captured):
                return None  # but a graph has to read what the weight is now, whatever that is
            values = _own(kernel.pack(cast, variant, inspect=settled), weight)
            return self._keep(kernel, variant, values, settled)

    def _keep(self, kernel: Kernel, variant: str, values: Any, settled: bool) -> _Copy:
        form = (type(kernel), variant, kernel.dtype)
        copy = self._copies.pop(form, None)
        if copy is None or not _overwrite(copy.values, values):
            if copy is not None and copy.captured:
                self._orphans.append(copy)
                logger.warning("a CUDA graph captured earlier still reads the old weights of a layer; capture it again")
            copy = _Copy(kernel, variant, values, None, settled)
        copy.state, copy.inspected = self._state, settled
        copy.mark_ready()
        self._copies[form] = copy
        spare = [form for form, copy in self._copies.items() if not copy.captured]
        for form in spare[:-_MAX_COPIES]:
            del self._copies[form]
        return copy

    def _check(self, cast: Tensor, settled: bool) -> None:
        """Find out whether the weight is finite: at once, or by a letter."""
        if settled and not self._read:
            self._poisoned, self._read = not finite(cast), True
        elif not settled and not self._asked:
            self._asked = True
            flag = torch.isfinite(cast).all().to(torch.int64)
            self._mailbox.send(flag.expand(2), self._learn)

    def _learn(self, is_finite: int, _: int) -> None:
        if not self._read:
            self._poisoned = not is_finite


def leaves(values: Any) -> tuple[Tensor, ...]:
    """The tensors of a packed weight."""
    return (values,) if isinstance(values, Tensor) else tuple(leaf for leaf in values if leaf is not None)


def _own(values: Any, weight: Tensor) -> Any:
    """The packed weight in memory of its own: writing it again must not write the user's weight."""
    storage = weight.untyped_storage().data_ptr()

    def own(leaf: Tensor | None) -> Tensor | None:
        aliased = leaf is not None and leaf.untyped_storage().data_ptr() == storage
        return leaf.clone() if leaf is not None and aliased else leaf

    return own(values) if isinstance(values, Tensor) else type(values)(*map(own, values))


def _overwrite(old: Any, new: Any) -> bool:
    """Copy ``new`` into the memory of ``old`` where they have the same form; whether they had."""
    pairs = [(old, new)] if isinstance(old, Tensor) else list(zip(old, new, strict=True))
    if not all(_alike(a, b) for a, b in pairs):
        return False
    for a, b in pairs:
        if a is not None:
            a.copy_(b)
    return True


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
