"""The native CPU engine: prescan (stage 1) and event-driven convolution and linear layers (stage 2).

A call goes through three steps, each usable on its own::

    geometry = ConvGeometry.from_call(x.shape, weight.shape, stride, padding, dilation, groups)
    variant = conv_variants(geometry, x.dtype)[0]
    packed = pack_conv_weight(weight, groups, variant)         # once per weight
    scan = prescan_conv(x, geometry)                           # bits, counts: decide here
    y = conv(x, scan, packed, bias, geometry, variant, channels_last=False)

An element is an event when ``x != 0`` (NaN is one, -0.0 is not). Binary input (every event exactly 1) is summed with
additions only; any other values are multiplied in, so the result is exact for every input. Sums are kept in float32
(float64 for float64 input) and rounded once. Results do not depend on the number of threads.

This module knows nothing of ``nn.Module`` and never decides whether sparse is worthwhile.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import re
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import loader

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_DEPTHWISE, _PIXELS, _OUTPUTS, _ROWS = "depthwise", "pixels", "outputs", "rows"
_MAX_OFFSET = 2**32  # weight rows are addressed by 32-bit byte offsets

Padding = int | tuple[int, int]


# ---- availability --------------------------------------------------------------------------------------------------


@functools.cache
def _state() -> tuple[ctypes.CDLL | None, str]:
    try:
        return loader.load(), ""
    except loader.EngineUnavailableError as error:
        return None, str(error)


_state_lock = threading.Lock()


def _library() -> ctypes.CDLL:
    library = _state()[0]
    if library is None:
        raise RuntimeError(reason())
    return library


def available() -> bool:
    """True if the native engine can be used on this machine. Compiles it if that is still to be done."""
    with _state_lock:
        return _state()[0] is not None


def reason() -> str:
    """Why the engine is not available; empty if it is."""
    with _state_lock:
        return _state()[1]


def isa() -> str:
    """The instruction set in use: ``"avx512"``, ``"avx2"`` or ``"portable"``; empty without an engine."""
    return select_isa(_selected_isa) if available() else ""


_selected_isa = ""


def select_isa(name: str) -> str:
    """Use another instruction set from now on, in the whole process; ``""`` means what the environment asked for.

    Raises :class:`~sparseflow.kernels.cpu.loader.EngineUnavailableError` if the processor does not have it.
    """
    global _selected_isa
    import os

    chosen = loader.select(_library(), name or os.environ.get("SPARSEFLOW_ISA", ""))
    _selected_isa = name
    return chosen


# ---- records -------------------------------------------------------------------------------------------------------


class _ConvStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "in_channels", "out_channels", "groups")),
        *((name, ctypes.c_int64 * 3) for name in ("in_size", "kernel", "stride", "padding", "dilation", "out_size")),
        *((name, ctypes.c_int64) for name in ("block", "width", "slab", "tile")),
        *((name, ctypes.c_int32) for name in ("type", "x_channels_last", "out_channels_last", "split_outputs")),
    ]


class _ScanStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels", "pixels", "row_pixels")),
        *((name, ctypes.c_int32) for name in ("type", "channels_last")),
    ]


class _LinearStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "in_features", "out_features", "block", "slab")),
        ("type", ctypes.c_int32),
    ]


@dataclasses.dataclass(frozen=True)
class ConvGeometry:
    """Sizes of one convolution call, always with three spatial dimensions (1-d and 2-d have leading ones).

    ``padding`` is the padding before each dimension; what follows the data is implied by ``out_size``.
    """

    batch: int
    in_channels: int
    out_channels: int
    groups: int
    in_size: tuple[int, int, int]
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    dilation: tuple[int, int, int]
    out_size: tuple[int, int, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_structs", {})

    def __reduce__(self) -> tuple[type[ConvGeometry], tuple[object, ...]]:
        return ConvGeometry, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @classmethod
    def from_call(
        cls,
        x_shape: Sequence[int],
        weight_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[Padding],
        dilation: Sequence[int],
        groups: int,
    ) -> ConvGeometry:
        """Geometry of ``conv(x [N, C, *size], weight [O, C / groups, *kernel])`` in 1, 2 or 3 dimensions.

        ``padding`` holds, per dimension, a number or a ``(before, after)`` pair. Raises ``ValueError`` where PyTorch
        would raise too.

        >>> ConvGeometry.from_call((4, 64, 56, 56), (64, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1).out_size
        (1, 56, 56)
        """
        dims = len(x_shape) - 2
        if not 1 <= dims <= 3 or len(weight_shape) != dims + 2:
            raise ValueError(
                f"expected [N, C, *size] with 1 to 3 dimensions, got {tuple(x_shape)}, {tuple(weight_shape)}"
            )
        if x_shape[1] != weight_shape[1] * groups or weight_shape[0] % groups:
            raise ValueError(f"{x_shape[1]} channels do not fit weight {tuple(weight_shape)} with groups={groups}")
        before = [p if isinstance(p, int) else p[0] for p in padding]
        after = [p if isinstance(p, int) else p[1] for p in padding]
        out_size = [
            (size + b + a - d * (k - 1) - 1) // s + 1
            for size, k, s, b, a, d in zip(x_shape[2:], weight_shape[2:], stride, before, after, dilation, strict=True)
        ]
        if min(out_size) < 1:
            raise ValueError(f"kernel {tuple(weight_shape[2:])} does not fit input {tuple(x_shape[2:])}")

        def three(values: Sequence[int], fill: int) -> tuple[int, int, int]:
            padded = (*[fill] * (3 - dims), *values)
            return padded[0], padded[1], padded[2]

        return cls(
            batch=x_shape[0],
            in_channels=x_shape[1],
            out_channels=weight_shape[0],
            groups=groups,
            in_size=three(x_shape[2:], 1),
            kernel=three(weight_shape[2:], 1),
            stride=three(stride, 1),
            padding=three(before, 0),
            dilation=three(dilation, 1),
            out_size=three(out_size, 1),
        )

    @property
    def depthwise(self) -> bool:
        """One filter per channel."""
        return self.groups > 1 and self.groups == self.in_channels == self.out_channels

    @property
    def out_pixels(self) -> int:
        """Output pixels of one image."""
        return math.prod(self.out_size)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run a layer. ``block`` decides how weights are packed, the rest how they are walked.

    ``structure``: threads share the output ``pixels`` or the ``outputs`` (channels); ``depthwise``; or, for linear
    layers, whole weight ``rows`` are streamed. ``block``: output channels side by side in a packed row. ``width``:
    output channels per walk over the events. ``slab``: (kernel row, 64-channel word) pairs per walk, 0 for all.
    ``tile``: output pixels per tile.
    """

    structure: str
    block: int
    width: int
    slab: int
    tile: int

    @property
    def name(self) -> str:
        """Stable text form; :meth:`from_name` reads it back.

        >>> Variant.from_name("pixels-b64-w64-s0-t112").block
        64
        """
        return f"{self.structure}-b{self.block}-w{self.width}-s{self.slab}-t{self.tile}"

    @classmethod
    def from_name(cls, name: str) -> Variant:
        """The variant called ``name``. Raises ``ValueError`` if it is no variant's name."""
        match = re.fullmatch(r"(depthwise|pixels|outputs|rows)-b(\d+)-w(\d+)-s(\d+)-t(\d+)", name)
        if match is None:
            raise ValueError(f"not a kernel variant: {name!r}")
        block, width, slab, tile = (int(group) for group in match.groups()[1:])
        return cls(match.group(1), block, width, slab, tile)


class Prescan(NamedTuple):
    """What one pass over a layer's input found. A word is 64 channels (or features) of one pixel (or row)."""

    nonzero: int
    numel: int
    occupied: int
    words: int
    binary: bool
    bits: Tensor
    row_counts: Tensor
    source: Tensor
    channels_last: bool

    @property
    def density(self) -> float:
        """nonzero / numel, in 0..1."""
        return self.nonzero / self.numel if self.numel else 0.0

    @property
    def occupancy(self) -> float:
        """Share of words with at least one event, in 0..1."""
        return self.occupied / self.words if self.words else 0.0


# ---- convolution ---------------------------------------------------------------------------------------------------


def conv_supported(geometry: ConvGeometry, dtype: torch.dtype) -> str | None:
    """``None`` if the engine covers the convolution, else one line that says why not."""
    if dtype not in _DTYPES:
        return f"{dtype} is not float32, bfloat16, float16 or float64"
    group_channels = geometry.in_channels // geometry.groups
    taps = math.prod(geometry.kernel)
    columns = _MAX_TILE * geometry.stride[2] + geometry.kernel[2] * geometry.dilation[2]
    if (taps + columns) * group_channels * 64 * dtype.itemsize >= _MAX_OFFSET:
        return "the weights of one output block exceed 4 GiB"
    return None


_MAX_TILE = 256


def conv_variants(geometry: ConvGeometry, dtype: torch.dtype) -> tuple[Variant, ...]:
    """Variants worth measuring for a convolution, best guess first."""
    del dtype
    if geometry.depthwise:
        return (Variant(_DEPTHWISE, 64, 64, 0, 112),)
    return (Variant(_PIXELS, 64, 64, 0, 112), Variant(_PIXELS, 32, 32, 0, 112))


def pack_conv_weight(weight: Tensor, groups: int, variant: Variant) -> Tensor:
    """``weight [O, C / groups, *kernel]`` (any strides) in the order the kernels read it.

    One-dimensional, of the weight's dtype; not larger than the weight, except that the output channels of each group
    are padded to a multiple of ``variant.block``.
    """
    weight = weight.detach()
    size, stride = _five_dims(weight)
    pack_groups = 1 if variant.structure == _DEPTHWISE else groups
    outputs = -(-weight.shape[0] // pack_groups // variant.block) * variant.block * pack_groups
    packed = torch.empty(outputs * math.prod(weight.shape[1:]), dtype=weight.dtype)
    _library().sf_pack(
        weight.data_ptr(),
        size,
        stride,
        pack_groups,
        variant.block,
        weight.element_size(),
        packed.data_ptr(),
        torch.get_num_threads(),
    )
    return packed


def weights_match(weight: Tensor, packed: Tensor, groups: int, variant: Variant, offset: int) -> bool:
    """Compare 32 elements of ``weight``, spread over all of it, with their packed copies. Takes microseconds.

    ``offset`` moves the places looked at, so that repeated calls find any in-place change (one that did not raise
    the tensor's version counter, such as a write through ``.data``) sooner or later.
    """
    size, stride = _five_dims(weight)
    pack_groups = 1 if variant.structure == _DEPTHWISE else groups
    return bool(
        _library().sf_match(
            weight.data_ptr(),
            size,
            stride,
            pack_groups,
            variant.block,
            weight.element_size(),
            packed.data_ptr(),
            offset,
            32,
        )
    )


def prescan_conv(x: Tensor, geometry: ConvGeometry) -> Prescan:
    """Pack the events of ``x [N, C, *size]`` to bits and count them, in one pass.

    Contiguous and channels_last ``x`` are read in place; any other layout is copied first.
    """
    channels_last = _is_channels_last(x)
    if not channels_last and not x.is_contiguous():
        x = x.contiguous()
    struct = _scan_struct(geometry, x.dtype, channels_last)
    pixels = geometry.batch * math.prod(geometry.in_size)
    words = pixels * -(-geometry.in_channels // 64)
    return _prescan(x, struct, words, geometry.batch * geometry.in_size[0] * geometry.in_size[1], channels_last)


def conv(
    x: Tensor,
    scan: Prescan,
    packed: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    variant: Variant,
    *,
    channels_last: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Convolution of ``x [N, C, *size]``, of which ``scan`` is the prescan, with weights packed for ``variant``.

    Returns ``[N, O, *out_size]``, contiguous or (``channels_last=True``) channels last; ``out``, if given, must have
    that shape, dtype and layout. Every element of the output is written exactly once.
    """
    if out is None:
        out = _empty_output(x, geometry, channels_last)
    if out.numel() == 0:
        return out
    struct = _conv_struct(geometry, variant, packed.dtype, scan.channels_last, channels_last)
    _library().sf_conv(
        ctypes.byref(struct),
        scan.source.data_ptr(),
        scan.bits.data_ptr(),
        scan.row_counts.data_ptr(),
        packed.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        not scan.binary,
        torch.get_num_threads(),
    )
    return out


# ---- linear --------------------------------------------------------------------------------------------------------


def linear_variants(rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> tuple[Variant, ...]:
    """Variants worth measuring for ``[rows, in_features] x [out_features, in_features]``, best guess first."""
    del in_features, dtype
    wide = min(512, -(-out_features // 64) * 64)
    stream, tiled = Variant(_ROWS, wide, wide, 4, 1), Variant(_OUTPUTS, 64, 64, 2, 64)
    return (stream, tiled) if rows <= 4 else (tiled, stream)


def pack_linear_weight(weight: Tensor, variant: Variant) -> Tensor:
    """``weight [out_features, in_features]`` in the order the kernels read it; see :func:`pack_conv_weight`."""
    return pack_conv_weight(weight, 1, variant)


def prescan_linear(x2d: Tensor) -> Prescan:
    """Pack the events of ``x [rows, in_features]`` to bits and count them, in one pass."""
    x2d = x2d.contiguous()
    rows, features = x2d.shape
    struct = _linear_scan_struct(rows, features, x2d.dtype)
    return _prescan(x2d, struct, rows * -(-features // 64), rows, True)


def linear(
    x2d: Tensor, scan: Prescan, packed: Tensor, bias: Tensor | None, variant: Variant, out: Tensor | None = None
) -> Tensor:
    """``x [rows, in_features]`` times weights packed for ``variant``: ``[rows, out_features]``.

    ``out_features`` is taken from ``out`` or ``bias`` if given, else from the packed weights.
    """
    rows, features = x2d.shape
    if out is None:
        outputs = packed.numel() // features if bias is None else bias.numel()
        out = torch.empty(rows, outputs, dtype=x2d.dtype)
    if out.numel() == 0:
        return out
    struct = _linear_struct(rows, features, out.shape[1], variant, packed.dtype)
    library = _library()
    call = library.sf_linear if variant.structure == _ROWS else library.sf_conv
    call(
        ctypes.byref(struct),
        scan.source.data_ptr(),
        scan.bits.data_ptr(),
        scan.row_counts.data_ptr(),
        packed.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        not scan.binary,
        torch.get_num_threads(),
    )
    return out


# ---- shared --------------------------------------------------------------------------------------------------------


def _prescan(x: Tensor, struct: _ScanStruct, words: int, rows: int, channels_last: bool) -> Prescan:
    bits = torch.empty(words, dtype=torch.int64)
    row_counts = torch.empty(rows, dtype=torch.int32)
    counts = (ctypes.c_int64 * 3)()
    _library().sf_prescan(
        ctypes.byref(struct), x.data_ptr(), bits.data_ptr(), row_counts.data_ptr(), counts, torch.get_num_threads()
    )
    nonzero, occupied, binary = counts
    return Prescan(nonzero, x.numel(), occupied, words, bool(binary), bits, row_counts, x, channels_last)


def _is_channels_last(x: Tensor) -> bool:
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        return x.is_contiguous(memory_format=torch.channels_last_3d)
    return x.transpose(1, 2).is_contiguous()


def _empty_output(x: Tensor, geometry: ConvGeometry, channels_last: bool) -> Tensor:
    size = geometry.out_size[5 - x.dim() :]
    if not channels_last:
        return torch.empty((geometry.batch, geometry.out_channels, *size), dtype=x.dtype)
    dense = torch.empty((geometry.batch, *size, geometry.out_channels), dtype=x.dtype)
    return dense.movedim(-1, 1)


def _five_dims(weight: Tensor) -> tuple[ctypes.Array[ctypes.c_int64], ctypes.Array[ctypes.c_int64]]:
    """Sizes and strides of a weight as [O, C, KD, KH, KW]."""
    missing = 5 - weight.dim()
    size = (*weight.shape[:2], *[1] * missing, *weight.shape[2:])
    stride = (*weight.stride()[:2], *[0] * missing, *weight.stride()[2:])
    return (ctypes.c_int64 * 5)(*size), (ctypes.c_int64 * 5)(*stride)


def _scan_struct(geometry: ConvGeometry, dtype: torch.dtype, channels_last: bool) -> _ScanStruct:
    structs: dict[object, ctypes.Structure] = geometry._structs  # type: ignore[attr-defined]
    struct = structs.get((dtype, channels_last))
    if struct is None:
        pixels = math.prod(geometry.in_size)
        struct = _ScanStruct(
            geometry.batch, geometry.in_channels, pixels, geometry.in_size[2], _DTYPES[dtype], channels_last
        )
        structs[dtype, channels_last] = struct
    return struct  # type: ignore[return-value]


def _conv_struct(
    geometry: ConvGeometry, variant: Variant, dtype: torch.dtype, x_channels_last: bool, out_channels_last: bool
) -> _ConvStruct:
    structs: dict[object, ctypes.Structure] = geometry._structs  # type: ignore[attr-defined]
    key = (variant, dtype, x_channels_last, out_channels_last)
    struct = structs.get(key)
    if struct is None:
        three = ctypes.c_int64 * 3
        pairs = geometry.kernel[0] * geometry.kernel[1] * -(-geometry.in_channels // geometry.groups // 64)
        struct = structs[key] = _ConvStruct(
            *(geometry.batch, geometry.in_channels, geometry.out_channels, geometry.groups),
            *(three(*geometry.in_size), three(*geometry.kernel), three(*geometry.stride)),
            *(three(*geometry.padding), three(*geometry.dilation), three(*geometry.out_size)),
            *(variant.block, variant.width, variant.slab or pairs, variant.tile),
            *(_DTYPES[dtype], x_channels_last, out_channels_last, variant.structure == _OUTPUTS),
        )
    return struct  # type: ignore[return-value]


@functools.lru_cache(maxsize=1024)
def _linear_scan_struct(rows: int, features: int, dtype: torch.dtype) -> _ScanStruct:
    return _ScanStruct(rows, features, 1, 1, _DTYPES[dtype], True)


@functools.lru_cache(maxsize=1024)
def _linear_struct(
    rows: int, features: int, outputs: int, variant: Variant, dtype: torch.dtype
) -> _LinearStruct | _ConvStruct:
    if variant.structure == _ROWS:
        words = -(-features // 64)
        return _LinearStruct(rows, features, outputs, variant.block, variant.slab or words, _DTYPES[dtype])
    ones = (1, 1, 1)
    as_conv = ConvGeometry(rows, features, outputs, 1, ones, ones, ones, (0, 0, 0), ones, ones)
    return _conv_struct(as_conv, variant, dtype, True, True)
