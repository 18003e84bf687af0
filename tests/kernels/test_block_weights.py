"""Kernels that skip zero weight blocks against the float64 oracle with the pruned weight, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflow.kernels import event, weight_blocks
from sparseflow.kernels.base import ConvCall, LinearCall
from sparseflow.kernels.cpu import engine, schedule
from sparseflow.kernels.cpu.records import Structure
from sparseflow.kernels.reference import excess
from sparseflow.kernels.weight_blocks import present_blocks, present_share, spread

from .test_cpu_engine import (
    DENSITIES,
    DTYPES,
    SEEDS,
    VALUES,
    convolutions,
    events,
    isa,  # noqa: F401  (a fixture)
    poison_workspace,
    randn,
    to_layout,
)

needs_engine = pytest.mark.skipif(not engine.available(), reason="no native engine on this machine")
on_every_isa = pytest.mark.usefixtures("isa")

SHARES = st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0])
BLOCKS = st.sampled_from([(16, 16), (32, 16), (8, 8), (5, 40)])  # some not those that the kernels skip
TILES = st.sampled_from([1, 7, 40, 112, 400])


def block_sparse(shape, share, block, seed, dtype):
    """A random weight of which about ``share`` of the blocks is there; the zeros of some others have a sign."""
    weight = randn(*shape, seed=seed, dtype=dtype)
    blocks = present_blocks(torch.ones(shape), block)
    drawn = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(seed + 7))
    return weight * spread(drawn < share, weight.shape, block).to(dtype)


ROWS = engine.Variant(Structure.BLOCK_ROWS, 1, 1)


def walk(tile):
    return engine.Variant(Structure.BLOCKS, 16, 16, 0, tile)


@pytest.fixture(params=[1, 2], scope="module")
def threads(request):
    """With two, every call uses both, however little there is to do."""
    patch, before = pytest.MonkeyPatch(), torch.get_num_threads()
    torch.set_num_threads(request.param)
    if request.param > 1:
        patch.setattr(engine, "MIN_PARALLEL_WORK", 0)
    yield request.param
    patch.undo()
    torch.set_num_threads(before)


@needs_engine
@on_every_isa
@pytest.mark.usefixtures("threads")
@settings(max_examples=120, deadline=None)
@given(
    case=convolutions(),
    share=SHARES,
    block=BLOCKS,
    tile=TILES,
    density=DENSITIES,
    values=VALUES,
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
    channels_last=st.booleans(),
    biased=st.booleans(),
    seed=SEEDS,
)
def test_conv_stays_inside_the_error_budget(
    case, share, block, tile, density, values, dtype, layout, channels_last, biased, seed
):
    x_shape, w_shape, stride, padding, dilation, groups = case
    x_shape = (x_shape[0], w_shape[1], *x_shape[2:])
    w_shape = (w_shape[0] // groups, *w_shape[1:])
    x = to_layout(events(x_shape, density, values, seed, dtype), layout)
    weight = block_sparse(w_shape, share, block, seed, dtype)
    bias = randn(w_shape[0], seed=seed + 1, dtype=dtype) if biased else None
    geometry = engine.ConvGeometry.from_call(x_shape, w_shape, stride, padding, dilation, 1)
    packed = engine.pack_blocks(weight)
    assert packed.values.shape[0] == present_blocks(weight).sum()
    scan = engine.prescan_conv(x, geometry)
    poison_workspace()
    y = engine.conv(x, scan, packed, bias, geometry, walk(tile), channels_last=channels_last)
    assert engine._is_channels_last(y) if channels_last else y.is_contiguous()
    call = ConvCall(tuple(stride), tuple(padding), tuple(dilation), 1)
    assert excess(y, x, weight, bias, call) <= 1.0


@needs_engine
@on_every_isa
@pytest.mark.usefixtures("threads")
@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 7, 33, 500]),
    features=st.sampled_from([1, 7, 64, 130, 515]),
    outputs=st.sampled_from([1, 10, 64, 100, 600]),
    share=SHARES,
    block=BLOCKS,
    tile=TILES,
    density=DENSITIES,
    values=VALUES,
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
    seed=SEEDS,
)
def test_linear_stays_inside_the_error_budget(
    rows, features, outputs, share, block, tile, density, values, dtype, biased, seed
):
    x = events((rows, features), density, values, seed, dtype)
    weight = block_sparse((outputs, features), share, block, seed, dtype)
    bias = randn(outputs, seed=seed + 1, dtype=dtype) if biased else None
    scan = engine.prescan_linear(x)
    for variant in (walk(tile), ROWS):
        packed = engine.pack_weight(weight, 1, variant)
        poison_workspace()
        y = engine.linear(x, scan, packed, bias, variant, torch.empty(rows, outputs, dtype=dtype))
        assert excess(y, x, weight, bias, LinearCall()) <= 1.0, variant.name


@needs_engine
@on_every_isa
@settings(max_examples=20, deadline=None)
@given(case=convolutions(), seed=SEEDS)
def test_results_do_not_depend_on_tiles_or_threads(case, seed):
    x_shape, w_shape, stride, padding, dilation, groups = case
    x_shape, w_shape = (x_shape[0], w_shape[1], *x_shape[2:]), (w_shape[0] // groups, *w_shape[1:])
    x = events(x_shape, 0.3, "graded", seed, torch.float32)
    packed = engine.pack_blocks(block_sparse(w_shape, 0.5, (16, 16), seed, torch.float32))
    geometry = engine.ConvGeometry.from_call(x_shape, w_shape, stride, padding, dilation, 1)
    scan, before = engine.prescan_conv(x, geometry), torch.get_num_threads()
    patch, found = pytest.MonkeyPatch(), []
    patch.setattr(engine, "MIN_PARALLEL_WORK", 0)
    for tile, threads in ((112, 1), (7, 1), (112, 2), (1, 3)):
        torch.set_num_threads(threads)
        found.append(engine.conv(x, scan, packed, None, geometry, walk(tile), channels_last=True))
    patch.undo()
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "variant"),
    [((33, 40, 2, 3), walk(112)), ((64, 16), walk(112)), ((16, 100, 5), walk(7)), ((100, 70), ROWS)],
    ids=str,
)
def test_packed_blocks_match_their_weight_and_no_other(shape, variant, dtype):
    weight = block_sparse(shape, 0.4, (16, 16), 3, dtype)
    packed = engine.pack_weight(weight, 1, variant)
    assert packed.values.numel() == 256 * present_blocks(weight).sum()
    assert all(engine.weights_match(weight, packed, 1, variant, offset) for offset in range(500))
    for place in ((0,) * len(shape), (-1,) * len(shape), (20 % shape[0], *[0] * (len(shape) - 1))):
        changed = weight.clone()
        changed[place] += 1.0
        found = [engine.weights_match(changed, packed, 1, variant, offset) for offset in range(3000)]
        assert not all(found), place


@needs_engine
def test_a_zero_with_a_sign_is_a_zero():
    weight = torch.ones(32, 32)
    weight[:16] = -0.0
    assert present_share(weight) == 0.5
    for variant in (walk(112), ROWS):
        packed = engine.pack_weight(weight, 1, variant)
        assert all(engine.weights_match(weight, packed, 1, variant, offset) for offset in range(50))


def geometry_of(w_shape, size, dilation=1):
    x_shape = (2, w_shape[1], size, size)
    return engine.ConvGeometry.from_call(x_shape, w_shape, (1, 1), (1, 1), (dilation, dilation), 1)


def test_variants_are_offered_only_where_there_are_blocks_to_skip():
    geometry = geometry_of((64, 64, 3, 3), 8)
    full = schedule.conv_variants(geometry, torch.float32)
    assert not any(v.structure == Structure.BLOCKS for v in full)
    half, most = (schedule.conv_variants(geometry, torch.float32, share) for share in (0.5, 0.9))
    assert half[0].structure == most[-1].structure == Structure.BLOCKS
    assert set(full) < set(half) == set(most)
    for variant in half:
        assert engine.Variant.from_name(variant.name) == variant
    grouped = engine.ConvGeometry.from_call((1, 64, 8, 8), (64, 32, 3, 3), (1, 1), (1, 1), (1, 1), 2)
    assert schedule.conv_variants(grouped, torch.float32, 0.5) == schedule.conv_variants(grouped, torch.float32)
    few, many = (schedule.linear_variants(rows, 64, 64, torch.float32, 0.5) for rows in (4, 64))
    assert few[0] == ROWS
    assert many[0].structure == Structure.BLOCKS


def test_far_reaching_kernels_keep_to_what_an_entry_can_name():
    far = geometry_of((32, 32, 7, 7), 400, 60)
    assert not any(v.structure == Structure.BLOCKS for v in schedule.conv_variants(far, torch.float32, 0.5))


@needs_engine
def test_a_kernel_is_bound_with_the_share_of_its_weight():
    x, call = torch.zeros(1, 32, 8, 8), ConvCall((1, 1), ((1, 1), (1, 1)), (1, 1), 1)
    weight = torch.ones(32, 32, 3, 3)
    assert event.bind(x, weight, call).weight_share == 1.0
    weight[:16, :, 0, 0] = 0.0
    kernel = event.bind(x, weight, call)
    assert kernel.weight_share == present_share(weight) == pytest.approx(1 - 1 / 18, abs=0.005)
    assert any(name.startswith("blocks") for name in kernel.variants())
    linear = event.bind(torch.zeros(2, 64), torch.eye(64), LinearCall())
    assert linear.weight_share == 0.25


def test_blocks_of_a_weight():
    weight = torch.zeros(20, 33, 2)
    weight[17, 32, 1] = 1.0
    weight[0, 15, 0] = float("nan")
    assert present_blocks(weight).nonzero().tolist() == [[0, 0, 0], [1, 2, 1]]
    assert weight_blocks.block_norms(weight.nan_to_num(2.0)).sum() == 3.0
    assert present_share(torch.empty(0, 4)) == 1.0
