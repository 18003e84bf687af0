"""How a convolution of packed spikes is cut up: groups of whole words, tiles of pixels, runs of steps, variants."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

from torch import Tensor

from sparseflow.kernels.geometry import ConvGeometry

from ..tiles import Tiling
from ..weights import Packed, pack, padded_outputs
from .dynamics import WORD

_SIDES = {64: 8, 16: 4}  # outputs of a tile, and the side of Tiling.of_side
_MOST_WEIGHTS = 1 << 28  # elements of a weight whose groups have been merged: 1 GB in two parts of float16
_MOST_OFFSET = 1 << 31
_VALUES = 64  # accumulators and membranes of a thread: more of them spill


@dataclasses.dataclass(frozen=True)
class Variant:
    """One configuration of the convolution.

    ``pixels`` of a tile (64 or 16, or 4 in a row), ``steps`` that share a list and a product, ``channels``:
    active channels are listed one by one by a launch of their own, rather than in words; the rest is a program's
    output channels, warps and steps whose loads are under way at once.
    """

    pixels: int
    steps: int
    channels: bool
    block_n: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """Stable text form; :meth:`from_name` reads it back.

        >>> Variant(64, 4, False, 64, 8, 3).name
        'p64-t4-words-n64-w8-s3'
        """
        unit = "channels" if self.channels else "words"
        return f"p{self.pixels}-t{self.steps}-{unit}-n{self.block_n}-w{self.warps}-s{self.stages}"

    @property
    def membranes(self) -> int:
        """Membranes that a thread holds."""
        return self.pixels * self.block_n // (32 * self.warps)

    def with_currents(self) -> Variant:
        """The variant for neurons with a synaptic current beside the membrane: fewer outputs where these are many."""
        return dataclasses.replace(self, block_n=self.block_n // 2) if self.membranes > 16 else self

    @classmethod
    @functools.cache
    def from_name(cls, name: str) -> Variant:
        """The variant called ``name``. Raises ``ValueError`` if it is no variant's name."""
        match = re.fullmatch(r"p(\d+)-t(\d+)-(channels|words)-n(\d+)-w(\d+)-s(\d+)", name)
        if match is None:
            raise ValueError(f"not a variant of the fused convolution: {name!r}")
        pixels, steps, unit, *rest = match.groups()
        return cls(int(pixels), int(steps), unit == "channels", *map(int, rest))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A convolution as the kernel sees it.

    Groups are merged until they are whole words of inputs and of outputs, with a weight that is zero between them. A
    1x1 convolution is one over a row of all pixels of a time step, and so is a linear layer, whose images have one.

    Attributes:
        geometry: of one time step: its batch is N (1 for a row of pixels), its groups are the merged ones.
        channels, outputs: channels there really are; the last merged group may have fewer than the others.
        merged: groups in a merged one.
    """

    geometry: ConvGeometry
    channels: int
    outputs: int
    merged: int

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def of(cls, geometry: ConvGeometry, steps: int) -> Layout:
        """The layout for ``steps`` time steps, which share the geometry's batch."""
        g, merged = geometry, _merged(geometry)
        groups = -(-g.groups // merged)
        seen = dataclasses.replace(
            g,
            batch=g.batch // steps,
            groups=groups,
            in_channels=groups * merged * g.group_channels,
            out_channels=groups * merged * (g.out_channels // g.groups),
        )
        return cls(_in_a_row(seen) if _is_pointwise(g) else seen, g.in_channels, g.out_channels, merged)

    @property
    def words(self) -> int:
        """Words of 32 channels of an input pixel in memory."""
        return 2 * -(-self.channels // (2 * WORD))

    @property
    def group_words(self) -> int:
        """Those of a merged group."""
        return -(-self.geometry.group_channels // WORD)

    @property
    def out_words(self) -> int:
        """Words of an output pixel in memory."""
        return 2 * -(-self.outputs // (2 * WORD))

    @property
    def group_outputs(self) -> int:
        """Outputs of a merged group."""
        return self.geometry.out_channels // self.geometry.groups

    @property
    def group_out_words(self) -> int:
        """Words that a merged group but the last writes; that one also writes what is left of the pixel."""
        return self.out_words if self.geometry.groups == 1 else self.group_outputs // WORD

    @property
    def most_out_words(self) -> int:
        """The most words that any merged group writes."""
        return max(self.group_out_words, self.out_words - (self.geometry.groups - 1) * self.group_out_words)

    def tiling(self, pixels: int) -> Tiling:
        """Tiles of ``pixels`` outputs."""
        if pixels in _SIDES:
            return Tiling.of_side(self.geometry, _SIDES[pixels])
        return Tiling(self.geometry, (1, 1, pixels))

    @property
    def weights(self) -> int:
        """Elements of the packed weight."""
        g = self.geometry
        return g.groups * g.taps * g.group_channels * padded_outputs(self.group_outputs)


def _merged(geometry: ConvGeometry) -> int:
    """Groups that have to be taken together to make whole words.

    >>> [_merged(ConvGeometry(1, c, o, g, *[(1, 1, 1)] * 6)) for c, o, g in ((64, 64, 1), (384, 384, 384), (6, 4, 2))]
    [1, 32, 2]
    """
    sizes = geometry.group_channels, geometry.out_channels // geometry.groups
    return min(geometry.groups, max(WORD // math.gcd(WORD, size) for size in sizes))


def _is_pointwise(geometry: ConvGeometry) -> bool:
    """Whether outputs lie over inputs one by one, and 8 by 8 tiles would not fit."""
    g = geometry
    same = g.taps == 1 and g.in_size == g.out_size and not any(g.padding)
    return same and not (g.out_size[0] == 1 and g.out_size[1] % 8 == g.out_size[2] % 8 == 0)


def _in_a_row(geometry: ConvGeometry) -> ConvGeometry:
    """All pixels of a batch as one row."""
    row = (1, 1, geometry.batch * geometry.in_pixels)
    return dataclasses.replace(geometry, batch=1, in_size=row, out_size=row, stride=(1, 1, 1))


def variants(geometry: ConvGeometry, steps: int) -> tuple[str, ...]:
    """The configurations worth measuring, best guess first, at most four; none where the kernel does not reach.

    Few steps at once skip more, many read the weights less often.
    """
    if not _is_covered(geometry, steps):
        return ()
    layout = Layout.of(geometry, steps)
    whole = 1 << (min(steps, 8) - 1).bit_length()
    pixels = math.prod(layout.geometry.out_size)
    if pixels >= 32 * 32:
        tiles = ((64, 1, True), (64, min(whole, 2), False), (64, 1, False), (64, min(whole, 2), True))
    elif pixels > 16:
        tiles = ((64, min(whole, 2), True), (64, min(whole, 2), False), (64, 1, True), (16, min(whole, 4), True))
    elif pixels > 4 or not _is_row(layout.geometry):
        tiles = ((16, min(whole, 4), True), (16, min(whole, 4), False), (16, 1, True))
    else:
        tiles = ((4, max(whole, 4), True), (4, max(whole, 4), False), (16, 1, True))
    found = (_configuration(layout, *tile) for tile in tiles)
    return tuple(dict.fromkeys(variant.name for variant in found))


def _is_row(geometry: ConvGeometry) -> bool:
    return geometry.out_size[:2] == (1, 1)


def _is_covered(geometry: ConvGeometry, steps: int) -> bool:
    """Whether there is something to compute, steps share the batch evenly, and offsets stay below 2 ** 31."""
    g = geometry
    if min(g.batch, g.in_channels, g.out_channels, g.taps, g.in_pixels, g.out_pixels, steps) < 1 or g.batch % steps:
        return False
    layout = Layout.of(geometry, steps)
    seen, limit = layout.geometry, _MOST_WEIGHTS if layout.merged > 1 else _MOST_OFFSET - 1
    per_image = max(seen.in_pixels * layout.words * WORD, seen.out_pixels * layout.out_words * WORD)
    return layout.weights <= limit and per_image < _MOST_OFFSET


def _configuration(layout: Layout, pixels: int, steps: int, channels: bool) -> Variant:
    """The widest block of outputs for which accumulators and membranes leave room for what else a thread holds."""
    rows = pixels * steps
    widest = min(128 if rows >= 64 else 64, max(32, WORD * layout.most_out_words))
    for block_n in (128, 64, 32):
        warps = 8 if rows >= 128 or block_n == 128 else 4
        if block_n <= widest and (rows + pixels) * block_n <= _VALUES * 32 * warps:
            return Variant(pixels, steps, channels, block_n, warps, 3 if rows >= 256 else 4)
    raise AssertionError(f"no block of outputs is small enough for {rows} rows")


def pack_weight(weight: Tensor, geometry: ConvGeometry) -> Packed:
    """Pack ``weight [O, C / groups, *kernel]``; looks at the values, which waits for the device."""
    merged = _merged(geometry)
    whole = _between(weight.detach().float(), geometry.groups, merged)
    return pack(whole, -(-geometry.groups // merged), tf32=False, inspect=not weight.is_meta)


def _between(weight: Tensor, groups: int, merged: int) -> Tensor:
    """The weight of ``groups`` as one of fewer, ``merged`` of them each, with zeros between those."""
    if merged == 1:
        return weight
    outputs, channels, kernel = weight.shape[0] // groups, weight.shape[1], weight.shape[2:]
    whole = weight.new_zeros(-(-groups // merged) * merged, outputs, channels, *kernel)
    whole[:groups] = weight.reshape(groups, outputs, channels, *kernel)
    blocks = weight.new_zeros(len(whole) // merged, merged, outputs, merged, channels, *kernel)
    for i in range(merged):
        blocks[:, i, :, i] = whole[i::merged]
    return blocks.reshape(len(whole) * outputs, merged * channels, *kernel)
