"""Output tiles of a convolution, and the halo of input pixels each tile reads."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable

from sparseflow.kernels.geometry import ConvGeometry, Three

_SHAPES: dict[int, dict[int, Three]] = {
    1: {16: (1, 1, 256), 8: (1, 1, 64), 4: (1, 1, 16)},
    2: {16: (1, 16, 16), 8: (1, 8, 8), 4: (1, 4, 4)},
    3: {16: (4, 8, 8), 8: (4, 4, 4), 4: (2, 2, 4)},
}


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The outputs of a convolution cut into tiles of ``tile`` pixels (depth, height, width) of one image and one group.

    Tiles are numbered with the group fastest, then width, height, depth and image.
    """

    geometry: ConvGeometry
    tile: Three

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def of_side(cls, geometry: ConvGeometry, side: int) -> Tiling:
        """Tiles of 256, 64 or 16 outputs for ``side`` 16, 8 or 4: squares in two dimensions, runs in one.

        The same arguments get the same object, since every call of a layer asks.

        >>> geometry = ConvGeometry.from_call((2, 8, 20, 20), (8, 8, 3, 3), (1, 1), (1, 1), (1, 1), 1)
        >>> tiling = Tiling.of_side(geometry, 8)
        >>> tiling.grid, tiling.halo, tiling.count
        ((1, 3, 3), (1, 10, 10), 18)
        """
        return cls(geometry, _SHAPES[_dimensions(geometry)][side])

    @property
    def rows(self) -> int:
        """Outputs of a tile: the rows of its matrix product."""
        return math.prod(self.tile)

    @functools.cached_property
    def grid(self) -> Three:
        """Tiles of one image and group along each dimension."""
        return _three(-(-out // tile) for out, tile in zip(self.geometry.out_size, self.tile, strict=True))

    @functools.cached_property
    def count(self) -> int:
        """Number of tiles."""
        return self.geometry.batch * self.geometry.groups * math.prod(self.grid)

    @functools.cached_property
    def step(self) -> Three:
        """Distance of neighbouring halo pixels in the input: pixels that no tap ever meets are left out."""
        g = self.geometry
        dims = zip(g.kernel, g.stride, g.dilation, strict=True)
        return _three(s if k == 1 else math.gcd(s, d) for k, s, d in dims)

    @functools.cached_property
    def pitch(self) -> Three:
        """Halo pixels from one output to the next."""
        return _three(s // step for s, step in zip(self.geometry.stride, self.step, strict=True))

    @functools.cached_property
    def reach(self) -> Three:
        """Halo pixels from one tap to the next."""
        g = self.geometry
        dims = zip(g.kernel, g.dilation, self.step, strict=True)
        return _three(1 if k == 1 else d // step for k, d, step in dims)

    @functools.cached_property
    def halo(self) -> Three:
        """Input pixels that a tile reads along each dimension, in steps."""
        dims = zip(self.tile, self.pitch, self.geometry.kernel, self.reach, strict=True)
        return _three((tile - 1) * pitch + (k - 1) * reach + 1 for tile, pitch, k, reach in dims)

    @property
    def halo_pixels(self) -> int:
        """Input pixels that a tile reads."""
        return math.prod(self.halo)

    @functools.cached_property
    def covered(self) -> int:
        """Elements of the input that some tile reads, each counted once."""
        g = self.geometry
        return g.batch * g.in_channels * math.prod(self._covered(dim) for dim in range(3))

    def _covered(self, dim: int) -> int:
        """Input positions along ``dim`` that the tiles own; a tile owns what the next one does not start with."""
        g = self.geometry
        owned = min(self.halo[dim], self.tile[dim] * self.pitch[dim])
        last = self.grid[dim] - 1
        total = 0
        for t in range(self.grid[dim]):
            start = t * self.tile[dim] * g.stride[dim] - g.padding[dim]
            first, end = -(start // self.step[dim]), -((start - g.in_size[dim]) // self.step[dim])
            total += max(0, min(end, self.halo[dim] if t == last else owned) - max(first, 0))
        return total

    def constants(self, *names: str) -> dict[str, int]:
        """The compile-time constants by which the kernels know the tiling, three of each of these ``names``."""
        known = {
            "TILE": self.tile,
            "HALO": self.halo,
            "STEP": self.step,
            "PITCH": self.pitch,
            "REACH": self.reach,
            "STRIDE": self.geometry.stride,
            "KERNEL": self.geometry.kernel,
        }
        return by_axis({name: known[name] for name in names})


def by_axis(named: dict[str, Three]) -> dict[str, int]:
    """Kernel arguments of triples, one an axis.

    >>> by_axis({"PAD": (0, 1, 2)})
    {'PAD_D': 0, 'PAD_H': 1, 'PAD_W': 2}
    """
    return {f"{name}_{axis}": value for name, three in named.items() for axis, value in zip("DHW", three, strict=True)}


def _three(values: Iterable[int]) -> Three:
    first, second, third = values
    return first, second, third


def _dimensions(geometry: ConvGeometry) -> int:
    """Dimensions that matter for the shape of a tile: leading ones of size 1 do not."""
    if geometry.out_size[0] > 1:
        return 3
    return 2 if geometry.out_size[1] > 1 else 1
