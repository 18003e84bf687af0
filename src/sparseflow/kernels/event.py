"""Event-driven kernels on the CPU: the native engine bound to one call signature."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from sparseflow.plan import Path, Reason

from .base import DENSITY, Call, ConvCall, Layout, Refusal, conv_layout
from .cpu import engine
from .weight_blocks import present_share

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def bind(x: Tensor, weight: Tensor, call: Call) -> EventConv | EventLinear | Refusal:
    """An event-driven kernel for this signature, or why there is none."""
    if x.device.type != "cpu":
        return Refusal(Reason.DEVICE, f"the native engine runs on the CPU, the input is on {x.device}")
    if x.dtype not in _DTYPES:
        return Refusal(Reason.DTYPE, f"{x.dtype}; supported: float32, bfloat16, float16, float64")
    if not engine.available():
        return Refusal(Reason.NO_ENGINE, engine.reason())
    if not weight.numel():
        return Refusal(Reason.NO_ENGINE, "the weight is empty")
    if isinstance(call, ConvCall):
        share = present_share(weight) if call.groups == 1 else 1.0
        return _bind_conv(tuple(x.shape), x.stride(), tuple(weight.shape), weight.stride(), x.dtype, call, share)
    return EventLinear(math.prod(x.shape[:-1]), weight.shape[1], weight.shape[0], x.dtype, present_share(weight))


@functools.lru_cache(maxsize=1024)
def _bind_conv(x_shape, x_stride, w_shape, w_stride, dtype, call: ConvCall, share: float) -> EventConv | Refusal:
    layout = conv_layout(x_shape, x_stride, w_shape, w_stride, dtype, call)
    geometry = engine.ConvGeometry.from_call(x_shape, w_shape, call.stride, call.padding, call.dilation, call.groups)
    refusal = engine.conv_supported(geometry, dtype)
    if refusal is not None:
        return Refusal(Reason.NO_ENGINE, refusal)
    return EventConv(geometry, layout, dtype, share)


class EventConv:
    """Convolution on the native engine: bits, event lists, weight rows added into registers."""

    path = Path.EVENT
    axis = DENSITY
    deferred = False
    weight_share = 1.0

    def __init__(self, geometry: engine.ConvGeometry, layout: Layout, dtype: torch.dtype, weight_share: float = 1.0):
        self.geometry, self.layout, self.dtype, self.weight_share = geometry, layout, dtype, weight_share

    def variants(self) -> tuple[str, ...]:
        return tuple(v.name for v in engine.conv_variants(self.geometry, self.dtype, self.weight_share))

    def pack(self, weight: Tensor, variant: str, *, inspect: bool = True) -> engine.Packed:  # noqa: ARG002
        return engine.pack_weight(weight, self.geometry.groups, _variant(variant))

    def matches(self, weight: Tensor, packed: engine.Packed, variant: str, offset: int) -> bool:
        return engine.weights_match(weight, packed, self.geometry.groups, _variant(variant), offset)

    def prescan(self, x: Tensor, variant: str) -> engine.Prescan:  # noqa: ARG002
        return engine.prescan_conv(x, self.geometry)

    def compute(
        self, x: Tensor, scan: engine.Prescan, packed: engine.Packed, bias: Tensor | None, variant: str
    ) -> Tensor:
        return engine.conv(
            x,
            scan,
            packed,
            _as(bias, self.dtype),
            self.geometry,
            _variant(variant),
            channels_last=self.layout.channels_last,
            out=self.layout.empty(self.dtype),
        )


class EventLinear:
    """Linear layer on the native engine: only the weight rows of active inputs are read."""

    path = Path.EVENT
    axis = DENSITY
    deferred = False
    weight_share = 1.0

    def __init__(self, rows: int, in_features: int, out_features: int, dtype: torch.dtype, weight_share: float = 1.0):
        self.rows, self.in_features, self.out_features, self.dtype = rows, in_features, out_features, dtype
        self.weight_share = weight_share

    def variants(self) -> tuple[str, ...]:
        sizes = (self.rows, self.in_features, self.out_features)
        found = engine.linear_variants(*sizes, self.dtype, self.weight_share)
        return tuple(v.name for v in found)

    def pack(self, weight: Tensor, variant: str, *, inspect: bool = True) -> engine.Packed:  # noqa: ARG002
        return engine.pack_weight(weight, 1, _variant(variant))

    def matches(self, weight: Tensor, packed: engine.Packed, variant: str, offset: int) -> bool:
        return engine.weights_match(weight, packed, 1, _variant(variant), offset)

    def prescan(self, x: Tensor, variant: str) -> engine.Prescan:  # noqa: ARG002
        return engine.prescan_linear(x.reshape(self.rows, self.in_features))

    def compute(
        self, x: Tensor, scan: engine.Prescan, packed: engine.Packed, bias: Tensor | None, variant: str
    ) -> Tensor:
        out = torch.empty(self.rows, self.out_features, dtype=self.dtype)
        rows = x.reshape(self.rows, self.in_features)
        engine.linear(rows, scan, packed, _as(bias, self.dtype), _variant(variant), out=out)
        return out.view(*x.shape[:-1], self.out_features)


def _as(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias as the engine reads it."""
    if bias is None or (bias.dtype is dtype and bias.is_contiguous()):
        return bias
    return bias.detach().to(dtype).contiguous()


_variant = functools.lru_cache(maxsize=256)(engine.Variant.from_name)
