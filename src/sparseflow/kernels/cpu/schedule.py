"""Which variants suit a layer, and how an adaptive variant walks the weights at a given density.

The numbers were measured on Zen 4 and Cascade Lake and are explained, with their figures, in ``docs/cpu-kernels.md``.
They cost time when wrong, never results; the dispatcher measures the variants anyway.
"""

from __future__ import annotations

import torch

from sparseflow.kernels.geometry import ConvGeometry
from sparseflow.kernels.weight_blocks import BLOCK

from .records import DTYPES, WORD, Structure, Variant

_TILE, _SLAB_TILE = 112, 400  # output pixels per tile; more where weights stay and pixels pass by
_MAX_OFFSET = 2**32  # weight rows are addressed by 32-bit byte offsets
_SHARED_WEIGHT_BYTES = 4 << 20  # weights from which on each thread had better keep to its own part of them
_SLAB_BYTES = 48 << 10  # weights that one walk keeps close to the core; most of them hit L1
# Events per walk below which the cost of starting a walk outweighs the L1 hits; twice as many where all weights of a
# pass are not much larger than a slab.
_MIN_SLAB_EVENTS = 24
# The same where threads keep to their own outputs: weights are large there, and a slab is what stays in L2.
_SHARED_SLAB_BYTES, _MIN_SHARED_SLAB_EVENTS = 192 << 10, 96
# Weights of a pass that do not stay in L2 from one output row to the next. There a slab saves reads from behind L2, and
# is worth it from this many a walk.
_L2_BYTES, _MIN_SAVED_READS = 768 << 10, 12
_BLOCK_TILES = (112, 400)  # output pixels of a tile whose sums, of 16 channels, stay in L1
_FEW_ROWS = 8  # of a linear layer's input: up to it, few of them share a weight row
_SPARSE_SHARE = 0.5  # of weight blocks: up to it, skipping the others is the best guess
_MAX_KEY = 1 << 15  # taps, and blocks of input channels, that an index can tell apart
_MAX_PLACES = 1 << 14  # pixels that an entry can tell apart
_WIDE_DENSITY = 0.04  # below it walks are short, and one wide walk beats two narrow ones


def conv_supported(geometry: ConvGeometry, dtype: torch.dtype) -> str | None:
    """``None`` if the engine covers the convolution, else one line that says why not."""
    if dtype not in DTYPES:
        return f"{dtype} is not float32, bfloat16, float16 or float64"
    columns = min(geometry.out_size[2], _SLAB_TILE) * geometry.stride[2] + 2 * geometry.kernel[2] * geometry.dilation[2]
    rows = geometry.taps * geometry.group_channels + columns
    if rows * 128 * dtype.itemsize >= _MAX_OFFSET:
        return "the weights of one output block exceed 4 GiB"
    return None


def conv_variants(geometry: ConvGeometry, dtype: torch.dtype, share: float = 1.0) -> tuple[Variant, ...]:
    """Variants worth measuring for a convolution, best guess first. ``share``: of weight blocks that are not zero."""
    full = _full_conv_variants(geometry, dtype)
    return with_blocks(full, block_variants(geometry, share), share)


def block_variants(geometry: ConvGeometry, share: float) -> tuple[Variant, ...]:
    """Variants that skip zero blocks of the weight; none where there are none to skip."""
    if share >= 1.0 or geometry.groups > 1 or geometry.taps >= _MAX_KEY or geometry.in_channels >= _MAX_KEY * BLOCK[1]:
        return ()
    return tuple(_blocks(tile) for tile in _BLOCK_TILES if _places(geometry, tile) < _MAX_PLACES)


def with_blocks(full: tuple[Variant, ...], blocks: tuple[Variant, ...], share: float) -> tuple[Variant, ...]:
    """Both together; those that skip blocks first where there is much to skip."""
    return blocks + full if share <= _SPARSE_SHARE else full + blocks


def _blocks(tile: int) -> Variant:
    return Variant(Structure.BLOCKS, BLOCK[0], BLOCK[0], 0, tile)


