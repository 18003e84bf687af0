"""Tiles and halos against a walk over all taps."""

from __future__ import annotations

import itertools

from hypothesis import given, settings

from sparseflow.kernels.triton.tiles import Tiling

from .cases import Case, convolutions


def axis_positions(tiling: Tiling, dim: int) -> list[set[int]]:
    """Input positions that each tile needs along one dimension, from the definition of a convolution."""
    g = tiling.geometry
    starts = range(0, g.out_size[dim], tiling.tile[dim])
    outputs = [range(start, min(start + tiling.tile[dim], g.out_size[dim])) for start in starts]
    return [
        {
            o * g.stride[dim] - g.padding[dim] + k * g.dilation[dim]
            for o, k in itertools.product(tile, range(g.kernel[dim]))
        }
        for tile in outputs
    ]


def halo_positions(tiling: Tiling, dim: int, number: int) -> list[int]:
    start = number * tiling.tile[dim] * tiling.geometry.stride[dim] - tiling.geometry.padding[dim]
    return [start + i * tiling.step[dim] for i in range(tiling.halo[dim])]


@settings(max_examples=200, deadline=None)
@given(convolutions())
def test_the_halo_holds_what_the_taps_meet(case: Case):
    for side in (16, 8, 4):
        tiling = Tiling.of_side(case.geometry, side)
        for dim in range(3):
            needed = axis_positions(tiling, dim)
            assert len(needed) == tiling.grid[dim]
            for number, positions in enumerate(needed):
                assert positions <= set(halo_positions(tiling, dim, number))


@settings(max_examples=200, deadline=None)
@given(convolutions())
def test_outputs_and_taps_find_their_pixels_in_the_halo(case: Case):
    tiling, g = Tiling.of_side(case.geometry, 4), case.geometry
    for dim in range(3):
        halo = halo_positions(tiling, dim, 0)
        for output, tap in itertools.product(range(tiling.tile[dim]), range(g.kernel[dim])):
            position = output * g.stride[dim] - g.padding[dim] + tap * g.dilation[dim]
            assert halo[output * tiling.pitch[dim] + tap * tiling.reach[dim]] == position


@settings(max_examples=200, deadline=None)
@given(convolutions())
def test_covered_counts_what_some_halo_holds(case: Case):
    g = case.geometry
    for side in (16, 8, 4):
        tiling = Tiling.of_side(g, side)
        expected = g.batch * g.in_channels
        for dim in range(3):
            held = {p for t in range(tiling.grid[dim]) for p in halo_positions(tiling, dim, t)}
            expected *= len(held & set(range(g.in_size[dim])))
        assert tiling.covered == expected
