"""What a network takes, and what one call adds, as resident memory of a process of its own.

MB of a variant: how far the resident set has grown by the network with its packed weights after three calls, and the
growth to its peak during one more. The C allocator is told to give freed blocks back at once. It sees the buffers of
the engine and of oneDNN, which PyTorch's own profiler does not. Linux counts it to about a quarter of a MB. The
baseline is the eager network; a compiled one's process holds the compiler as well.
"""

from __future__ import annotations

import functools
import gc
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparseflow
from sparseflow.bench.compare import quantiles
from sparseflow.bench.records import Absent, Metric, Point, Scope

from . import Case, Options, Row, alone, models, nets, scaling
from .baselines import Call, Workload, baselines

SUITE = "memory"
DENSE = ("eager", "eager channels_last")
VARIANTS = (*DENSE, *models.LEVELS)
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_MAX_": "1000000"}
_FORGET_PEAK = Path("/proc/self/clear_refs")
_PROCESSES = 3
_TINY = 16
_QUICK = "feed-forward, width 512"


def run(options: Options) -> Iterator[Case]:
    """The suite: the networks of ``models``, and the widths of ``scaling``."""
    for name in [_QUICK] if options.quick else workloads():
        yield Case(name, functools.partial(measure, name, options))


def workloads() -> dict[str, Any]:
    """What makes each workload, by name."""
    wide = {name: make for name, make in scaling.everything() if ", width" in name}
    return dict(models.everything()) | wide


def measure(name: str, options: Options) -> Iterator[Row]:
    """Points of one network; quick asks for the eager one and level 2 alone."""
    if not _FORGET_PEAK.exists():
        yield Absent(f"{SUITE}: {name}", "the peak of the resident set is read from Linux's /proc")
        return
    variants = ("eager", "level 2") if options.quick else VARIANTS
    processes = range(1 if options.quick else _PROCESSES)
    found = {variant: [_in_process(name, variant, options) for _ in processes] for variant in variants}
    mb = {variant: quantiles([row["resident"] + row["call"] for row in rows]) for variant, rows in found.items()}
    smallest = min((variant for variant in DENSE if variant in mb), key=lambda variant: mb[variant][1])
    for kernel in (variant for variant in variants if variant in models.LEVELS):
        gate = alone.gate([row["why"] for row in found[kernel]])
        for baseline in (variant for variant in DENSE if variant in mb):
            yield Point(
                suite=SUITE,
                case=name,
                kernel=kernel,
                family=models.FAMILIES[kernel],
                scope=Scope.EXACT,
                config=found[kernel][0]["config"],
                rho=None,
                metric=Metric.MEMORY,
                value=mb[kernel] if gate.green else None,
                baseline=baseline,
                baseline_value=mb[baseline],
                honest=baseline == smallest,
                gate=gate,
            )


def _in_process(name: str, variant: str, options: Options) -> dict[str, Any]:
    return alone.run("-m", __name__, name, variant, str(options.threads), environment=_MALLOC)


def memory_of(workload: Workload, variant: str) -> dict[str, Any]:
    """``resident``: MB of the network with its packed weights; ``call``: MB that one more call needs at its peak."""
    _load_libraries(workload)
    before = _resident("VmRSS")
    net = _variant(workload, variant)
    call = Call(net, workload)
    with torch.no_grad():
        for _ in range(3):
            call()
        resident = _resident("VmRSS")
        _FORGET_PEAK.write_text("5")
        call()
        peak = _resident("VmHWM")
    why = alone.checked(net, call) if variant in models.LEVELS else ""
    return {"resident": resident - before, "call": peak - resident, "why": why, "config": workload.config}


def _load_libraries(workload: Workload) -> None:
    """Call the dense network and a tiny accelerated one, and let them go: what is loaded at first use is no network."""
    tiny = nets.fully_connected(_TINY, recurrent=False, batch=1, steps=2, density=0.1)
    with torch.no_grad():
        Call(workload.build(), workload)()
        Call(sparseflow.accelerate(tiny.build(), tiny.inputs[0]), tiny)()
    gc.collect()


def _variant(workload: Workload, name: str) -> nn.Module:
    if name in models.LEVELS:
        return sparseflow.accelerate(workload.build(), workload.inputs[0], fuse=models.LEVELS[name])
    return next(net for label, net, _ in baselines(workload, with_compile=False) if label == name)


def _resident(field: str) -> float:
    """MB of a line of ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def main(name: str, variant: str, threads: str) -> None:
    """The measured process: workload, variant, threads."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(threads))
    print(json.dumps(memory_of(workloads()[name](), variant)))


if __name__ == "__main__":
    main(*sys.argv[1:])
