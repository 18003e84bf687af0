"""Layers whose kernels are compiled without a GPU: every shape, dtype, layout and variant that can ship."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparseflow.kernels.base import Call, ConvCall, LinearCall, Refusal

from .backend import TileConv, bind_all
from .blocks.catalogue import launches as block_launches
from .launch import Launch, recording
from .pruned import WIDTHS, PrunedKernel
from .pruned_gemm import PackedBlocks
from .weights import Packed, padded_outputs

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer and its input: shapes as PyTorch has them, ``[T * N, C, *size]`` or ``[rows, K]``."""

    name: str
    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    call: Call
    channels_last: bool = True
    biased: bool = False

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, weight and bias on ``meta``."""
        x = torch.empty(self.x_shape, dtype=dtype, device="meta")
        weight = torch.empty(self.w_shape, dtype=dtype, device="meta")
        if self.channels_last and x.dim() in _LAST:
            x, weight = (t.to(memory_format=_LAST[t.dim()]) for t in (x, weight))
        return x, weight, torch.empty(self.w_shape[0], dtype=dtype, device="meta") if self.biased else None


_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def conv_layer(
    name: str,
    batch: int,
    c_in: int,
    c_out: int,
    size: tuple[int, ...],
    kernel: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    channels_last: bool = True,
    biased: bool = False,
) -> Layer:
    """A convolution with 'same' padding before striding.

    >>> conv_layer("3x3", 4, 64, 128, (56, 56), 3, stride=2).w_shape
    (128, 64, 3, 3)
    """
    dims, pad = len(size), dilation * (kernel - 1) // 2
    call = ConvCall((stride,) * dims, ((pad, pad),) * dims, (dilation,) * dims, groups)
    w_shape = (c_out, c_in // groups, *(kernel,) * dims)
    return Layer(name, (batch, c_in, *size), w_shape, call, channels_last, biased)


def linear_layer(name: str, rows: int, k: int, m: int) -> Layer:
    """A linear layer with bias."""
    return Layer(name, (rows, k), (m, k), LinearCall(), biased=True)


LAYERS = (
    conv_layer("stem 7x7 stride 2", 128, 3, 64, (224, 224), 7, stride=2),
    conv_layer("3x3 64@56", 128, 64, 64, (56, 56), 3),
    conv_layer("3x3 64@56 NCHW biased", 128, 64, 64, (56, 56), 3, channels_last=False, biased=True),
    conv_layer("3x3 128@28", 128, 128, 128, (28, 28), 3),
    conv_layer("3x3 256@14", 128, 256, 256, (14, 14), 3),
    conv_layer("3x3 512@7", 128, 512, 512, (7, 7), 3),
    conv_layer("3x3 512@7 NCHW", 4, 512, 512, (7, 7), 3, channels_last=False),
    conv_layer("3x3 512@1", 128, 512, 512, (1, 1), 3),
    conv_layer("3x3 64->128@56 stride 2", 128, 64, 128, (56, 56), 3, stride=2),
    conv_layer("3x3 256->512@14 stride 2", 128, 256, 512, (14, 14), 3, stride=2),
    conv_layer("1x1 64->128@56 stride 2", 128, 64, 128, (56, 56), 1, stride=2),
    conv_layer("1x1 64->256@56", 128, 64, 256, (56, 56), 1),
    conv_layer("1x1 256->64@56", 128, 256, 64, (56, 56), 1),
    conv_layer("1x1 1024->256@14", 128, 1024, 256, (14, 14), 1),
    conv_layer("1x1 2048->512@7", 4, 2048, 512, (7, 7), 1),
    conv_layer("5x5 32->64@28", 4, 32, 64, (28, 28), 5),
    conv_layer("7x7 16->32@28", 4, 16, 32, (28, 28), 7),
    conv_layer("3x3 dilated 64@28", 4, 64, 64, (28, 28), 3, dilation=2),
    conv_layer("3x3 grouped (32) 128@28", 4, 128, 128, (28, 28), 3, groups=32),
    conv_layer("3x3 grouped (32) 1024@14", 4, 1024, 1024, (14, 14), 3, groups=32),
    conv_layer("3x3 depthwise 384@14", 4, 384, 384, (14, 14), 3, groups=384),
    conv_layer("3x3 depthwise 384@14 NCHW", 4, 384, 384, (14, 14), 3, groups=384, channels_last=False),
    conv_layer("7x7 depthwise 96@56", 4, 96, 96, (56, 56), 7, groups=96),
    conv_layer("conv1d k1 256@196", 4, 256, 256, (196,), 1),
    conv_layer("conv1d k3 64@1000 biased", 4, 64, 64, (1000,), 3, biased=True),
    conv_layer("conv3d 3x3x3 32@8x16x16", 4, 32, 32, (8, 16, 16), 3),
    conv_layer("conv3d 64@512x256x272, 64-bit offsets", 1, 64, 64, (512, 256, 272), 3),
    linear_layer("linear 4096->4096, T*N 1", 1, 4096, 4096),
    linear_layer("linear 25088->4096, T*N 4", 4, 25088, 4096),
    linear_layer("linear 4096->4096, T*N 512", 512, 4096, 4096),
    linear_layer("linear 512->10, T*N 32", 32, 512, 10),
)


def launches(only: str = "") -> Iterator[Launch]:
    """Every launch of the layers whose name contains ``only``, for all dtypes, variants and weight packings.

    Fused blocks come last, in float32 and once each; their names start with "block".
    """
    for layer in LAYERS:
        if only in layer.name:
            for dtype in _DTYPES:
                yield from layer_launches(layer, dtype)
    yield from block_launches(only)


def layer_launches(layer: Layer, dtype: torch.dtype) -> list[Launch]:
    """What one layer launches, prescan and compute, for every kernel and variant.

    Raises:
        ValueError: no kernel covers the layer.
    """
    x, weight, bias = layer.tensors(dtype)
    with recording() as records:
        bound = bind_all(x, weight, layer.call)
        if isinstance(bound, Refusal):
            raise ValueError(f"{layer.name}: {bound.reason}. {bound.detail}")
        full = (*bound, *_under_tf32(bound))
        for kernel in (*full, *_for_pruned(full)):
            for variant in _shipped(kernel):
                for packed in _packings(kernel.pack(weight, variant, inspect=False), padded_outputs(weight.shape[0])):
                    kernel.compute(x, kernel.prescan(x, variant), packed, bias, variant)
    return records


def _under_tf32(kernels: tuple[Any, ...]) -> Iterator[TileConv]:
    """The convolutions that also ship in a form for users who allow TF32."""
    for kernel in kernels:
        if type(kernel) is TileConv and kernel.dtype == torch.float32:
            yield TileConv(kernel.geometry, kernel.layout, kernel.dtype, tf32=True)


def _for_pruned(kernels: tuple[Any, ...]) -> Iterator[PrunedKernel]:
    """What is offered instead of convolutions by tiles where a weight has zero blocks."""
    for kernel in kernels:
        if isinstance(kernel, TileConv) and kernel.geometry.groups == 1:
            yield PrunedKernel(kernel, dict.fromkeys(WIDTHS, 0.5))


def _shipped(kernel: Any) -> tuple[str, ...]:
    """Variants that the kernel offers; of one for pruned weights, for any pattern of zero blocks."""
    return tuple(v.name for v in kernel.every_variant()) if isinstance(kernel, PrunedKernel) else kernel.variants()


def _packings(packed: Any, outputs: int) -> Iterator[Any]:
    """A packed weight as it is when nobody looks at its values and, for float32, as it is when they allow two parts."""
    yield packed
    if isinstance(packed, Packed) and packed.parts.shape[0] == 3:
        shape = packed.parts.shape[1:]
        scale = torch.empty(shape[0], shape[-1], dtype=torch.float32, device="meta")
        yield Packed(torch.empty((2, *shape), dtype=torch.float16, device="meta"), scale)
    if isinstance(packed, PackedBlocks) and packed.blocks.shape[0] == 3:
        blocks = torch.empty((2, *packed.blocks.shape[1:]), dtype=torch.float16, device="meta")
        yield packed._replace(blocks=blocks, scale=torch.empty(1, outputs, dtype=torch.float32, device="meta"))
