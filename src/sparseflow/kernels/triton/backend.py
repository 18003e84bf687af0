"""The Triton kernels that cover a call: tiles for convolutions and linear layers, events for very low density."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import torch
from torch import Tensor

from sparseflow.kernels.base import OCCUPANCY, Call, ConvCall, Kernel, Layout, Refusal, conv_layout
from sparseflow.kernels.geometry import ConvGeometry
from sparseflow.kernels.precision import tf32_convolution, tf32_matmul
from sparseflow.plan import Path, Reason

from .depthwise import DepthwiseConv
from .events import EventConv, EventLinear
from .gemm import tile_gemm
from .launch import interpreting, runs_on
from .prescan import TileScan, prescan_tiles
from .pruned import offered
from .rows import as_bias
from .tiles import Tiling
from .weights import Packed, pack, padded_outputs

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_SMALL_BATCH = 32  # rows of a linear layer up to which reading only the active inputs' weights can pay


def bind_all(x: Tensor, weight: Tensor, call: Call, *, inspect: bool = True) -> tuple[Kernel, ...] | Refusal:
    """Every Triton kernel that covers this signature, or why there is none.

    Values of ``x`` are not looked at. With ``inspect``, which waits for the device, a kernel for pruned weights comes
    first where ``weight`` has zero blocks enough.
    """
    if not runs_on(x.device):
        wanted = "CPU tensors (TRITON_INTERPRET=1 is set)" if interpreting() else "CUDA tensors"
        return Refusal(Reason.DEVICE, f"the Triton kernels run on {wanted}, the input is on {x.device}")
    if x.dtype not in _DTYPES:
        return Refusal(Reason.DTYPE, f"{x.dtype}; supported by the Triton kernels: float16, bfloat16, float32")
    if not weight.numel() or not x.numel():
        return Refusal(Reason.NO_ENGINE, "the weight or the input is empty")
    bound = _bind_conv(x, weight, call) if isinstance(call, ConvCall) else _bind_linear(x, weight)
    return (*offered(bound[0], weight), *bound) if inspect else bound


def _bind_conv(x: Tensor, weight: Tensor, call: ConvCall) -> tuple[Kernel, ...]:
    signature = tuple(x.shape), x.stride(), tuple(weight.shape), weight.stride(), x.dtype, call
    device_type = "cpu" if x.is_meta else x.device.type
    layout, geometry = conv_layout(*signature, device_type), _conv_geometry(x, weight, call)
    if 1 < geometry.groups == geometry.in_channels:
        return (DepthwiseConv(geometry, layout, x.dtype),)
    tf32 = _on_gpu_in_float32(x) and tf32_convolution()
    return TileConv(geometry, layout, x.dtype, tf32=tf32), EventConv(geometry, layout, x.dtype)


def _conv_geometry(x: Tensor, weight: Tensor, call: ConvCall) -> ConvGeometry:
    return ConvGeometry.from_call(x.shape, weight.shape, call.stride, call.padding, call.dilation, call.groups)


def _bind_linear(x: Tensor, weight: Tensor) -> tuple[Kernel, ...]:
    sizes = math.prod(x.shape[:-1]), weight.shape[1], weight.shape[0]
    tiled = TileLinear(*sizes, x.dtype, tf32=_on_gpu_in_float32(x) and tf32_matmul())
    return (tiled,) if sizes[0] > _SMALL_BATCH else (tiled, EventLinear(*sizes, x.dtype))


def _on_gpu_in_float32(x: Tensor) -> bool:
    """Whether PyTorch's switches for TF32 concern a layer with input ``x``."""
    return x.is_cuda and x.dtype == torch.float32


@dataclasses.dataclass(frozen=True)
class TileVariant:
    """One configuration of the two tile kernels.

    ``side``: 16, 8 or 4, for tiles of 256, 64 or 16 outputs. ``gather``: skip single channels and gather the others
    (``channels``), or skip whole groups of ``block_k`` in place (``groups``). The rest as in :func:`tile_gemm`.
    """

    side: int
    gather: bool
    block_n: int
    block_k: int
    warps: int
    stages: int
    tf32: bool = False

    @property
    def name(self) -> str:
        """Stable text form; :meth:`from_name` reads it back.

        >>> TileVariant(8, True, 64, 32, 4, 3).name
        'tile8-channels-n64-k32-w4-s3'
        """
        mode = "channels" if self.gather else "groups"
        blocks = f"n{self.block_n}-k{self.block_k}-w{self.warps}-s{self.stages}"
        return f"tile{self.side}-{mode}-{blocks}{'-tf32' if self.tf32 else ''}"

    @classmethod
    @functools.cache
    def from_name(cls, name: str) -> TileVariant:
        """The variant called ``name``. Raises ``ValueError`` if it is no variant's name."""
        match = re.fullmatch(r"tile(\d+)-(channels|groups)-n(\d+)-k(\d+)-w(\d+)-s(\d+)(-tf32)?", name)
        if match is None:
            raise ValueError(f"not a variant of the tile kernels: {name!r}")
        side, mode, block_n, block_k, warps, stages, tf32 = match.groups()
        blocks = int(block_n), int(block_k), int(warps), int(stages)
        return cls(int(side), mode == "channels", *blocks, tf32 is not None)


