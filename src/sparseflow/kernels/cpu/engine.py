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

Where a weight has all-zero blocks of 16 x 16 channels, ``conv_variants(..., share)`` also proposes the structure
``blocks``: :func:`pack_blocks` keeps the other blocks only, and :func:`conv` and :func:`linear` skip what is not there.

This module knows nothing of ``nn.Module`` and never decides whether sparse is worthwhile.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseflow.kernels.geometry import ConvGeometry
from sparseflow.kernels.weight_blocks import BLOCK, in_blocks, present_blocks

from . import loader
from .records import DTYPES, WORD, ConvStruct, LinearStruct, ScanStruct, Structure, Variant
from .schedule import conv_supported, conv_variants, linear_variants, resolve

__all__ = [
    "BlockWeight",
    "ConvGeometry",
    "Prescan",
    "Variant",
    "available",
    "conv",
    "conv_supported",
    "conv_variants",
    "isa",
    "linear",
    "linear_variants",
    "pack_blocks",
    "pack_conv_weight",
    "pack_linear_weight",
    "prescan_conv",
    "prescan_linear",
    "reason",
    "select_isa",
    "weights_match",
]

_SAMPLES = 32  # elements that weights_match compares
# Elements of input plus additions below which waking other threads costs more than it saves (about 10 us).
MIN_PARALLEL_WORK = 1 << 18

# ---- availability --------------------------------------------------------------------------------------------------

_load_lock = threading.Lock()


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    try:
        return loader.load(), ""
    except loader.EngineUnavailableError as error:
        return None, str(error)


def library() -> ctypes.CDLL:
    """The loaded engine. Raises :class:`~sparseflow.kernels.cpu.loader.EngineUnavailableError` without one."""
    loaded = _load()[0]
    if loaded is None:
        raise loader.EngineUnavailableError(reason())
    return loaded


def available() -> bool:
    """True if the native engine can be used on this machine. Compiles it if that is still to be done."""
    with _load_lock:
        return _load()[0] is not None


def reason() -> str:
    """Why the engine is not available; empty if it is."""
    with _load_lock:
        return _load()[1]


def isa() -> str:
    """The instruction set in use: ``avx512vbmi``, ``avx512``, ``avx2`` or ``portable``; empty without an engine."""
    return library().sf_isa().decode() if available() else ""


def select_isa(name: str) -> str:
    """Use another instruction set in the whole process; ``""`` means what the environment asked for. Returns it.

    Raises :class:`~sparseflow.kernels.cpu.loader.EngineUnavailableError` if the processor does not have it.
    """
    return loader.select(library(), name or os.environ.get("SPARSEFLOW_ISA", ""))


# ---- stage 1 -------------------------------------------------------------------------------------------------------


class Prescan(NamedTuple):
    """What one pass over a layer's input found. A word is 64 channels (or features) of one pixel (or row)."""

    nonzero: int
    numel: int
    occupied: int
    words: int
    binary: bool
    bits: Tensor  # int64: one bit per element, then one int32 count of events per row
    source: Tensor  # the input as it was read: x itself, or a contiguous copy
    channels_last: bool

    @property
    def density(self) -> float:
        """nonzero / numel, in 0..1."""
        return self.nonzero / self.numel if self.numel else 0.0

    @property
    def occupancy(self) -> float:
        """Share of words with at least one event, in 0..1."""
        return self.occupied / self.words if self.words else 0.0


