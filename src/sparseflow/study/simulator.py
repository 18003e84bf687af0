"""A cycle-by-cycle simulation of the accelerator in :mod:`sparseflow.study.hardware`, written without its formulas.

One layer is two state machines that share a mailbox and tick together, once per clock cycle::

    encoder       FETCH -> LOAD -> SCAN <-> CLEAR   ... LOAD for every chunk ...   OFFER -> NEXT -> FETCH
                  map      chunk   first spike, and strike it out                  list of spikes, next channel
                                                                                     |
    neuron units                                               IDLE -> ACCUMULATE <--+    -> FIRE (end of a step)
                                                                       a tap a cycle      an output a cycle

The encoder works on the next channel while the units still add up the last one, and waits in ``OFFER`` until they are
free; it may also run ahead into the next time step while they fire. Both see what the other left at the end of the
cycle before, as registers do. A linear layer's encoder writes down the spikes of all steps before the units start.

The states and their transitions are those of the published register-transfer code; what is not simulated is in
docs/predict.md.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from .hardware import Accelerator
from .records import LayerShape


class Tap(NamedTuple):
    """One cycle of accumulation: a spike at ``position`` of an input channel meets a weight of the kernel.

    The units add it for their output channels, from ``first_output`` on. Kernel tap and position are counted row by
    row. A tap that falls outside the output map takes its cycle too.
    """

    step: int
    first_output: int
    channel: int
    position: int
    tap: int


OnTap = Callable[[Tap], object]


@dataclasses.dataclass(frozen=True)
class Run:
    """Cycles of one image on one layer: of the whole run, and how many of them the parts were busy.

    ``waiting`` are cycles in which the encoder could not hand over to the units; ``overlapped`` those in which both
    worked.
    """

    cycles: int
    encoding: int
    waiting: int
    accumulating: int
    firing: int
    overlapped: int


class State(enum.Enum):
    """States of both machines."""

    FETCH = enum.auto()
    LOAD = enum.auto()
    SCAN = enum.auto()
    CLEAR = enum.auto()
    OFFER = enum.auto()
    NEXT = enum.auto()
    STEP = enum.auto()
    PASS = enum.auto()
    IDLE = enum.auto()
    ACCUMULATE = enum.auto()
    FIRE = enum.auto()
    DONE = enum.auto()


def simulate(shape: LayerShape, spikes: Tensor, accelerator: Accelerator, on_tap: OnTap | None = None) -> Run:
    """Run one image through one layer.

    Args:
        shape: the layer.
        spikes: {0, 1}, ``[T, C_in, H, W]``, or ``[T, C_in]`` for a linear layer.
        accelerator: encoder width and neuron units.
        on_tap: called for every cycle of accumulation of a convolution, so that what is added up can be checked.

    Raises:
        ValueError: ``spikes`` does not fit the layer, or is not binary.

    >>> import torch
    >>> shape = LayerShape("conv", 1, 4, (3, 3), padding=(1, 1), in_size=(2, 2), out_size=(2, 2))
    >>> simulate(shape, torch.ones(1, 1, 2, 2), Accelerator(encoder_width=4, neuron_units=4)).accumulating
    36
    """
    maps = _maps(shape, spikes)
    width = accelerator.encoder_width or math.ceil(len(maps[0][0]) / 4)
    if shape.linear:
        return _run_linear(maps, width, shape.out_channels // accelerator.units(shape))
    work = _work(shape, len(maps), accelerator.units(shape))
    return _run_convolution(_Encoder(maps, work, width), _Units(shape, on_tap))


def _maps(shape: LayerShape, spikes: Tensor) -> list[list[list[bool]]]:
    """Bits by step, channel and position; the inputs of a linear layer are one channel."""
    expected = (shape.in_channels,) if shape.linear else (shape.in_channels, *shape.in_size)
    if tuple(spikes.shape[1:]) != expected or not len(spikes):
        raise ValueError(f"{shape.name}: spikes are [T, {', '.join(map(str, expected))}], got {list(spikes.shape)}")
    if ((spikes != 0) & (spikes != 1)).any():
        raise ValueError(f"{shape.name}: spikes are 0 or 1")
    channels = 1 if shape.linear else shape.in_channels
    return (spikes != 0).reshape(len(spikes), channels, -1).tolist()


class _Job(NamedTuple):
    """One input channel in one time step of one pass over the output channels."""

    step: int
    first_output: int
    channel: int
    ends_step: bool
    ends_pass: bool


def _work(shape: LayerShape, steps: int, units: int) -> Iterator[_Job]:
    """In the order of the design: output channels outermost, then time steps, then input channels."""
    outputs, inputs = shape.out_channels // shape.groups, shape.in_channels // shape.groups
    for group in range(shape.groups):
        for first in range(group * outputs, (group + 1) * outputs, units):
            for step, channel in itertools.product(range(steps), range(group * inputs, (group + 1) * inputs)):
                ends_step = channel == (group + 1) * inputs - 1
                yield _Job(step, first, channel, ends_step, ends_step and step == steps - 1)


class _Mailbox:
    """What encoder and units tell each other: a list of spikes on offer, and a step that may fire."""

    def __init__(self) -> None:
        self.offer: _Offer | None = None
        self.fire = False


class _Offer(NamedTuple):
    job: _Job
    spikes: list[int]


class _Scanner:
    """A priority encoder over one map: finds the first spike of a chunk, strikes it out, and so on."""

    def __init__(self, width: int):
        self.width = width

    def fetch(self, bits: list[bool]) -> State:
        self.bits, self.at, self.found = bits, 0, list[int]()
        return State.LOAD

    def load(self) -> State:
        self.chunk = self.bits[self.at : self.at + self.width]
        return State.SCAN

    def scan(self) -> State | None:
        """The next state, ``None`` after the last chunk."""
        if True in self.chunk:
            self.first = self.chunk.index(True)
            self.found.append(self.at + self.first)
            return State.CLEAR
        self.at += self.width
        return State.LOAD if self.at < len(self.bits) else None

    def clear(self) -> State:
        self.chunk[self.first] = False
        return State.SCAN


class _Encoder:
    """The encoder of a convolution."""

    def __init__(self, maps: list[list[list[bool]]], jobs: Iterator[_Job], width: int):
        self.maps, self.jobs, self.scanner = maps, jobs, _Scanner(width)
        self.state, self.job = State.FETCH, next(jobs)

    def tick(self, mailbox: _Mailbox, ready: bool, fire_pending: bool) -> State:
        """One cycle in the state that is returned, given what the units had left when it began."""
        now = self.state
        if now is State.FETCH:
            self.state = self.scanner.fetch(self.maps[self.job.step][self.job.channel])
        elif now is State.LOAD:
            self.state = self.scanner.load()
        elif now is State.SCAN:
            self.state = self.scanner.scan() or self._offer(mailbox)
        elif now is State.CLEAR:
            self.state = self.scanner.clear()
        elif now is State.OFFER and ready:
            self.state, mailbox.offer = State.NEXT, None
        elif now is State.NEXT:
            self.state = State.STEP if self.job.ends_step else self._advance()
        elif now is State.STEP and not fire_pending:
            self.state, mailbox.fire = State.PASS if self.job.ends_pass else self._advance(), True
        elif now is State.PASS:
            self.state = self._advance()
        return now

    def _offer(self, mailbox: _Mailbox) -> State:
        if not self.scanner.found:
            return State.NEXT
        mailbox.offer = _Offer(self.job, self.scanner.found)
        return State.OFFER

    def _advance(self) -> State:
        job = next(self.jobs, None)
        self.job = job or self.job
        return State.FETCH if job else State.DONE


class _Units:
    """The neuron units of a convolution, which all do the same for their output channels."""

    def __init__(self, shape: LayerShape, on_tap: OnTap | None):
        self.taps, self.outputs = math.prod(shape.kernel), math.prod(shape.out_size)
        self.on_tap = on_tap
        self.state = State.IDLE
        self.left: collections.deque[Tap] = collections.deque()
        self.to_fire = 0

    def tick(self, mailbox: _Mailbox, offer: _Offer | None, fire: bool) -> State:
        """One cycle in the state that is returned, given what was in the mailbox when it began."""
        now = self.state
        if now is State.ACCUMULATE:
            tap = self.left.popleft()
            if self.on_tap is not None:
                self.on_tap(tap)
        elif now is State.FIRE:
            self.to_fire -= 1
        if not self.left and not self.to_fire:
            self.state = self._next_job(mailbox, now, offer, fire)
        return now

    def _next_job(self, mailbox: _Mailbox, now: State, offer: _Offer | None, fire: bool) -> State:
        if fire and now is not State.FIRE:
            mailbox.fire, self.to_fire = False, self.outputs
            return State.FIRE
        if offer is not None and now is State.IDLE:
            job, spikes = offer
            pairs = itertools.product(spikes, range(self.taps))
            self.left.extend(Tap(job.step, job.first_output, job.channel, at, tap) for at, tap in pairs)
            return State.ACCUMULATE
        return State.IDLE


def _nothing_spent() -> collections.Counter[str]:
    return collections.Counter({field.name: 0 for field in dataclasses.fields(Run)})


def _run_convolution(encoder: _Encoder, units: _Units) -> Run:
    mailbox, spent = _Mailbox(), _nothing_spent()
    while encoder.state is not State.DONE or units.state is not State.IDLE or mailbox.fire:
        offer, fire = mailbox.offer, mailbox.fire
        ready = units.state is State.IDLE and not fire
        encoder_did, units_did = encoder.tick(mailbox, ready, fire), units.tick(mailbox, offer, fire)
        waits = (encoder_did is State.OFFER and not ready) or (encoder_did is State.STEP and fire)
        works = not waits and encoder_did is not State.DONE
        spent.update(cycles=1, waiting=waits, encoding=works, overlapped=works and units_did is not State.IDLE)
        spent.update(accumulating=units_did is State.ACCUMULATE, firing=units_did is State.FIRE)
    return Run(**spent)


def _run_linear(maps: list[list[list[bool]]], width: int, last_pass: int) -> Run:
    """All encoding first, then ``last_pass + 1`` passes over the spikes of every step."""
    spent, lists = _nothing_spent(), []
    for (bits,) in maps:
        scanner = _Scanner(width)
        spent["encoding"] += sum(1 for _ in _encode_step(scanner, bits))
        lists.append(scanner.found)
    for state in _passes(lists, last_pass):
        spent["accumulating"] += state is State.ACCUMULATE
        spent["firing"] += state in (State.FIRE, State.STEP)
        spent["cycles"] += 1
    spent["cycles"] += spent["encoding"]
    return Run(**spent)


def _encode_step(scanner: _Scanner, bits: list[bool]) -> Iterator[State]:
    """States of the encoder for one step: two cycles read the map, one goes on to the next step."""
    yield State.FETCH
    yield State.FETCH
    moves = {State.LOAD: scanner.load, State.SCAN: scanner.scan, State.CLEAR: scanner.clear}
    state: State | None = scanner.fetch(bits)
    while state is not None:
        yield state
        state = moves[state]()
    yield State.STEP


def _passes(lists: list[list[int]], last_pass: int) -> Iterator[State]:
    """States of a linear layer's units: a spike a cycle (one cycle without any), then fire, then the next step."""
    neuron = 0
    while True:
        for spikes in lists:
            for _ in spikes or (None,):
                yield State.ACCUMULATE
            yield State.FIRE
            yield State.STEP
        yield State.PASS
        if neuron == last_pass:
            return
        neuron += 1