def tile_variants(geometry: ConvGeometry, *, tf32: bool, parts: int) -> tuple[TileVariant, ...]:
    """The configurations worth measuring, best guess first: at most four.

    The side follows the feature map: large tiles share weights, small ones skip more. Single channels are silent far
    more often than groups of them, so that skipping in groups is tried once, for what the gather costs.
    """
    sides = _sides(geometry)
    modes = *((side, True) for side in sides), (sides[0], False)
    return tuple(_configuration(geometry, side, gather=gather, tf32=tf32, parts=parts) for side, gather in modes)


def _sides(geometry: ConvGeometry) -> tuple[int, ...]:
    """Tile sides for the size of the feature map."""
    pixels = math.prod(geometry.out_size)
    if pixels >= 32 * 32:
        return (8, 16, 4)
    return (8, 4) if pixels > 4 * 4 else (4, 8)


def _configuration(geometry: ConvGeometry, side: int, *, gather: bool, tf32: bool, parts: int) -> TileVariant:
    outputs = padded_outputs(geometry.out_channels // geometry.groups)
    widest = 128 if side == 8 and parts == 1 else 64
    block_n = next(n for n in (128, 64, 32, 16) if n <= widest and (n <= outputs or n == 16))
    block_k = 64 if geometry.group_channels >= 256 and parts == 1 and side != 16 else 32
    if geometry.group_channels <= 16:
        block_k = 16
    warps = {16: 8, 8: 4, 4: 4}[side]
    return TileVariant(side, gather, block_n, block_k, warps, 3 if side == 16 else 4, tf32)


class TileConv:
    """Convolution by tiles: prescan, then a matrix product over the channels that are active in each tile."""

    path = Path.TILE
    axis = OCCUPANCY
    deferred = True
    weight_share = 1.0

    def __init__(self, geometry: ConvGeometry, layout: Layout, dtype: torch.dtype, *, tf32: bool):
        self.geometry, self.layout, self.dtype, self.tf32 = geometry, layout, dtype, tf32

    @functools.cached_property
    def _variants(self) -> tuple[str, ...]:
        parts = 1 if self.tf32 or self.dtype != torch.float32 else 2
        return tuple(v.name for v in tile_variants(self.geometry, tf32=self.tf32, parts=parts))

    def variants(self) -> tuple[str, ...]:
        return self._variants

    def pack(self, weight: Tensor, variant: str, *, inspect: bool = True) -> Packed:
        return pack(weight, self.geometry.groups, tf32=TileVariant.from_name(variant).tf32, inspect=inspect)

    def prescan(self, x: Tensor, variant: str) -> TileScan:
        v, x = TileVariant.from_name(variant), self.image(x)
        return prescan_tiles(x, Tiling.of_side(self.geometry, v.side), v.block_k, gather=v.gather)

    def compute(self, x: Tensor, scan: TileScan, packed: Packed, bias: Tensor | None, variant: str) -> Tensor:
        v, out = TileVariant.from_name(variant), self.layout.empty(self.dtype, x.device)
        blocks = {"block_n": v.block_n, "block_k": v.block_k, "warps": v.warps, "stages": v.stages}
        tiling = Tiling.of_side(self.geometry, v.side)
        tile_gemm(self.image(x), scan, packed, as_bias(bias, self.dtype), out, tiling, **blocks)
        return self.result(out, x)

    def image(self, x: Tensor) -> Tensor:
        """The input as ``[N, C, *size]``."""
        return x

    def result(self, y: Tensor, x: Tensor) -> Tensor:  # noqa: ARG002
        """The output of the layer for input ``x`` from ``y [N, O, *size]``."""
        return y


class TileLinear(TileConv):
    """A linear layer is a 1x1 convolution over a row of pixels, one a row of the input."""

    def __init__(self, rows: int, in_features: int, out_features: int, dtype: torch.dtype, *, tf32: bool):
        shapes = (1, in_features, rows), (out_features, in_features, 1)
        geometry = ConvGeometry.from_call(*shapes, (1,), (0,), (1,), 1)
        layout = Layout((1, out_features, rows), (rows * out_features, 1, out_features), True)
        super().__init__(geometry, layout, dtype, tf32=tf32)

    def image(self, x: Tensor) -> Tensor:
        """``[..., K]`` as ``[1, K, rows]`` with the features innermost."""
        return x.reshape(-1, x.shape[-1]).t()[None]

    def result(self, y: Tensor, x: Tensor) -> Tensor:
        return y[0].t().reshape(*x.shape[:-1], self.geometry.out_channels)
