"""Fused spiking blocks: convolution, batch norm and neuron in one kernel against cuDNN and a neuron kernel behind it.

Both sides take the same spikes and end in packed spikes. The dense side gets them dense, which is what its producer
would have written; reading and writing dense sums between the two kernels is what fusion saves. Weights are whole
sixty-fourths, so that all sums are exact and the gate asks for equal bits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseflow.kernels.blocks import reference
from sparseflow.kernels.blocks.records import Dynamics, Epilogue, State
from sparseflow.kernels.blocks.spikes import PackedSpikes, channels_last
from sparseflow.kernels.geometry import ConvGeometry
from sparseflow.neuron import Charge, Reset, ResetTiming

from .layers import EFFICIENCY, STEPS, LayerShape
from .problem import Problem
from .records import Gate, LayerRow, RedGate, Row, Skipped
from .runner import Cell, is_fatal
from .spikes import CLUSTERED
from .timing import Run, Timer, alternate

LIF = Dynamics(Charge.LEAK_INPUT, ">=", Reset.HARD, ResetTiming.SAME_STEP, 0.0, 1.0, decay=2.0)
DENSITIES = (0.0, 0.015, 0.05, 0.1, 0.3)
_BATCH = 32
_REPEATS = 15
_BASELINES = {
    "float32": "cuDNN float32 without TF32 and neuron kernel, graphed",
    "float16": "cuDNN float16 and neuron kernel, graphed",
}


@dataclasses.dataclass(frozen=True)
class Block:
    """A layer with a folded batch norm and LIF neurons over T, its inputs and its weight."""

    layer: LayerShape
    xs: list[Tensor]
    weight: Tensor
    epilogue: Epilogue

    @classmethod
    def of(cls, layer: LayerShape, images: int, density: float, device: torch.device) -> Block:
        """``images`` are ``STEPS`` times the batch."""
        problem = Problem.of(layer, images, torch.float32, device)
        generator = torch.Generator().manual_seed(1)
        scale, shift = (torch.rand(layer.c_out, generator=generator).to(device) for _ in range(2))
        weight = (problem.weight * 64).round() / 64
        return cls(layer, problem.spikes(CLUSTERED, density), weight, Epilogue(scale, shift))

    @functools.cached_property
    def ops(self):
        """The operations as Triton has them."""
        from sparseflow.kernels.triton.blocks.ops import TritonBlockOps

        return TritonBlockOps()

    @functools.cached_property
    def packed(self) -> list[PackedSpikes]:
        """The inputs as bits."""
        return [self.ops.pack(x.unflatten(0, (STEPS, -1)), 2) for x in self.xs]

    @property
    def geometry(self) -> ConvGeometry:
        """Of all steps together."""
        c = self.layer.call
        return ConvGeometry.from_call(self.xs[0].shape, self.weight.shape, c.stride, c.padding, c.dilation, c.groups)

    def state(self) -> State:
        """Memory that every call starts afresh."""
        g = self.geometry
        return State(torch.empty(g.batch // STEPS, g.out_pixels, g.out_channels, device=self.weight.device))

    def fused(self, variant: str) -> Callable[[int], PackedSpikes]:
        """One kernel, or two where it lists channels first."""
        weight, state = self.ops.pack_weight(self.weight, self.geometry, variant), self.state()
        rest = (weight, self.geometry, variant, self.epilogue, LIF, state, STEPS)
        return lambda i: self.ops.conv(self.packed[i], *rest)

    def dense(self, dtype: torch.dtype) -> Callable[[int], PackedSpikes]:
        """cuDNN, then epilogue and neuron in one kernel."""
        xs, weight, state, g = [x.to(dtype) for x in self.xs], self.weight.to(dtype), self.state(), self.geometry
        pad, stride = self.layer.kernel // 2, self.layer.stride

        def run(i: int) -> PackedSpikes:
            sums = channels_last(F.conv2d(xs[i], weight, None, stride, pad), 1).float()
            return self.ops.neuron(sums, g.out_size, 2, self.epilogue, LIF, state, STEPS)

        return run

    def gate(self, way: Callable[[int], PackedSpikes]) -> Gate:
        """Equal spikes and count of the reference on exact sums.

        Raises:
            RedGate: they are not.
        """
        pad, stride = self.layer.kernel // 2, self.layer.stride
        sums = F.conv2d(self.xs[0].double(), self.weight.double(), None, stride, pad).float()  # cuDNN's own may round
        sums = channels_last(sums, 1)
        spikes = reference.run_neuron(reference.affine(sums, self.epilogue), LIF, self.state(), STEPS)
        found = way(0)
        values = channels_last(self.ops.unpack(found), 2).view_as(spikes)
        wrong = int((values != spikes).sum()) + int(found.nonzero != spikes.count_nonzero())
        if wrong:
            raise RedGate(f"{self.layer.name}: {wrong} of {spikes.numel()} spikes differ")
        return Gate(0.0, f"all {spikes.numel()} spikes")


def run(layer: LayerShape, images: int, densities: tuple[float, ...], timer: Timer, device: torch.device) -> list[Row]:
    """Rows of one layer at several densities: every variant of the fused kernel over both dense sides."""
    rows: list[Row] = []
    with torch.no_grad():
        for density in densities:
            rows += at_density(Block.of(layer, images, density, device), density, timer)
    return rows


def at_density(block: Block, target: float, timer: Timer) -> Iterator[Row]:
    """Rows of one density, those that are wrong or do not run as :class:`Skipped`."""
    runs: dict[str, Run] = {name: block.dense(getattr(torch, name)) for name in _BASELINES}
    gates: dict[str, Gate] = {}
    for variant in block.ops.variants(block.geometry, STEPS):
        try:
            way = block.fused(variant)
            gates[variant] = block.gate(way)
            runs[variant] = way
        except Exception as error:  # one that does not compile or is wrong leaves the others standing
            if is_fatal(error):
                raise
            yield Skipped(
                "blocks", f"{block.layer.name} {target:g} {variant}", f"{type(error).__name__}: {error}"[:500]
            )
    times = alternate({name: timer.prepare(way, len(block.xs)) for name, way in runs.items()}, _REPEATS)
    density = float(sum(x.mean() for x in block.xs)) / len(block.xs)
    for variant, gate in gates.items():
        for dtype, baseline in _BASELINES.items():
            yield LayerRow(
                stage="blocks",
                layer=block.layer.name,
                dtype=dtype,
                steps_times_batch=block.geometry.batch,
                pattern=CLUSTERED,
                target=target,
                density=density,
                path="fused",
                variant=variant,
                axis="density",
                load=density,
                ms=times[variant],
                prescan_ms=None,
                includes_prescan=True,
                baseline=baseline,
                baseline_ms=times[dtype],
                speedup=times[dtype][1] / times[variant][1],
                cold=False,
                gate=gate,
            )


def cells(timer: Timer, device: torch.device) -> Iterator[Cell]:
    """The four layers of the first experiments, batch 32 and T 4."""
    for layer in EFFICIENCY:
        task = functools.partial(run, layer, STEPS * _BATCH, DENSITIES, timer, device)
        yield Cell(f"blocks: {layer.name}, T {STEPS}, batch {_BATCH}", 2, 25.0, task)
