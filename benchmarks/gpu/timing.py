"""Times of contenders in turn: CUDA graphs replayed and timed by events, or the wall clock where there is no GPU."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from sparseflow.bench.compare import quantiles

from .records import Quantiles

Run = Callable[[int], object]
_REPLAY_MS = 0.3
_MOST_CALLS = 512
_HOPELESS = 4.0
_FEW = 4


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Measures ms a call, once each time it is called. ``estimate_ms`` is a first impression."""

    sample: Callable[[], float]
    estimate_ms: float


class Timer(Protocol):
    """Prepares runs for measurement. A run takes the number of the input it is to use."""

    def prepare(self, run: Run, inputs: int, *, graphed: bool = True) -> Sampler:
        """Warm ``run`` up on each of its ``inputs`` and make it ready; ``graphed=False`` times eager calls."""
        ...


class CudaTimer:
    """Graph replays, timed by events. A replay goes through all inputs, as often as fills about 0.3 ms."""

    def prepare(self, run: Run, inputs: int, *, graphed: bool = True) -> Sampler:
        cycle = functools.partial(_cycle, run, inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            cycle()
            eager_ms = _event_ms(cycle) / inputs
        torch.cuda.current_stream().wait_stream(stream)
        if not graphed:
            return Sampler(lambda: _event_ms(cycle) / inputs, eager_ms)
        # An eager call of a small layer mostly waits for the host; a graph of one cycle shows what it costs by itself.
        once_ms = _event_ms(_captured(cycle).replay) / inputs
        cycles = max(1, min(math.ceil(_REPLAY_MS / (once_ms * inputs)), _MOST_CALLS // inputs))
        graph = _captured(lambda: [cycle() for _ in range(cycles)])
        calls = cycles * inputs
        return Sampler(lambda: _event_ms(graph.replay) / calls, once_ms)


class WallTimer:
    """The wall clock, for runs on the CPU."""

    def prepare(self, run: Run, inputs: int, *, graphed: bool = True) -> Sampler:  # noqa: ARG002
        cycle = functools.partial(_cycle, run, inputs)
        cycle()

        def sample() -> float:
            start = time.perf_counter_ns()
            cycle()
            return (time.perf_counter_ns() - start) / 1e6 / inputs

        return Sampler(sample, sample())


def _cycle(run: Run, inputs: int) -> None:
    for index in range(inputs):
        run(index)


def _event_ms(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def alternate(samplers: Mapping[str, Sampler], repeats: int) -> dict[str, Quantiles]:
    """20, 50 and 80 % quantiles of each, in ms: A B A B in an order that changes every round.

    A contender that is clearly behind the fastest is sampled a few times only: its ratio needs no third digit.
    """
    fastest = min(sampler.estimate_ms for sampler in samplers.values())
    times: dict[str, list[float]] = {name: [] for name in samplers}
    order, shuffle = list(samplers), random.Random(0).shuffle
    for number in range(repeats):
        shuffle(order)
        for name in order:
            if number < _FEW or samplers[name].estimate_ms <= _HOPELESS * fastest:
                times[name].append(samplers[name].sample())
    return {name: quantiles(values) for name, values in times.items()}
