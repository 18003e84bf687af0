"""What has to be waited for before the first answer: import, ``accelerate``, first call. Interpreters of their own.

``import`` is against importing PyTorch alone, in alternation. ``accelerate`` is timed with an empty cache, in which
every crossover is measured, and with the one that this leaves; the first call is the one after it. Their baseline is
the first call of the dense network: eager, which is what starts soonest, and compiled with an empty compiler cache.
The call after ``accelerate`` is no honest comparison by itself, since ``accelerate`` has run the network before.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch

import sparseflow
from sparseflow.bench.compare import quantiles
from sparseflow.bench.records import Gate, Metric, Point, Quantiles, Scope

from . import Case, Options, Row, alone, memory
from .baselines import Call, compiled

SUITE = "startup"
IMPORT = "import"
_TIMED_IMPORT = """
import json, time
start = time.perf_counter()
import {}
print(json.dumps({{"ms": 1e3 * (time.perf_counter() - start)}}))
"""
NETWORKS = (
    "feed-forward, width 512",
    "digits resnet18 @32, batch 1",
    "snnTorch convnet @28, T = 25, batch 1",
    "spiking_resnet18 @64, batch 1",
)
CACHES = ("accelerate and first call, nothing cached", "accelerate and first call, crossovers cached")
FIRST = "first call after accelerate"
_PROCESSES, _QUICK_PROCESSES = 5, 1
_MAX_COMPILED = 2  # processes that compile, each for minutes


def run(options: Options) -> Iterator[Case]:
    """The suite: the import, and unless quick networks of ``models``."""
    processes = _QUICK_PROCESSES if options.quick else _PROCESSES
    yield Case(IMPORT, functools.partial(_imports, processes))
    if not options.quick:
        for name in NETWORKS:
            yield Case(name, functools.partial(measure, name, options, processes))


def _imports(processes: int) -> Iterator[Row]:
    found: dict[str, list[float]] = {"torch": [], "sparseflow": []}
    for _ in range(processes):
        for module, times in found.items():
            times.append(alone.run("-c", _TIMED_IMPORT.format(module))["ms"])
    gate = Gate(True, "the module was imported")
    yield _point(IMPORT, "import sparseflow", quantiles(found["sparseflow"]), "import torch", found["torch"], gate, {})


def measure(name: str, options: Options, processes: int) -> Iterator[Row]:
    """Points of one network."""
    compiled = min(processes, _MAX_COMPILED) if options.compile else 0
    dense = {"eager, first call": [_dense(name, "eager", options) for _ in range(processes)]}
    if compiled:
        dense["compiled fp32, first call"] = [_dense(name, "compiled", options) for _ in range(compiled)]
    runs = [row for _ in range(processes) for row in _accelerated(name, options)]
    gate, config = alone.gate([row["why"] for row in runs]), runs[0]["config"]
    ours = {kernel: [row["accelerate"] + row["call"] for row in runs if row["cache"] == kernel] for kernel in CACHES}
    ours[FIRST] = [row["call"] for row in runs]
    for kernel, times in ours.items():
        for baseline, theirs in dense.items():
            value = quantiles(times) if gate.green else None
            yield _point(name, kernel, value, baseline, theirs, gate, config)


def _dense(name: str, variant: str, options: Options) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return _in_process(name, variant, options, TORCHINDUCTOR_CACHE_DIR=folder)["call"]


def _accelerated(name: str, options: Options) -> Iterator[dict[str, Any]]:
    """With an empty cache of crossovers, then with what that left."""
    with tempfile.TemporaryDirectory() as folder:
        for cache in CACHES:
            found = _in_process(name, "accelerated", options, SPARSEFLOW_CACHE_DIR=folder)
            yield found | {"cache": cache}


def _in_process(name: str, variant: str, options: Options, **environment: str) -> dict[str, Any]:
    return alone.run("-m", __name__, name, variant, str(options.threads), environment=environment)


def _point(
    case: str,
    kernel: str,
    value: Quantiles | None,
    baseline: str,
    baseline_ms: list[float],
    gate: Gate,
    config: dict[str, Any],
) -> Point:
    return Point(
        suite=SUITE,
        case=case,
        kernel=kernel,
        family="startup",
        scope=Scope.EXACT,
        config=config,
        rho=None,
        metric=Metric.STARTUP,
        value=value,
        baseline=baseline,
        baseline_value=quantiles(baseline_ms),
        honest=kernel != FIRST and not baseline.startswith("compiled"),
        gate=gate,
    )


def _since(start: int) -> float:
    return (time.perf_counter_ns() - start) / 1e6


def startup_of(name: str, variant: str) -> dict[str, Any]:
    """Milliseconds of ``accelerate`` and of the first call, in a process that has run nothing of the network yet."""
    workload = memory.workloads()[name]()
    net, accelerate = workload.build(), 0.0
    with torch.no_grad():
        if variant == "accelerated":
            start = time.perf_counter_ns()
            net = sparseflow.accelerate(net, workload.inputs[0])
            accelerate = _since(start)
        call = Call(net, workload)
        start = time.perf_counter_ns()
        if variant == "compiled":
            compiled(net, workload)
        else:
            call()
        first = _since(start)
    why = alone.checked(net, call) if variant == "accelerated" else ""
    return {"accelerate": accelerate, "call": first, "why": why, "config": workload.config}


def main(name: str, variant: str, threads: str) -> None:
    """The measured process: workload, variant, threads."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(threads))
    print(json.dumps(startup_of(name, variant)))


if __name__ == "__main__":
    main(*sys.argv[1:])
