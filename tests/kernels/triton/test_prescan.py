"""Stage 1 against a plain walk over tiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflow.kernels.base import ConvCall
from sparseflow.kernels.triton.prescan import prescan_tiles
from sparseflow.kernels.triton.tiles import Tiling

from .cases import DTYPES, SEEDS, Case, convolutions, with_layout

CALL = ConvCall((1, 1), ((1, 1), (1, 1)), (1, 1), 1)


def halos(x, tiling):
    """``[tiles, halo pixels, channels of a group]``: every tile's input, zero outside the image."""
    g = tiling.geometry
    image = x.reshape(g.batch, g.groups, g.group_channels, *g.in_size).movedim(2, -1)
    grids = []
    for dim in range(3):
        starts = torch.arange(tiling.grid[dim]) * tiling.tile[dim] * g.stride[dim] - g.padding[dim]
        grids.append(starts[:, None] + torch.arange(tiling.halo[dim]) * tiling.step[dim])
    (z, y, w), (depth, height, width) = grids, g.in_size
    z, y, w = z[:, None, None, :, None, None], y[None, :, None, None, :, None], w[None, None, :, None, None, :]
    inside = (z >= 0) & (z < depth) & (y >= 0) & (y < height) & (w >= 0) & (w < width)
    picked = image[:, :, z.clamp(0, depth - 1), y.clamp(0, height - 1), w.clamp(0, width - 1)]
    picked = torch.where(inside[..., None], picked, 0)
    return picked.movedim(1, 4).reshape(tiling.count, tiling.halo_pixels, g.group_channels)


@settings(max_examples=40, deadline=None)
@given(
    convolutions(),
    st.sampled_from([8, 4]),
    st.sampled_from([16, 32]),
    st.booleans(),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.sampled_from(["binary", "graded"]),
    st.sampled_from(DTYPES),
    st.sampled_from(["first", "last", "strided"]),
    SEEDS,
)
def test_prescan_finds_what_is_active(case: Case, side, block_k, gather, density, values, dtype, layout, seed):
    x, _, _ = case.tensors(dtype, density, values, seed)
    tiling = Tiling.of_side(case.geometry, side)
    scan = prescan_tiles(with_layout(x, layout), tiling, block_k, gather=gather)
    expected = halos(x, tiling)
    unit = 1 if gather else block_k
    channels = expected.shape[2]
    padded = torch.nn.functional.pad(expected, (0, -channels % unit))
    active = (padded != 0).any(1).unflatten(1, (-1, unit)).any(2)
    assert scan.words == active.numel()
    assert scan.counts[0].tolist() == active.sum(1).tolist()
    for tile, flags in enumerate(active):
        units = flags.nonzero().flatten()
        assert scan.lists[tile, : len(units)].tolist() == units.tolist()
        if gather:
            reach = -(-len(units) // block_k) * block_k
            wanted = torch.nn.functional.pad(expected[tile][:, units], (0, reach - len(units)))
            assert torch.equal(scan.gathered[tile, :, :reach], wanted.to(scan.gathered.dtype))


@pytest.mark.parametrize("gather", [True, False])
@settings(max_examples=25, deadline=None)
@given(convolutions(), st.sampled_from([0.1, 1.0]), SEEDS)
def test_every_covered_element_counts_once(gather, case: Case, density, seed):
    tiling = Tiling.of_side(case.geometry, 4)
    ones = prescan_tiles(torch.ones(case.x_shape, dtype=torch.float16), tiling, 16, gather=gather)
    assert ones.totals()[0] == ones.numel == tiling.covered
    x, _, _ = case.tensors(torch.float16, density, "binary", seed)
    if tiling.covered == x.numel():
        assert prescan_tiles(x, tiling, 16, gather=gather).totals()[0] == x.count_nonzero()


def test_the_bits_say_what_the_lists_say():
    case = Case((2, 70, 9, 9), (4, 70, 3, 3), CALL)
    x, _, _ = case.tensors(torch.float16, 0.01, "binary", 0)
    tiling = Tiling.of_side(case.geometry, 4)
    scan = prescan_tiles(x, tiling, 16, gather=True)
    for tile in range(tiling.count):
        words = scan.bits[tile].tolist()
        units = [32 * word + bit for word in range(len(words)) for bit in range(32) if words[word] >> bit & 1]
        assert units == scan.lists[tile, : scan.counts[0, tile]].tolist()
    assert scan.totals()[1] > 0


@pytest.mark.parametrize(
    ("value", "exact"),
    [(1.0, 1), (3.0, 1), (0.25, 1), (1 / 3, 0), (1e-6, 0), (1e6, 0), (float("nan"), 0), (float("inf"), 0)],
)
def test_values_that_need_more_than_16_bits_are_flagged(value, exact):
    case = Case((1, 20, 6, 6), (4, 20, 3, 3), CALL)
    x = torch.zeros(case.x_shape)
    x[0, 7, 0, 0] = value
    scan = prescan_tiles(x, Tiling.of_side(case.geometry, 4), 16, gather=True)
    assert scan.counts[2].tolist() == [exact, 1, 1, 1]


def test_minus_zero_is_no_spike():
    case = Case((1, 20, 4, 4), (4, 20, 1, 1), CALL)
    for dtype in DTYPES:
        x = torch.full(case.x_shape, -0.0, dtype=dtype)
        assert prescan_tiles(x, Tiling.of_side(case.geometry, 4), 16, gather=True).totals().tolist() == [0, 0]
