"""Fused blocks whose kernels are compiled without a GPU: every kind of layer, neuron, residual and operation once."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from sparseflow.kernels.blocks.records import Dynamics, Epilogue, State
from sparseflow.kernels.blocks.spikes import PackedSpikes, spatial
from sparseflow.kernels.geometry import ConvGeometry, Three
from sparseflow.neuron import Charge, Reset, ResetTiming

from ..launch import Launch, recording
from ..weights import Packed
from .ops import TritonBlockOps

LIF = Dynamics(Charge.LEAK_INPUT, ">=", Reset.HARD, ResetTiming.SAME_STEP, 0.0, 1.0, decay=2.0)
CUBA = Dynamics(Charge.SYNAPTIC, ">", Reset.SOFT, ResetTiming.NEXT_STEP, 0.0, 1.0, decay=0.9, synapse_decay=0.8)
_OPS = TritonBlockOps()


@dataclasses.dataclass(frozen=True)
class BlockLayer:
    """A layer, its input of ``steps`` time steps, and what surrounds it; ``neuron=None`` stops at the sums."""

    name: str
    channels: int
    outputs: int
    size: tuple[int, ...]
    kernel: int
    stride: int = 1
    groups: int = 1
    steps: int = 4
    batch: int = 32
    residual: str = ""
    neuron: Dynamics | None = LIF
    counts: bool = False
    parts: int = 2

    @property
    def geometry(self) -> ConvGeometry:
        """With the padding that keeps the size at stride 1."""
        dims = len(self.size)
        x_shape = self.steps * self.batch, self.channels, *self.size
        pads, ones = [self.kernel // 2] * dims, [1] * dims
        return ConvGeometry.from_call(x_shape, self.w_shape, [self.stride] * dims, pads, ones, self.groups)

    @property
    def w_shape(self) -> tuple[int, ...]:
        """``[O, C / groups, *kernel]``."""
        return self.outputs, self.channels // self.groups, *[self.kernel] * len(self.size)

    def launches(self) -> list[Launch]:
        """Those of every variant."""
        g = self.geometry
        with recording() as records:
            for variant in _OPS.variants(g, self.steps):
                packed = _OPS.pack_weight(_meta(*self.w_shape), g, variant)
                x = self._spikes(self.channels, spatial(self.size), counts=self.counts)
                packed = packed if self.parts == 3 else _in_two_parts(packed)
                _OPS.conv(x, packed, g, variant, self._epilogue(), self.neuron, self._state(), self.steps)
        return records

    def _spikes(self, channels: int, size: Three, *, counts: bool) -> PackedSpikes:
        return spikes((self.steps, self.batch), channels, size, len(self.size), counts=counts)

    def _epilogue(self) -> Epilogue:
        g, channel = self.geometry, _meta(self.outputs)
        residual = {
            "": lambda: None,
            "dense": lambda: _meta(g.batch, g.out_pixels, self.outputs),
            "spikes": lambda: self._spikes(self.outputs, g.out_size, counts=False),
            "counts": lambda: self._spikes(self.outputs, g.out_size, counts=True),
        }
        return Epilogue(channel, channel, residual[self.residual]())

    def _state(self) -> State | None:
        if self.neuron is None:
            return None
        v = _meta(self.batch, self.geometry.out_pixels, self.outputs)
        return State(v, torch.empty_like(v) if self.neuron.synaptic else None)


LAYERS = (
    BlockLayer("stem 7x7 stride 2", 3, 64, (224, 224), 7, 2),
    BlockLayer("3x3 64@56", 64, 64, (56, 56), 3, residual="spikes"),
    BlockLayer("3x3 128@28", 128, 128, (28, 28), 3, residual="dense"),
    BlockLayer("3x3 512@7", 512, 512, (7, 7), 3, residual="counts", neuron=CUBA),
    BlockLayer("3x3 512@7, T 1", 512, 512, (7, 7), 3, steps=1, parts=3),
    BlockLayer("3x3 512@4, counts", 512, 512, (4, 4), 3, counts=True),
    BlockLayer("1x1 64->256@56", 64, 256, (56, 56), 1, residual="spikes"),
    BlockLayer("1x1 1024->256@14", 1024, 256, (14, 14), 1),
    BlockLayer("3x3 64@56, sums", 64, 64, (56, 56), 3, neuron=None),
    BlockLayer("3x3 depthwise 384@14", 384, 384, (14, 14), 3, groups=384),
    BlockLayer("conv1d k3 64@1000", 64, 64, (1000,), 3, batch=1),
    BlockLayer("conv3d 3x3x3 32@8x16x16", 32, 32, (8, 16, 16), 3, batch=1),
    BlockLayer("linear 4096->4096", 4096, 4096, (1,), 1, batch=1),
)


def launches(only: str = "") -> Iterator[Launch]:
    """Every launch of the layers and operations whose name contains ``only``."""
    for layer in LAYERS:
        if only in f"block {layer.name}":
            yield from layer.launches()
    for name, operation in (("neuron", neurons), ("bits", operations)):
        if only in f"block {name}":
            with recording() as records:
                operation()
            yield from records


def neurons() -> None:
    """Every charge, reset, timing and comparator, with and without the rest."""
    kinds = zip(
        Charge, itertools.cycle(Reset), itertools.cycle(ResetTiming), itertools.cycle((">=", ">")), strict=False
    )
    x, v, channel = _meta(128, 784, 128), _meta(32, 784, 128), _meta(128)
    for number, (charge, reset, timing, comparator) in enumerate(kinds):
        constant = channel if number % 2 else 0.9
        neuron = Dynamics(charge, comparator, reset, timing, 0.0, constant, constant)
        residual = (None, x, spikes((4, 32), 128, (1, 28, 28), 2), spikes((4, 32), 128, (1, 28, 28), 2, counts=True))
        epilogue = Epilogue(channel, channel, residual[number % 4])
        state = State(v, v if neuron.synaptic else None, number % 3 > 0, v_seq=None if number % 2 else x)
        _OPS.neuron(x, (1, 28, 28), 2, epilogue, neuron, state, 4)
        _OPS.affine(x, epilogue)


def operations() -> None:
    """The operations on packed bits."""
    a, b = (spikes((4, 32), 128, (1, 28, 28), 2, counts=counts) for counts in (False, True))
    for dtype in (torch.float32, torch.float16):
        _OPS.pack(torch.empty((4, 32, 128, 28, 28), dtype=dtype, device="meta"), 2)
    for x in (a, b):
        _OPS.unpack(x)
        _OPS.add(x, a)
        _OPS.avg_pool(x, (1, 7, 7), (1, 7, 7), (0, 0, 0), True)
    for op in ("and", "and_not", "or"):
        _OPS.logical(a, a, op)
    _OPS.max_pool(a, (1, 3, 3), (1, 2, 2), (0, 1, 1), (1, 1, 1))
    _OPS.concat((a, spikes((4, 32), 10, (1, 28, 28), 2), b))


def spikes(lead: tuple[int, int], channels: int, size: Three, dims: int, *, counts: bool = False) -> PackedSpikes:
    """Packed spikes on ``meta``."""
    images, pixels = lead[0] * lead[1], size[0] * size[1] * size[2]
    bits = torch.empty((images, pixels, -(-channels // 64)), dtype=torch.int64, device="meta")
    counted = torch.empty((images, pixels, channels), dtype=torch.uint8, device="meta") if counts else None
    return PackedSpikes(bits, lead, channels, size, dims, counts=counted)


def _in_two_parts(packed: Packed) -> Packed:
    """The weight as it is packed when its values allow it, which nobody can see on ``meta``."""
    shape = packed.parts.shape[1:]
    parts = torch.empty((2, *shape), dtype=torch.float16, device="meta")
    return Packed(parts, _meta(shape[0], shape[-1]))


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="meta")
