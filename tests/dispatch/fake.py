"""Deferred kernels in plain PyTorch, and a guard that fails where anything would wait for a device."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparseflow.dispatch.runtime import LayerRuntime, RuntimeConfig
from sparseflow.kernels import select
from sparseflow.kernels.base import DENSITY, OCCUPANCY, LinearCall
from sparseflow.plan import Crossover, LayerPlan, Path, Provenance, Reason

WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")


class NoWaiting(TorchDispatchMode):
    """Raises where an operation needs values on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype is torch.bool for i in args[1])
        waits = by_mask or func.overloadpacket.__name__ in WAITING
        assert not waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting():
    """Operations, and the methods of a tensor that read its memory, must not be used inside."""

    def refuse(name):
        def method(*_, **__):
            raise AssertionError(f"Tensor.{name} waits for the device")

        return method

    patch = pytest.MonkeyPatch()
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"):
        patch.setattr(Tensor, name, refuse(name))
    try:
        with NoWaiting():
            yield
    finally:
        patch.undo()


class Packed(NamedTuple):
    rows: Tensor
    scale: Tensor | None


class FakeScan:
    """Counts on the device; a block is a column of the input."""

    def __init__(self, x, kernel):
        self.x, self.kernel = x, kernel
        self.numel, self.words = x.numel(), x.shape[-1]

    def totals(self):
        self.kernel.asked += 1
        hit = self.x != 0
        return torch.stack((hit.sum(), hit.flatten(0, -2).any(0).sum()))


class FakeKernel:
    """Linear layer whose two stages are dense; counts what was asked of it."""

    deferred = True
    weight_share = 1.0

    def __init__(self, path=Path.TILE, axis=OCCUPANCY, dtype=torch.float32):
        self.path, self.axis, self.dtype = path, axis, dtype
        self.prescans = self.packs = self.asked = self.inspections = 0

    def variants(self):
        return ("a", "b")

    def pack(self, weight, variant, *, inspect=True):
        self.packs += 1
        self.inspections += inspect
        rows = weight.t()
        return Packed(rows if inspect else torch.stack((rows, rows * 0)), None)

    def matches(self, weight, packed, variant, offset):
        raise AssertionError("never called for a deferred kernel")

    def prescan(self, x, variant):
        self.prescans += 1
        return FakeScan(x, self)

    def compute(self, x, scan, packed, bias, variant):
        rows = packed.rows if packed.rows.dim() == 2 else packed.rows.sum(0)
        y = x @ rows
        return y if bias is None else y + bias


class FakeEvent(FakeKernel):
    """Another class, since packed weights are told apart by it."""

    def __init__(self):
        super().__init__(Path.EVENT, DENSITY)


def curve(key, kernel, *, at_zero, at_one, dense_ms=1.0, prescan_ms=0.001, pack_ms=0.0):
    """A crossover whose sparse time runs straight from ``at_zero`` to ``at_one``."""
    crossing = min(1.0, max(0.0, (dense_ms - at_zero) / (at_one - at_zero)))
    times = (0.0, 1.0), (at_zero, at_one)
    return Crossover(key, crossing, dense_ms, prescan_ms, pack_ms, *times, "a", axis=kernel.axis)


def install(monkeypatch, *kernels):
    """Have ``kernels`` cover every call on the CPU."""
    monkeypatch.setitem(select._BINDERS, "cpu", lambda *_: kernels)


def runtime_for(monkeypatch, *pairs, mode="auto"):
    """A linear layer's runtime with the given ``(kernel, Measured)`` pairs to choose from."""
    install(monkeypatch, *(kernel for kernel, _ in pairs))
    plan = LayerPlan("layer", "linear", Path.DENSE, Reason.NOT_MEASURED, Provenance.BINARY)
    runtime = LayerRuntime(plan, RuntimeConfig(mode=mode))
    monkeypatch.setattr(runtime._crossovers, "of", lambda *_: pairs)
    return runtime


def spikes(density, rows=20, columns=50, seed=0):
    """Exactly ``density`` of the elements, in the first rows."""
    x = torch.zeros(rows * columns)
    x[: round(density * x.numel())] = 1.0
    return x[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(seed))].view(rows, columns)


def columns(share, rows=20, total=50):
    """A tenth of the elements of the first ``share`` of the columns: occupancy ``share``, density a tenth of that."""
    x = torch.zeros(rows, total)
    x[::10, : round(share * total)] = 1.0
    return x


LINEAR = LinearCall()
