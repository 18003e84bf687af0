"""The GPU kernels' cost model (:mod:`sparseflow.kernels.triton.cost`) applied to the layers of a call.

A floor by memory, cache and arithmetic, for float32 without TF32. Nothing here was measured. Spikes are taken as
independent of each other; real ones are clustered, and leave more tiles empty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sparseflow.errors import BackendUnavailableError
from sparseflow.kernels.base import DENSITY, ConvCall, LinearCall, Refusal

from .records import LayerShape
from .shapes import LayerCall

if TYPE_CHECKING:
    from sparseflow.kernels.base import Kernel


def layer_ms(call: LayerCall, density: float) -> tuple[float, float]:
    """Dense and accelerated time on an H200 of all calls of a layer, in ms; the latter by the best kernel, or dense.

    Raises:
        BackendUnavailableError: Triton, which the cost model needs for its launch parameters, cannot be imported.
    """
    try:
        from sparseflow.kernels.triton import cost
    except ImportError as error:
        raise BackendUnavailableError(f"hardware='h200' needs triton for its cost model ({error})") from None
    dense = cost.dense(_geometry(call), torch.float32).ms
    kernels = _kernels(call) if density < 1.0 else ()
    ways = ((kernel, variant) for kernel in kernels for variant in kernel.variants())
    found = [cost.predict(kernel, variant, _load(kernel, variant, density)).ms for kernel, variant in ways]
    return call.calls * dense, call.calls * min([dense, *found])


def _arguments(call: LayerCall) -> tuple[torch.Tensor, torch.Tensor, ConvCall | LinearCall]:
    """Input and weight without data, and the call."""
    shape = call.shape
    if shape.linear:
        x, weight = (call.rows, shape.in_channels), (shape.out_channels, shape.in_channels)
        return torch.empty(x, device="meta"), torch.empty(weight, device="meta"), LinearCall()
    sizes = (call.rows, shape.in_channels, *shape.in_size)
    weights = (shape.out_channels, shape.in_channels // shape.groups, *shape.kernel)
    last = {"device": "meta", "memory_format": torch.channels_last}
    how = ConvCall(shape.stride, _padding(shape), (1, 1), shape.groups)
    return torch.empty(sizes, **last), torch.empty(weights, **last), how


def _padding(shape: LayerShape) -> tuple[tuple[int, int], ...]:
    """Before and after each dimension, so that the output has its size; a shape knows nothing of dilation: it is 1."""
    sizes = zip(shape.in_size, shape.out_size, shape.kernel, shape.stride, strict=True)
    both = [max(0, (out - 1) * stride + kernel - size) for size, out, kernel, stride in sizes]
    return tuple((total // 2, total - total // 2) for total in both)


def _geometry(call: LayerCall) -> Any:
    from sparseflow.kernels.geometry import ConvGeometry

    x, weight, how = _arguments(call)
    if isinstance(how, LinearCall):
        return ConvGeometry.from_call((*x.shape, 1), (*weight.shape, 1), (1,), (0,), (1,), 1)
    return ConvGeometry.from_call(x.shape, weight.shape, how.stride, how.padding, how.dilation, how.groups)


def _kernels(call: LayerCall) -> tuple[Kernel, ...]:
    from sparseflow.kernels.triton.backend import bind_all
    from sparseflow.kernels.triton.launch import recording

    with recording():
        bound = bind_all(*_arguments(call), inspect=False)
    return () if isinstance(bound, Refusal) else bound


def _load(kernel: Any, variant: str, density: float) -> float:
    """Density, or the share of a kernel's blocks that hold one of independent spikes."""
    from sparseflow.kernels.triton.backend import TileConv, TileVariant
    from sparseflow.kernels.triton.depthwise import BlockVariant
    from sparseflow.kernels.triton.tiles import Tiling

    if kernel.axis == DENSITY:
        return density
    if isinstance(kernel, TileConv):
        tile = TileVariant.from_name(variant)
        side, channels = tile.side, 1 if tile.gather else tile.block_k
    else:
        block = BlockVariant.from_name(variant)
        side, channels = block.side, block.channels
    return 1.0 - (1.0 - density) ** (Tiling.of_side(kernel.geometry, side).halo_pixels * channels)
