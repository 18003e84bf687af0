"""Where the time of one forward call of an accelerated network goes.

Level 1 (sparse layers): ``prescan`` is the time in the kernels' prescans, which read dense values, count them and pack
them in one pass; ``compute`` the rest of the time in convolution and linear layers, dense ones included; ``neuron`` the
neurons. Modules are timed by :func:`sparseflow.profile`, whose hooks cost about a microsecond each.

Level 2 (fused blocks): ``neuron`` is the time in neurons that a dense layer feeds, which also pack their spikes;
``compute`` that of all blocks beside it. In a block on packed spikes the neuron, its packing and the next layer's
prescan are inside the kernel, and so in ``compute``.

``rest`` is the whole call less these: batch norm, pooling, additions, copies, Python.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn

import sparseflow
from sparseflow.bench.records import Phase
from sparseflow.dispatch.sites import HostSite
from sparseflow.modules.fused.block import BlockRun
from sparseflow.modules.fused.chain import Chain
from sparseflow.modules.fused.model import fusion_of
from sparseflow.modules.fused.program import Program
from sparseflow.modules.swap import runtimes

from .baselines import Call, Workload

_LAYERS = ("conv", "linear")


class Clock:
    """Milliseconds by phase, from calls that were wrapped; a call inside one of the same phase is part of it."""

    def __init__(self) -> None:
        self.ms: defaultdict[str, float] = defaultdict(float)
        self._running: set[str] = set()

    def wrap(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its time added to ``phase``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if phase in self._running:
                return function(*args, **kwargs)
            self._running.add(phase)
            start = time.perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                self.ms[phase] += (time.perf_counter_ns() - start) / 1e6
                self._running.remove(phase)

        return timed


class _Proxy:
    """An object some of whose methods are others."""

    def __init__(self, original: Any, **methods: Callable[..., Any]):
        self.__dict__.update(methods, _original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def phases_of(workload: Workload, kernel: str, net: nn.Module, repeats: int) -> Iterator[Phase]:
    """Mean ms of a call by phase."""
    call = Call(net, workload)
    with torch.no_grad():
        call()
        program = _program(net)
        totals = _of_layers(net, call, repeats) if program is None else _of_blocks(program, call, repeats)
    for phase, ms in totals.items():
        yield Phase(workload.name, kernel, phase, ms / repeats)


def _program(net: nn.Module) -> Program | None:
    """The fused plan that answered the last call, if one did."""
    fusion = fusion_of(net)
    return None if fusion is None or fusion.why is not None or fusion.last is None else fusion.last.program


def _of_layers(net: nn.Module, call: Call, repeats: int) -> dict[str, float]:
    clock = Clock()
    with _timed_prescans(net, clock), sparseflow.profile(net) as profile:
        for _ in range(repeats):
            call()
    found = profile.result()
    kinds = found.by_kind
    layers = sum(kinds.get(kind, 0.0) for kind in _LAYERS)
    neurons = kinds.get("neuron", 0.0)
    prescan = clock.ms["prescan"]
    rest = max(0.0, found.total_ms - layers - neurons)
    return {"prescan": prescan, "compute": layers - prescan, "neuron": neurons, "rest": rest}


@contextlib.contextmanager
def _timed_prescans(net: nn.Module, clock: Clock) -> Iterator[None]:
    sites = [runtime.last_site for runtime in runtimes(net).values()]
    with contextlib.ExitStack() as stack:
        for site in (site for site in sites if isinstance(site, HostSite)):
            proxy = _Proxy(site.kernel, prescan=clock.wrap("prescan", site.kernel.prescan))
            stack.enter_context(mock.patch.object(site, "kernel", proxy))
        yield


def _of_blocks(program: Program, call: Call, repeats: int) -> dict[str, float]:
    clock = Clock()
    with contextlib.ExitStack() as stack:
        for kind in (BlockRun, Chain):  # a chain runs blocks without calling them
            stack.enter_context(mock.patch.object(kind, "__call__", clock.wrap("blocks", kind.__call__)))
        for block in program.blocks:
            proxy = _Proxy(block.ops, neuron=clock.wrap("neuron", block.ops.neuron))
            stack.enter_context(mock.patch.object(block, "ops", proxy))
        whole = clock.wrap("whole", call)
        for _ in range(repeats):
            whole()
    blocks, neurons = clock.ms["blocks"], clock.ms["neuron"]
    return {"compute": blocks - neurons, "neuron": neurons, "rest": clock.ms["whole"] - blocks}
