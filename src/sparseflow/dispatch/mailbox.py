"""Counts on their way from the device to the host. Nobody waits for them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_SLOTS = 8
_VALUES = 2

Receiver = Callable[[int, int], None]


class _Letter(NamedTuple):
    slot: int
    address: int
    arrival: torch.cuda.Event | None  # None: the copy was done at once, as on the CPU
    receiver: Receiver


class Mailbox:
    """Carries pairs of integers from a device to whoever wants to know them at some later call.

    A letter takes a small asynchronous copy into page-locked memory and an event, and no waiting on either side. While
    all slots are on their way, further letters are dropped: there will be newer ones.

    >>> seen = []
    >>> box = Mailbox()
    >>> box.send(torch.tensor([3, 4]), lambda *pair: seen.append(pair))
    >>> box.poll()
    >>> seen
    [(3, 4)]
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = list(range(_SLOTS))
        self._letters: list[_Letter] = []
        self._buffers: dict[bool, Tensor] = {}

    def send(self, pair: Tensor, receiver: Receiver) -> None:
        """Have ``receiver`` called with the values of ``pair`` (int64 ``[2]``) by a :meth:`poll` after they arrived."""
        with self._lock:
            if not self._free:
                return
            slot = self._free.pop()
            place = self._slots(page_locked=pair.is_cuda)[slot]
            place.copy_(pair, non_blocking=True)
            self._letters.append(_Letter(slot, place.data_ptr(), _event(pair), receiver))

    def poll(self) -> None:
        """Deliver what has arrived."""
        if not self._letters:
            return
        with self._lock:
            arrived = [letter for letter in self._letters if letter.arrival is None or letter.arrival.query()]
            delivered = [(letter.receiver, *_read(letter.address)) for letter in arrived]
            self._letters = [letter for letter in self._letters if letter not in arrived]
            self._free += [letter.slot for letter in arrived]
        for receiver, first, second in delivered:
            receiver(first, second)

    def _slots(self, *, page_locked: bool) -> Tensor:
        if page_locked not in self._buffers:
            self._buffers[page_locked] = torch.empty((_SLOTS, _VALUES), dtype=torch.int64, pin_memory=page_locked)
        return self._buffers[page_locked]


def _read(address: int) -> tuple[int, int]:
    # Through its address: no operation of PyTorch is run, which others might count or trace.
    first, second = (ctypes.c_int64 * _VALUES).from_address(address)
    return first, second


def _event(pair: Tensor) -> torch.cuda.Event | None:
    if not pair.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(pair.device))
    return event


def capturing(x: Tensor) -> bool:
    """Whether the call with input ``x`` is being recorded into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