def prescan_conv(x: Tensor, geometry: ConvGeometry) -> Prescan:
    """Pack the events of ``x [N, C, *size]`` to bits and count them, in one pass.

    Contiguous and channels_last ``x`` are read in place; any other layout is copied first.
    """
    channels_last = _is_channels_last(x)
    if not channels_last:
        x = x.contiguous()
    structs: dict[Any, Any] = geometry._structs  # type: ignore[attr-defined]
    cached = structs.get((x.dtype, channels_last))
    if cached is None:
        g = geometry
        struct = ScanStruct(g.batch, g.in_channels, g.in_pixels, g.in_size[2], DTYPES[x.dtype], channels_last)
        words = g.batch * g.in_pixels * -(-g.in_channels // WORD)
        cached = ctypes.byref(struct), words, g.batch * g.in_size[0] * g.in_size[1]
        structs[x.dtype, channels_last] = cached
    return _prescan(x, cached, channels_last)


def prescan_linear(x2d: Tensor) -> Prescan:
    """Pack the events of ``x [rows, in_features]`` to bits and count them, in one pass."""
    x2d = x2d.contiguous()
    return _prescan(x2d, _linear_scan(*x2d.shape, x2d.dtype), True)


def _prescan(x: Tensor, cached: tuple[Any, int, int], channels_last: bool) -> Prescan:
    struct, words, rows = cached
    bits = torch.empty(words + (rows + 1) // 2, dtype=torch.int64)
    counts = (ctypes.c_int64 * 3)()
    numel = x.numel()
    pointer = bits.data_ptr()
    library().sf_prescan(struct, x.data_ptr(), pointer, pointer + 8 * words, counts, threads_for(numel))
    nonzero, occupied, binary = counts
    return Prescan(nonzero, numel, occupied, words, binary != 0, bits, x, channels_last)


# ---- weights -------------------------------------------------------------------------------------------------------


class BlockWeight(NamedTuple):
    """The blocks of a weight that hold anything, as :func:`pack_blocks` or :func:`pack_block_rows` orders them.

    Of the former, ``values`` is ``[blocks, 16 inputs, 16 outputs]``. ``places`` (int32) has the place in ``values`` of
    every block there could be, or -1; then for every 16 outputs where their blocks begin, and an end; then for every
    block in ``values`` its ``input block << 16 | tap``.
    """

    values: Tensor
    places: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """That of the weight."""
        return self.values.dtype


Packed = Tensor | BlockWeight


def pack_weight(weight: Tensor, groups: int, variant: Variant) -> Packed:
    """``weight [O, C / groups, *kernel]`` as the kernels of ``variant`` read it."""
    if variant.structure == Structure.BLOCK_ROWS:
        return pack_block_rows(weight)
    if variant.structure == Structure.BLOCKS:
        return pack_blocks(weight)
    return pack_conv_weight(weight, groups, variant)


def pack_block_rows(weight: Tensor) -> BlockWeight:
    """What is left of the rows of ``weight [O, C]`` without its zero blocks.

    ``values`` is ``[16, blocks, 16 outputs]`` for every 16 inputs, one after the other, in one dimension. ``places``
    has where their blocks begin, and an end; then for every block which 16 outputs it is of.

    >>> weight = torch.zeros(32, 16)
    >>> weight[20, 3] = 1.0
    >>> pack_block_rows(weight).places.tolist()
    [0, 1, 1]
    """
    present = present_blocks(weight, BLOCK)[..., 0]
    blocks = in_blocks(weight, BLOCK)[..., 0].permute(2, 3, 0, 1)  # [inputs, 16, outputs, 16]
    values = [block[:, kept].flatten() for block, kept in zip(blocks, present.t(), strict=True)]
    starts = torch.nn.functional.pad(present.sum(0).cumsum(0), (1, 0))
    return BlockWeight(torch.cat(values), torch.cat([starts, present.t().nonzero()[:, 1]]).int())


def pack_blocks(weight: Tensor) -> BlockWeight:
    """The blocks of ``weight [O, C, *kernel]`` that are not all zero.

    >>> weight = torch.zeros(32, 16)
    >>> weight[20, 3] = 1.0
    >>> pack_blocks(weight).values.shape, pack_blocks(weight).places.tolist()
    (torch.Size([1, 16, 16]), [-1, 0, 0, 0, 1, 0])
    """
    present = present_blocks(weight, BLOCK)
    values = in_blocks(weight, BLOCK).permute(0, 2, 4, 3, 1)[present].contiguous()
    places = (present.flatten().cumsum(0) - 1).masked_fill(~present.flatten(), -1)
    starts = torch.nn.functional.pad(present.sum((1, 2)).cumsum(0), (1, 0))
    _, inputs, taps = present.nonzero().unbind(1)
    return BlockWeight(values, torch.cat([places, starts, inputs << 16 | taps]).int())


def pack_conv_weight(weight: Tensor, groups: int, variant: Variant) -> Tensor:
    """``weight [O, C / groups, *kernel]`` (any strides) in the order the kernels read it.

    One-dimensional, of the weight's dtype; not larger than the weight, except that the output channels of each group
    are padded to a multiple of ``variant.block``.
    """
    weight = weight.detach()
    size, stride = _five_dims(weight.shape, weight.stride())
    groups = 1 if variant.structure == Structure.DEPTHWISE else groups
    outputs = -(-weight.shape[0] // groups // variant.block) * variant.block * groups
    packed = torch.empty(outputs * weight[0].numel() if outputs else 0, dtype=weight.dtype)
    where = weight.data_ptr(), size, stride, groups, variant.block, DTYPES[weight.dtype], packed.data_ptr()
    library().sf_pack(*where, threads_for(packed.numel()))
    return packed


def pack_linear_weight(weight: Tensor, variant: Variant) -> Tensor:
    """``weight [out_features, in_features]`` in the order the kernels read it; see :func:`pack_conv_weight`."""
    return pack_conv_weight(weight, 1, variant)


def weights_match(weight: Tensor, packed: Packed, groups: int, variant: Variant, offset: int) -> bool:
    """Compare 32 elements of ``weight``, spread over all of it, with their packed copies. Takes microseconds.

    ``offset`` moves the places looked at, so that repeated calls find any in-place change (one that did not raise
    the tensor's version counter, such as a write through ``.data``) sooner or later. ``groups`` is 1 for linear.
    """
    size, stride = _five_dims(weight.shape, weight.stride())
    groups = 1 if variant.structure == Structure.DEPTHWISE else groups
    where = weight.data_ptr(), size, stride, groups, variant.block, DTYPES[weight.dtype], *addresses(packed)
    return library().sf_match(*where, offset, _SAMPLES) != 0


# ---- stage 2 -------------------------------------------------------------------------------------------------------


def conv(
    x: Tensor,
    scan: Prescan,
    packed: Packed,
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
        out = _empty_output(x.dim(), packed.dtype, geometry, channels_last)
    if out.numel() == 0:
        return out
    fixed = resolve(variant, geometry, packed.dtype, scan.density)
    struct = conv_struct(geometry, fixed, packed.dtype, scan.channels_last, channels_last)
    work = scan.nonzero * geometry.taps * (geometry.out_channels // geometry.groups) + out.numel()
    _compute(library().sf_conv, struct, scan, addresses(packed), bias, out, work)
    return out


def linear(
    x2d: Tensor, scan: Prescan, packed: Packed, bias: Tensor | None, variant: Variant, out: Tensor | None = None
) -> Tensor:
    """``x [rows, in_features]`` times weights packed for ``variant``: ``[rows, out_features]``.

    ``out_features`` is taken from ``out`` or ``bias`` if given, else from the packed weights (then it includes the
    padding to ``variant.block``; packed blocks do not say it).
    """
    rows, features = x2d.shape
    if out is None:
        assert bias is not None or isinstance(packed, Tensor), "packed blocks do not say how many outputs there are"
        outputs = bias.numel() if bias is not None else packed.numel() // features  # type: ignore[union-attr]
        out = torch.empty(rows, outputs, dtype=packed.dtype)
    if out.numel() == 0:
        return out
    outputs = out.shape[1]
    work = scan.nonzero * outputs + out.numel()
    if variant.structure in (Structure.ROWS, Structure.BLOCK_ROWS):
        struct = _linear_struct(rows, features, outputs, variant, packed.dtype)
        _compute(library().sf_linear, struct, scan, addresses(packed), bias, out, work)
    else:
        geometry = _linear_geometry(rows, features, outputs)
        fixed = resolve(variant, geometry, packed.dtype, scan.density)
        struct = conv_struct(geometry, fixed, packed.dtype, True, True)
        _compute(library().sf_conv, struct, scan, addresses(packed), bias, out, work)
    return out


def _compute(
    function: Any, struct: Any, scan: Prescan, weights: tuple[Any, ...], bias: Tensor | None, out: Tensor, work: int
) -> None:
    bits = scan.bits.data_ptr()
    if bias is not None:
        bias = bias.detach().to(out.dtype).contiguous()
    status = function(
        struct,
        scan.source.data_ptr(),
        bits,
        bits + 8 * scan.words,
        *weights,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        not scan.binary,
        threads_for(work),
    )
    if status != 0:
        raise MemoryError("the native engine could not allocate its workspace")


def addresses(packed: Packed) -> tuple[int, int | None]:
    """Where the values of a packed weight lie, and the index of one in blocks."""
    return (packed.data_ptr(), None) if isinstance(packed, Tensor) else tuple(part.data_ptr() for part in packed)  # type: ignore[return-value]


def threads_for(work: int) -> int:
    """Threads worth waking for this many additions."""
    return torch.get_num_threads() if work >= MIN_PARALLEL_WORK else 1


# ---- layouts and parameter structures ------------------------------------------------------------------------------


def _is_channels_last(x: Tensor) -> bool:
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        return x.is_contiguous(memory_format=torch.channels_last_3d)
    return x.transpose(1, 2).is_contiguous()


def _empty_output(dims: int, dtype: torch.dtype, geometry: ConvGeometry, channels_last: bool) -> Tensor:
    shape = (geometry.batch, geometry.out_channels, *geometry.out_size[5 - dims :])
    if not channels_last:
        return torch.empty(shape, dtype=dtype)
    if dims == 3:
        return torch.empty((shape[0], shape[2], shape[1]), dtype=dtype).transpose(1, 2)
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last if dims == 4 else torch.channels_last_3d)


@functools.lru_cache(maxsize=4096)
def _five_dims(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Any, Any]:
    """Sizes and strides of a weight as [O, C, KD, KH, KW]."""
    ones, zeros = [1] * (5 - len(shape)), [0] * (5 - len(shape))
    five = ctypes.c_int64 * 5
    return five(*shape[:2], *ones, *shape[2:]), five(*strides[:2], *zeros, *strides[2:])


def run_links(links: Any, n: int) -> int:
    """Run up to ``n`` blocks from an array of ``SfLink``; returns how many ran. See :mod:`.chain`."""
    ran = library().sf_chain(links, n, torch.get_num_threads(), MIN_PARALLEL_WORK)
    if ran < 0:
        raise MemoryError("the native engine could not allocate its workspace")
    return ran


def conv_struct(
    geometry: ConvGeometry, variant: Variant, dtype: torch.dtype, x_channels_last: bool, out_channels_last: bool
) -> Any:
    """Reference to the ``SfConv`` of a fixed variant, made once a geometry."""
    structs: dict[Any, Any] = geometry._structs  # type: ignore[attr-defined]
    key = (variant, dtype, x_channels_last, out_channels_last)
    struct = structs.get(key)
    if struct is None:
        g, three = geometry, ctypes.c_int64 * 3
        pairs = g.kernel[0] * g.kernel[1] * -(-g.group_channels // WORD)
        struct = structs[key] = ctypes.byref(
            ConvStruct(
                *(g.batch, g.in_channels, g.out_channels, g.groups),
                *(three(*v) for v in (g.in_size, g.kernel, g.stride, g.padding, g.dilation, g.out_size)),
                *(variant.block, variant.width, variant.slab or pairs, variant.tile),
                *(DTYPES[dtype], x_channels_last, out_channels_last, variant.structure == Structure.OUTPUTS),
            )
        )
    return struct


@functools.lru_cache(maxsize=4096)
def _linear_scan(rows: int, features: int, dtype: torch.dtype) -> tuple[Any, int, int]:
    struct = ScanStruct(rows, features, 1, 1, DTYPES[dtype], True)
    return ctypes.byref(struct), rows * -(-features // WORD), rows


@functools.lru_cache(maxsize=4096)
def _linear_struct(rows: int, features: int, outputs: int, variant: Variant, dtype: torch.dtype) -> Any:
    slab = variant.slab or -(-features // WORD)
    return ctypes.byref(LinearStruct(rows, features, outputs, variant.block, slab, DTYPES[dtype]))


@functools.lru_cache(maxsize=4096)
def _linear_geometry(rows: int, features: int, outputs: int) -> ConvGeometry:
    ones = (1, 1, 1)
    return ConvGeometry(rows, features, outputs, 1, ones, ones, ones, (0, 0, 0), ones, ones)
