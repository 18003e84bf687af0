"""Measure on a GPU: device times under graph replay, and what a call costs the host that launches it."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseflow.config import MeasureBudget
from sparseflow.kernels.base import Call, Kernel
from sparseflow.plan import Crossover

from .measure import HOPELESS, VARIANT_DENSITY, Bench, Packing, Sample, Sweep, enough, shortest

_REPLAY_MS = 0.2  # longer than the host takes to launch a graph; the resolution of events is about 1 us
_MAX_REPEATS = 64
_WARM_UP = 3
_HOST_CALLS = 20  # few enough that the queue of launches does not fill, which would make the host wait
_HOST_ROUNDS = 5


class Run(NamedTuple):
    """What one call takes: on the device, and on the host to launch it."""

    device_ms: float
    host_ms: float

    @property
    def eager_ms(self) -> float:
        """The slower side of a stream of calls from Python."""
        return max(self.device_ms, self.host_ms)


class Replay:
    """A run captured in a CUDA graph, several times over, to be timed by events around its replay."""

    def __init__(self, run: Callable[[], object]):
        once = captured(run, warm_up=_WARM_UP)
        self._repeats = max(1, min(_MAX_REPEATS, math.ceil(_REPLAY_MS / max(replay_ms(once), 1e-4))))
        self._graph = captured(functools.partial(_repeat, run, self._repeats))

    def sample(self) -> Sample:
        """Milliseconds of one run."""
        return Sample(replay_ms(self._graph) / self._repeats, disturbed=False)


def _repeat(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()


def captured(run: Callable[[], object], warm_up: int = 0, pool: Any = None) -> torch.cuda.CUDAGraph:
    """What ``run`` launches on the current device as a graph, after ``warm_up`` runs. Waits for the device.

    ``pool`` is that of a graph, still there, whose memory it may use: two such graphs must not replay at once.
    """
    stream, graph = _capture_stream(torch.cuda.current_device()), torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    current = torch.cuda.current_stream()
    # Not torch.cuda.graph(): it empties the allocator's cache, which takes longer than what is measured here.
    with _capture_turn, torch.cuda.stream(stream):
        stream.wait_stream(current)
        _repeat(run, warm_up)
        torch.cuda.synchronize()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            run()
            graph.capture_end()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # says only that something went wrong before
                graph.capture_end()
            with contextlib.suppress(RuntimeError):  # before PyTorch 2.12 the allocator still thinks it is captured
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise
    return graph


_capture_turn = threading.RLock()  # what another thread launches on the stream would be part of the graph


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:  # noqa: ARG001
    # One for all captures: libraries keep a workspace for every stream they were used on.
    return torch.cuda.Stream()


def replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    """What a replay takes the device: of two, the second, which the host launches while the first one runs."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def host_ms(run: Callable[[], object]) -> float:
    """Milliseconds that the host spends on one call when nobody waits for the device."""
    best = float("inf")
    for _ in range(_HOST_ROUNDS):
        torch.cuda.synchronize()
        started = time.perf_counter_ns()
        for _ in range(_HOST_CALLS):
            run()
        best = min(best, (time.perf_counter_ns() - started) / 1e6 / _HOST_CALLS)
    torch.cuda.synchronize()
    return best


class GpuBench(Bench):
    """Runs on one static input, so that one capture serves all inputs of a sweep."""

    def __init__(self, kernel: Kernel, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call):
        super().__init__(kernel, x, weight, bias, call)
        self.static = torch.empty_like(x)

    def best_replay(self, budget: MeasureBudget) -> tuple[str, Packing, Replay]:
        """The fastest variant at a typical density, its packed weight and its capture."""
        self.static.copy_(self.spikes(VARIANT_DENSITY, seed=0))
        prepared = self.prepared(self.static, budget)
        replays = {v: Replay(functools.partial(self.sparse, self.static, p.values, v)) for v, p in prepared.items()}
        samples = {variant: replay.sample for variant, replay in replays.items()}
        times = shortest(samples, 0.25 * budget.layer_ms).ms
        best = min(times, key=times.__getitem__)
        return best, prepared[best], replays[best]

    def sweep_replays(
        self, variant: str, dense: Replay, sparse: Replay, budget_ms: float
    ) -> tuple[float, list[tuple[float, float]]]:
        """Shortest dense time, and ``(load, ms)`` points up to the first density at which sparse clearly loses."""
        points: dict[float, tuple[float, float]] = {}
        dense_ms = float("inf")
        for density in self.densities:
            self.static.copy_(self.spikes(density))
            times = shortest({"dense": dense.sample, "sparse": sparse.sample}, budget_ms / len(self.densities)).ms
            dense_ms = min(dense_ms, times["dense"])
            points[density] = self.load(self.static, density, variant), times["sparse"]
            if times["sparse"] > HOPELESS * dense_ms and enough(points):
                break
        return dense_ms, list(points.values())

    def host_times(self, packed: Any, variant: str) -> dict[str, float]:
        """Host time of a dense call, a prescan and a sparse call; no spike changes it."""
        return {
            "dense": host_ms(functools.partial(self.dense, self.static)),
            "prescan": host_ms(functools.partial(self.prescan, self.static, variant)),
            "sparse": host_ms(functools.partial(self.sparse, self.static, packed, variant)),
        }


def measure_on_gpu(
    keys: tuple[str, str],
    kernel: Kernel,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: Call,
    budget: MeasureBudget,
) -> tuple[Crossover, Crossover]:
    """Crossovers of one layer shape for eager calls and inside a CUDA graph, stored under ``keys`` in this order.

    A captured call takes its device time; an eager one takes the longer of its device and its host time. ``x`` gives
    shape, strides, dtype and device.
    """
    with torch.no_grad(), torch.cuda.device(x.device):
        bench = GpuBench(kernel, x, weight, bias, call)
        variant, packing, sparse = bench.best_replay(budget)
        dense = Replay(functools.partial(bench.dense, bench.static))
        prescan_ms = Replay(functools.partial(bench.prescan, bench.static, variant)).sample().ms
        dense_ms, points = bench.sweep_replays(variant, dense, sparse, 0.5 * budget.layer_ms)
        host = bench.host_times(packing.values, variant)
    graph = Sweep(dense_ms, prescan_ms, tuple(points), quiet=True)
    eager = Sweep(
        Run(dense_ms, host["dense"]).eager_ms,
        Run(prescan_ms, host["prescan"]).eager_ms,
        tuple((load, Run(ms, host["sparse"]).eager_ms) for load, ms in points),
        quiet=True,
    )
    eager_key, graph_key = keys
    return (
        eager.crossover(eager_key, kernel, variant, packing.ms),
        graph.crossover(graph_key, kernel, variant, packing.ms),
    )


def time_on(bench: Bench, x: Tensor, packed: Any, variant: str, budget_ms: float) -> tuple[Run, Run]:
    """Dense and sparse times of one layer on the input ``x`` itself."""
    runs = {
        "dense": functools.partial(bench.dense, x),
        "sparse": functools.partial(bench.sparse, x, packed, variant),
    }
    with torch.cuda.device(x.device):
        samples = {name: Replay(run).sample for name, run in runs.items()}
        device = shortest(samples, budget_ms).ms
        host = {name: host_ms(run) for name, run in runs.items()}
    return Run(device["dense"], host["dense"]), Run(device["sparse"], host["sparse"])