def _places(geometry: ConvGeometry, tile: int) -> int:
    """At most, pixels between two events of a tile, gaps and halo included."""
    reach = [
        -(-d * (k - 1) // s) + 1 for k, s, d in zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)
    ]
    columns = min(geometry.out_size[2], tile)
    return (tile // columns + reach[1]) * (columns + reach[2])


def _full_conv_variants(geometry: ConvGeometry, dtype: torch.dtype) -> tuple[Variant, ...]:
    if geometry.depthwise:
        return (Variant(Structure.DEPTHWISE, 64, 64, 0, _TILE),)
    outputs = geometry.out_channels // geometry.groups
    weight_bytes = geometry.out_channels * geometry.group_channels * geometry.taps * dtype.itemsize
    if outputs <= 16 and dtype is not torch.bfloat16:  # bfloat16 rows come in blocks of at least 32 channels
        return (Variant(Structure.PIXELS, 16),)
    if outputs <= 32:
        return (Variant(Structure.PIXELS, 32),)
    pixels, shared = Variant(Structure.PIXELS, 32), Variant(Structure.OUTPUTS, 64)
    if weight_bytes > _SHARED_WEIGHT_BYTES:
        return (pixels, shared, Variant(Structure.PIXELS, 64))
    return (pixels, Variant(Structure.PIXELS, 64))


def linear_variants(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype, share: float = 1.0
) -> tuple[Variant, ...]:
    """Variants worth measuring for ``[rows, in_features] x [out_features, in_features]``, best guess first.

    ``share``: of weight blocks that are not zero.
    """
    full = _full_linear_variants(rows, in_features, out_features, dtype)
    if share >= 1.0 or in_features >= _MAX_KEY * BLOCK[1]:
        return full
    stream, tiled = Variant(Structure.BLOCK_ROWS, 1, 1), tuple(map(_blocks, _BLOCK_TILES))
    return with_blocks(full, (stream, *tiled) if rows <= _FEW_ROWS else (*tiled, stream), share)


def _full_linear_variants(rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> tuple[Variant, ...]:
    longest = min(_MAX_OFFSET // (in_features * dtype.itemsize) // 2, -(-out_features // 64) * 64)
    stream = Variant(Structure.ROWS, max(64, longest // 64 * 64), 1)
    shared = Variant(Structure.ROWS, min(512, stream.block), 1, 4)
    tiled = Variant(Structure.OUTPUTS, 64)
    return (stream, shared, tiled) if rows <= _FEW_ROWS else (shared, stream, tiled)


def resolve(variant: Variant, geometry: ConvGeometry, dtype: torch.dtype, density: float) -> Variant:
    """The fixed variant that an adaptive one (``width`` 0) stands for at this density."""
    if variant.width:
        return variant
    slab = _slab(variant, geometry, dtype, density)
    if slab:
        return Variant(variant.structure, variant.block, variant.block, slab, _SLAB_TILE)
    wide = density < _WIDE_DENSITY and variant.structure == Structure.PIXELS
    return Variant(variant.structure, variant.block, 128 if wide else variant.block, 0, _TILE)


def _slab(variant: Variant, geometry: ConvGeometry, dtype: torch.dtype, density: float) -> int:
    """Pairs of kernel row and word that a walk had better take at a time; 0 for all."""
    shared = variant.structure == Structure.OUTPUTS
    pair_rows = geometry.kernel[2] * min(WORD, geometry.group_channels)
    pair_bytes = pair_rows * variant.block * dtype.itemsize
    pairs = geometry.kernel[0] * geometry.kernel[1] * -(-geometry.group_channels // WORD)
    slab = max(1, (_SHARED_SLAB_BYTES if shared else _SLAB_BYTES) // pair_bytes)
    if slab >= pairs:
        return 0
    events = density * slab * pair_rows  # a walk
    if shared and pairs * pair_bytes > _L2_BYTES:
        reads = density * geometry.batch * geometry.out_pixels  # of each weight row
        worth = events * (1 - 1 / max(1, reads)) >= _MIN_SAVED_READS
    elif shared:
        worth = events >= _MIN_SHARED_SLAB_EVENTS
    else:
        small = pairs * pair_bytes <= 2 * _SLAB_BYTES
        worth = density >= _WIDE_DENSITY and events >= (2 if small else 1) * _MIN_SLAB_EVENTS
    return slab if worth else 0
