"""Ceilings of the machine: what a copy moves, what a matrix product computes, what a graph node costs."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from .problem import cache_bytes
from .records import Figure
from .runner import Cell
from .timing import Timer, alternate

_REPEATS = 15
_NODES = 200


def copy_bandwidth(timer: Timer, device: torch.device, size: int = 4 << 30) -> Iterator[Figure]:
    """TB/s of a device-to-device copy of ``size`` bytes, read and written bytes counted."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = alternate({"copy": timer.prepare(lambda _: target.copy_(source), 1)}, _REPEATS)["copy"][1]
    yield Figure("experiments", "copy bandwidth", 2 * size / ms / 1e9, "TB/s", f"{size >> 20} MiB")


def matmul_rate(timer: Timer, device: torch.device, n: int = 8192) -> Iterator[Figure]:
    """TFLOP/s of a square matrix product on random data, by dtype; float32 without TF32."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        ms = alternate({"matmul": timer.prepare(lambda _, a=a, b=b: a @ b, 1)}, _REPEATS)["matmul"][1]
        yield Figure(
            "experiments", f"matmul {str(dtype).removeprefix('torch.')}", 2 * n**3 / ms / 1e9, "TFLOP/s", f"{n}^3"
        )


def graph_node(timer: Timer, device: torch.device) -> Iterator[Figure]:
    """Microseconds a node of a graph costs: a chain of kernels of one element each."""
    x = torch.zeros(1, device=device)
    ms = alternate({"nodes": timer.prepare(lambda _: [x.add_(1.0) for _ in range(_NODES)], 1)}, _REPEATS)["nodes"][1]
    yield Figure("experiments", "graph node", 1e3 * ms / _NODES, "us", f"chain of {_NODES} one-element kernels")


def cache(device: torch.device) -> Iterator[Figure]:
    """Size of the last-level cache."""
    yield Figure("experiments", "last-level cache", cache_bytes(device) / 2**20, "MiB")


def cells(timer: Timer, device: torch.device) -> Iterator[Cell]:
    """The ceilings, before everything they are compared with."""
    yield Cell("experiments: cache", 0, 1.0, functools.partial(cache, device))
    for run, name in ((copy_bandwidth, "copy"), (matmul_rate, "matmul"), (graph_node, "graph node")):
        yield Cell(f"experiments: {name}", 0, 4.0, functools.partial(run, timer, device))
