"""The suite ``peers``: what users would pick instead, each at its best, in the same run.

Spiking products and the linear + LIF layer of Open Neuromorphic's table, computed by PyTorch (eager, compiled,
sparse), SpikingJelly, snnTorch, Norse, Sinabs, scipy, brainevent and sparseflow. Every peer runs in a process of its
own, with the Python of an environment of its own (:mod:`.environments`), on as many processors as it may have threads.
The processes live through a case and take turns (:mod:`.contest`). What a call has to do is the same for all: from
dense float32 spikes in the library's own memory to dense results, packing and conversion inside the timer; compiling,
transposing weights and choosing among a library's own ways outside. Where a library has a format of its own for
spikes, it is also timed on that, as ``own format``. docs/peers.md says what cannot be compared.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from sparseflow.bench.records import Absent
from sparseflow.bench.suites import Case, Options, Row

from .catalogue import GONE, PEERS
from .contest import Settings, measure
from .problems import LifLayer, Problem, Product, largest_layer

SUITE = "peers"
_LAYER_DENSITIES = (0.05, 0.2)


def sizes(quick: bool) -> Iterator[Problem]:
    """Everything that is measured; on a GPU as well where there is one."""
    for device in ("cpu", "cuda")[: 1 + (torch.cuda.device_count() > 0)]:
        if quick:
            yield Product(512, 512, 4, (0.05,), device)
            yield LifLayer(256, batch=4, steps=50, device=device)
            continue
        for inputs, rows in ((4096, 1), (4096, 4), (4096, 32), (25088, 1), (25088, 4)):
            yield Product(inputs, 4096, rows, device=device)
        for density in _LAYER_DENSITIES:
            yield LifLayer(largest_layer(), density, device=device)


def rows(problem: Problem, settings: Settings, quick: bool) -> Iterator[Row]:
    """All rows of a case: those who cannot take part, then the others. A quick run has one variant of each peer."""
    kind = "product" if isinstance(problem, Product) else "layer"
    peers = [peer for peer in PEERS if peer.kind == kind and not (quick and peer.variation)]
    if problem.device == "cpu" and not torch.cuda.device_count():
        yield from (Absent(peer.name, "no CUDA device") for peer in peers if "cpu" not in peer.devices)
    yield from (Absent(name, error) for name, its_kind, error in GONE if its_kind == kind)
    yield from measure(problem, [peer for peer in peers if problem.device in peer.devices], settings)


def run(options: Options) -> Iterator[Case]:
    """The suite: a case is a problem at one size. A quick run installs nothing and compiles nothing."""
    quick = options.quick
    settings = Settings(options.repeats, options.threads, options.seed, options.compile and not quick, not quick)
    for problem in sizes(quick):
        yield Case(problem.name, functools.partial(rows, problem, settings, quick))
