"""One layer with its tensors: the dense and sparse ways to run it, and the gate that every one of them has to pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparseflow.dispatch.runtime import LayerRuntime, RuntimeConfig
from sparseflow.kernels.base import ConvCall, Counts, Refusal, counts
from sparseflow.kernels.reference import excess
from sparseflow.kernels.weight_blocks import BLOCK, present_blocks
from sparseflow.modules.swap import swap
from sparseflow.plan import LayerPlan, Path, Provenance, Reason

from .layers import LayerShape, Pruned
from .records import Gate, RedGate
from .spikes import draw
from .timing import Run

_CHECKED_OUTPUTS = 4_000_000
_MOST_INPUTS = 8
_INPUT_BYTES = 4 << 30
_CPU_CACHE = 32 << 20
_SETTLING = 4

DenseLayer = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A layer at one batch size and dtype on one device, channels-last, without bias (batch norm follows it).

    ``weights`` are copies that take turns, so that a linear layer does not find its weight in the cache: between two
    calls of it a network reads its other layers. The small weights of a convolution may well still be there.
    """

    layer: LayerShape
    steps_times_batch: int
    dtype: torch.dtype
    device: torch.device
    weights: tuple[Tensor, ...]

    @classmethod
    def of(cls, layer: LayerShape, steps_times_batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
        """With random weights, of unit gain before they are pruned."""
        generator = torch.Generator().manual_seed(0)
        gain = torch.Size(layer.w_shape[1:]).numel() ** -0.5
        values = torch.randn(layer.w_shape, generator=generator) * gain
        if layer.pruned is not None:
            values *= _left(layer.w_shape, layer.pruned, generator)
        weight = _last(values.to(device, dtype))
        copies = 1 if layer.size else _exceeding(cache_bytes(device), weight.nbytes)
        return cls(layer, steps_times_batch, dtype, device, tuple(weight.clone() for _ in range(copies)))

    @property
    def like(self) -> Tensor:
        """An uninitialised input."""
        return _last(torch.empty(self.layer.x_shape(self.steps_times_batch), dtype=self.dtype, device=self.device))

    @property
    def inputs(self) -> int:
        """Inputs in rotation: enough to exceed twice the last-level cache, within memory and patience."""
        size = self.like.nbytes
        return max(2, len(self.weights), min(_exceeding(cache_bytes(self.device), size), _INPUT_BYTES // size))

    @property
    def cold(self) -> bool:
        """Whether the inputs (of a linear layer: the weights) in rotation do not fit into that cache together."""
        turning = self.inputs * self.like.nbytes if self.layer.size else sum(w.nbytes for w in self.weights)
        return turning > cache_bytes(self.device)

    @property
    def weight(self) -> Tensor:
        """The weight, ``[C_out, C_in, *kernel]``."""
        return self.weights[0]

    def spikes(self, pattern: str, density: float) -> list[Tensor]:
        """The inputs, all different."""
        return [draw(pattern, self.like, density, seed) for seed in range(1, self.inputs + 1)]

    def dense_layers(self, *, compiled: bool) -> dict[str, DenseLayer]:
        """PyTorch's own layer in this dtype and layout, and the same under ``torch.compile``."""
        layers: dict[str, DenseLayer] = {"dense": self.layer.call.dense}
        if compiled:
            torch._dynamo.reset()
            layers["dense compiled"] = torch.compile(self.layer.call.dense, dynamic=False)
        return layers

    def dense(self, layer: DenseLayer, xs: list[Tensor]) -> Run:
        """One of these layers on the inputs."""
        return lambda i: layer(xs[i], self.weights[i % len(self.weights)], None)

    def dispatched(self) -> nn.Module:
        """The layer as :func:`sparseflow.accelerate` leaves it, to be run by what it measured and what it sees."""
        shape, call = self.layer, self.layer.call
        with torch.device("meta"):
            if isinstance(call, ConvCall):
                pad = call.padding[0][0]
                layer = nn.Conv2d(shape.c_in, shape.c_out, shape.kernel, shape.stride, pad, bias=False)
            else:
                layer = nn.Linear(shape.c_in, shape.c_out, bias=False)
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        plan = LayerPlan(shape.name, shape.name, Path.DENSE, Reason.NOT_MEASURED, Provenance.BINARY)
        swap(layer.eval(), LayerRuntime(plan, RuntimeConfig()))
        return layer

    def settle(self, layer: nn.Module, xs: list[Tensor]) -> None:
        """Let a dispatched layer see the inputs: what it counts arrives after the call that counted it."""
        for x in xs * _SETTLING:
            layer(x)
            if x.is_cuda:
                torch.cuda.synchronize()

    def eager_float32(self, xs: list[Tensor]) -> Run:
        """The layer as a user wrote it: float32, contiguous."""
        weights, inputs = ([t.float().contiguous() for t in some] for some in (self.weights, xs))
        return lambda i: self.layer.call.dense(inputs[i], weights[i % len(weights)], None)

    def kernels(self) -> tuple[Any, ...]:
        """The sparse kernels that cover the layer; that for pruned weights also where it is not expected to win.

        Raises:
            ValueError: none does.
        """
        from sparseflow.kernels.triton.backend import bind_all
        from sparseflow.kernels.triton.pruned import PrunedKernel, shares_of

        bound = bind_all(self.like, self.weight, self.layer.call)
        if isinstance(bound, Refusal):
            raise ValueError(f"{self.layer.name}: {bound.reason}. {bound.detail}")
        if self.layer.pruned is None or isinstance(bound[0], PrunedKernel):
            return bound
        return PrunedKernel(bound[0], shares_of(present_blocks(self.weight).transpose(1, 2).cpu())), *bound

    def gate(self, way: Callable[[Tensor], Tensor], xs: list[Tensor]) -> Gate:
        """Compare what ``way`` returns with the float64 oracle, on as many images as are affordable.

        Memory that the output may get is poisoned before, and all of the output has to be finite.

        Raises:
            RedGate: something is wrong.
        """
        x = xs[0]
        _poison(self.layer.call.dense(x, self.weight, None))
        y = way(x)
        per_image = max(1, y.numel() // y.shape[0])
        some = min(x.shape[0], max(2, _CHECKED_OUTPUTS // per_image))
        images = torch.linspace(0, x.shape[0] - 1, some).long().unique().to(x.device)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
            worst = excess(y[images], x[images], self.weight, None, self.layer.call)
        if not bool(y.isfinite().all()):
            worst = float("inf")
        gate = Gate(worst, f"{len(images)} of {x.shape[0]} images")
        if not gate.green:
            raise RedGate(f"{self.layer.name}, {self.dtype}: {worst:.3g} budgets off")
        return gate


@dataclasses.dataclass(frozen=True)
class SparseWay:
    """One kernel and variant on one problem, its weights packed."""

    kernel: Any
    variant: str
    packed: tuple[Any, ...]

    @classmethod
    def of(cls, kernel: Any, variant: str, weights: tuple[Tensor, ...]) -> SparseWay:
        """Pack ``weights`` for it."""
        return cls(kernel, variant, tuple(kernel.pack(weight, variant) for weight in weights))

    def __call__(self, x: Tensor, turn: int = 0) -> Tensor:
        packed = self.packed[turn % len(self.packed)]
        return self.kernel.compute(x, self.kernel.prescan(x, self.variant), packed, None, self.variant)

    def whole(self, xs: list[Tensor]) -> Run:
        """Prescan and compute."""
        return lambda i: self(xs[i], i)

    def prescan(self, xs: list[Tensor]) -> Run:
        """The prescan alone."""
        return lambda i: self.kernel.prescan(xs[i], self.variant)

    def compute(self, xs: list[Tensor]) -> Run:
        """The second stage alone, on prescans made beforehand: the way the public predecessor was timed."""
        scans = [self.kernel.prescan(x, self.variant) for x in xs]
        packed = self.packed
        return lambda i: self.kernel.compute(xs[i], scans[i], packed[i % len(packed)], None, self.variant)

    def counted(self, x: Tensor) -> Counts:
        """What its prescan finds; waits for the device."""
        return counts(self.kernel.prescan(x, self.variant))


def _left(shape: tuple[int, ...], how: Pruned, generator: torch.Generator) -> Tensor:
    """``[C_out, C_in, *kernel]``: 1 where the weight is left, 0 elsewhere."""
    rows, columns = (-(-channels // block) for channels, block in zip(shape, BLOCK, strict=False))
    left = torch.rand(1 if how.together else rows, columns, *shape[2:], generator=generator) < how.share
    wide = left.expand(rows, *left.shape[1:]).repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
    return wide[: shape[0], : shape[1]].float()


def _exceeding(cache: int, size: int) -> int:
    """How many tensors of ``size`` bytes exceed twice the cache, within reason."""
    return min(_MOST_INPUTS, 2 * cache // size + 1)


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache; an assumption on the CPU."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _CPU_CACHE


def _last(t: Tensor) -> Tensor:
    return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t


def _poison(out: Tensor) -> None:
    """Leave a freed block full of NaN where the next output of this size is likely to land."""
    out.fill_(float("nan"))
