"""The kernel for pruned weights: packing, results against the float64 oracle, and where it is offered."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflow.kernels.base import ConvCall, LinearCall, conv_layout
from sparseflow.kernels.reference import excess
from sparseflow.kernels.triton import pruned_gemm
from sparseflow.kernels.triton.backend import TileConv, TileLinear, bind_all
from sparseflow.kernels.triton.cost import dense, predict
from sparseflow.kernels.triton.launch import recording
from sparseflow.kernels.triton.pruned import WIDTHS, PrunedKernel, PrunedVariant, offered, pruned_variants, shares_of
from sparseflow.kernels.triton.pruned_gemm import pack_blocks
from sparseflow.kernels.weight_blocks import present_blocks, spread

from .cases import DTYPES, SEEDS, Case, convolutions, with_layout

SHARES = dict.fromkeys(WIDTHS, 0.5)
CALL = ConvCall((1, 1), ((1, 1), (1, 1)), (1, 1), 1)
VARIANTS = (PrunedVariant(8, 16, 4, 4, 3), PrunedVariant(4, 32, 2, 4, 3), PrunedVariant(16, 16, 1, 8, 3))


def pruned(weight, share, seed=0):
    """``weight`` with about ``share`` of its blocks of 16 x 16 left, in its own layout."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(present_blocks(weight).shape, generator=generator) < share
    return weight * spread(present, weight.shape)


def kernel_of(case: Case, x, weight, shares=None) -> PrunedKernel:
    layout = conv_layout(tuple(x.shape), x.stride(), tuple(weight.shape), weight.stride(), x.dtype, case.call)
    return PrunedKernel(TileConv(case.geometry, layout, x.dtype, tf32=False), shares or SHARES)


def run(case: Case, x, weight, bias, variant: PrunedVariant, inspect=True):
    kernel = kernel_of(case, x, weight)
    packed = kernel.pack(weight, variant.name, inspect=inspect)
    return kernel.compute(x, kernel.prescan(x, variant.name), packed, bias, variant.name)


@settings(max_examples=40, deadline=None)
@given(
    convolutions(groups=(1,), channels=(1, 17, 40), outputs=(5, 18, 40)),
    st.sampled_from(VARIANTS),
    st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    st.sampled_from(["binary", "integer", "graded"]),
    st.sampled_from(DTYPES),
    st.sampled_from(["first", "last", "strided"]),
    st.booleans(),
    st.booleans(),
    SEEDS,
)
def test_conv_stays_inside_the_error_budget(
    case: Case, variant, share, density, values, dtype, layout, biased, inspect, seed
):
    x, weight, bias = case.tensors(dtype, density, values, seed)
    x, weight, bias = with_layout(x, layout), pruned(weight, share, seed), bias if biased else None
    y = run(case, x, weight, bias, variant, inspect)
    dense_y = case.call.dense(x, weight, bias)
    assert (y.dtype, y.shape, y.stride()) == (dense_y.dtype, dense_y.shape, dense_y.stride())
    assert excess(y, x, weight, bias, case.call) <= 1.0


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 20),
    st.sampled_from([1, 40, 70]),
    st.sampled_from([1, 10, 33]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from(DTYPES),
    SEEDS,
)
def test_linear_stays_inside_the_error_budget(rows, k, m, share, density, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(rows, 1, k, generator=generator) < density).to(dtype)
    weight = pruned(torch.randn(m, k, generator=generator), share, seed).to(dtype)
    bias = torch.randn(m, generator=generator).to(dtype)
    kernel = PrunedKernel(TileLinear(rows, k, m, dtype, tf32=False), SHARES)
    for variant in kernel.variants():
        y = kernel.compute(x, kernel.prescan(x, variant), kernel.pack(weight, variant), bias, variant)
        assert y.shape == (rows, 1, m)
        assert y.is_contiguous()
        assert excess(y, x, weight, bias, LinearCall()) <= 1.0


@pytest.mark.parametrize(
    ("size", "sides", "dtype"),
    [((9, 9), {16, 8}, torch.float32), ((3, 6), {8, 4}, torch.float16), ((1, 4), {8, 4}, torch.bfloat16)],
)
def test_every_configuration_that_ships(size, sides, dtype):
    case = Case((1, 20, *size), (130, 20, 1, 3), CALL)
    x, weight, bias = case.tensors(dtype, 0.1, "binary", 0)
    weight = pruned(weight, 0.3)
    variants = kernel_of(case, x, weight).every_variant()
    assert {v.side for v in variants} == sides
    assert {v.width for v in variants} == {16, 32, 64} | ({128} if dtype != torch.float32 else set())
    for variant in variants:
        assert PrunedVariant.from_name(variant.name) == variant
        assert excess(run(case, x, weight, bias, variant), x, weight, bias, CALL) <= 1.0


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("shape", [(40, 33, 3, 2), (16, 70), (5, 1, 3)])
def test_packed_blocks_are_the_weight_and_present_ones_come_first(shape, width):
    weight = pruned(torch.randn(shape), 0.4).half()
    packed = pack_blocks(weight, width, tf32=False, inspect=True)
    taps = weight.reshape(*shape[:2], -1)
    pairs = -(-shape[1] // 16) * taps.shape[2]
    assert packed.blocks.shape == (1, -(-shape[0] // width), pairs, 16, width)
    for block, some in enumerate(taps.split(width)):
        listed, present = packed.pairs[block].tolist(), int(packed.present[block])
        assert sorted(listed) == list(range(pairs))
        assert listed[:present] == sorted(listed[:present])
        for at, pair in enumerate(listed):
            group, tap = divmod(pair, taps.shape[2])
            expected = some[:, 16 * group : 16 * group + 16, tap].t()
            found = packed.blocks[0, block, pair]
            assert torch.equal(found[: expected.shape[0], : expected.shape[1]], expected)
            assert found.count_nonzero() == expected.count_nonzero()
            assert bool(expected.any()) == (at < present)


def test_the_form_of_a_packed_weight_does_not_depend_on_its_zeros():
    weight = torch.randn(40, 33, 3, 3)
    forms = [pack_blocks(pruned(weight, share), 32, tf32=False, inspect=False) for share in (0.0, 0.5, 1.0)]
    for a, b in itertools.pairwise(forms):
        assert [t is not None and (t.shape, t.dtype) for t in a] == [t is not None and (t.shape, t.dtype) for t in b]


def test_what_is_absent_or_silent_is_not_multiplied():
    """Blocks that the list of no tile may hold are poisoned."""
    case = Case((1, 48, 4, 4), (32, 48, 3, 3), CALL)
    x, weight, bias = case.tensors(torch.float16, 0.3, "binary", 0)
    x[:, 16:32] = 0.0
    weight = pruned(weight, 0.5)
    variant = PrunedVariant(4, 16, 4, 4, 3)
    kernel = kernel_of(case, x, weight)
    packed = kernel.pack(weight, variant.name)
    present = present_blocks(weight)
    present[:, 1] = False
    absent = ~present.flatten(1)
    absent[:, -1] = False  # the weight that fills up a list's last step; the input is zero there
    assert 0 < absent.sum() < absent.numel()
    packed.blocks[0, absent] = float("nan")
    y = kernel.compute(x, kernel.prescan(x, variant.name), packed, bias, variant.name)
    assert excess(y, x, weight, bias, CALL) <= 1.0


def test_a_silent_tile_and_an_absent_weight_are_the_bias():
    case = Case((1, 8, 16, 4), (20, 8, 3, 3), CALL)
    x, weight, bias = case.tensors(torch.float16, 0.0, "binary", 0)
    x[0, 3, 0, 0] = 1.0
    y = run(case, x, weight, bias, VARIANTS[1])
    assert torch.equal(y[0, :, 4:], bias[:, None, None].expand(20, 12, 4))
    y = run(case, torch.ones_like(x), torch.zeros_like(weight), bias, VARIANTS[0])
    assert torch.equal(y, bias[:, None, None].expand(1, 20, 16, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_beyond_every_range_meet_the_zeros_of_the_weight_as_in_dense(value, dtype):
    case = Case((1, 20, 5, 5), (20, 20, 3, 3), CALL)
    x, weight, bias = case.tensors(dtype, 0.1, "binary", 0)
    weight = pruned(weight, 0.3)
    x[0, 3, 2, 2] = value
    y = run(case, x, weight, bias, VARIANTS[1])
    expected = torch.conv2d(x, weight, bias, padding=1)
    assert expected.isnan().any() == (value != 1e30)
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-2, atol=1e-2)


def test_results_do_not_depend_on_the_run_the_tile_or_the_blocks_of_a_program():
    case = Case((1, 20, 9, 6), (40, 20, 3, 3), CALL)
    x, weight, bias = case.tensors(torch.float32, 0.3, "binary", 0)
    weight = (pruned(weight, 0.5) * 64).round() / 64  # sums of these are exact in any order
    first = run(case, x, weight, bias.round(), VARIANTS[0])
    for variant in VARIANTS:
        assert torch.equal(run(case, x, weight, bias.round(), variant), first)
    with mock.patch.object(pruned_gemm, "_PROGRAMS", 1):
        assert torch.equal(run(case, x, weight, bias.round(), VARIANTS[0]), first)
    with mock.patch.object(pruned_gemm, "is_wide", return_value=True):
        assert torch.equal(run(case, x, weight, bias.round(), VARIANTS[0]), first)


def test_offsets_inside_the_weight_are_wide_where_they_have_to_be():
    for features in (4096, 50_000):
        x = torch.empty(4, features, dtype=torch.float16, device="meta")
        kernel = PrunedKernel(TileLinear(4, features, features, x.dtype, tf32=False), SHARES)
        variant = PrunedVariant(4, 16, 4, 4, 3).name
        with recording() as launches:
            packed = kernel.pack(torch.empty(features, features, dtype=x.dtype, device="meta"), variant)
            kernel.compute(x, kernel.prescan(x, variant), packed, None, variant)
        # An output block has 16 rows of the weight; offsets of whole blocks are 64 bits wide anyway.
        assert [launch.constants["WIDE"] for launch in launches] == [False, False]


def bound(weight, batch=128, size=28, dtype=torch.float16):
    """Kernels for a 3x3 layer with this weight; ``x`` exists in shape only."""
    x = torch.empty(batch, weight.shape[1], size, size, dtype=dtype, device="meta")
    x = x.to(memory_format=torch.channels_last)
    with recording():
        return bind_all(x, weight.to(dtype), CALL)


def test_a_full_weight_is_offered_nothing():
    assert [str(kernel.path) for kernel in bound(torch.randn(128, 128, 3, 3))] == ["tile", "event"]


def test_a_pruned_weight_is_offered_the_kernel_first_where_its_floor_is_lowest():
    weight = pruned(torch.randn(128, 128, 3, 3), 0.1)
    kernel, *others = bound(weight)
    assert [str(k.path) for k in (kernel, *others)] == ["pruned", "tile", "event"]
    assert kernel.weight_share == round(float(present_blocks(weight).float().mean()), 2)
    floors = [predict(kernel, variant, 1.0).ms for variant in kernel.variants()]
    assert floors == sorted(floors)
    assert floors[0] < dense(kernel.geometry, torch.float16).ms


def test_a_few_zero_blocks_are_not_worth_another_kernel():
    weight = torch.randn(128, 128, 3, 3)
    weight[:16, :16, 0, 0] = 0.0
    assert [str(kernel.path) for kernel in bound(weight)] == ["tile", "event"]


def test_wide_blocks_are_preferred_where_the_zeros_lie_together():
    together = torch.randn(128, 128, 3, 3)
    together[:, 32:] = 0.0  # 16 input channels at a time, for all outputs
    scattered = pruned(torch.randn(128, 128, 3, 3), 0.06)
    widths = [PrunedVariant.from_name(bound(weight)[0].variants()[0]).width for weight in (together, scattered)]
    assert widths[0] >= 64
    assert widths[1] < 64


def test_without_a_look_at_the_values_nothing_is_offered():
    x, weight = torch.empty(2, 64), torch.zeros(64, 64)
    assert bind_all(x, weight, LinearCall(), inspect=False)[0].path == "tile"
    assert offered(TileLinear(2, 64, 64, x.dtype, tf32=False), weight.to("meta")) == ()


def test_shares_follow_the_width():
    present = torch.zeros(5, 9, 2, dtype=torch.bool)
    present[3] = True
    assert shares_of(present) == {128: 1.0, 64: 0.5, 32: pytest.approx(1 / 3), 16: pytest.approx(0.2)}


def test_fewer_blocks_never_cost_more():
    case = Case((128, 64, 28, 28), (64, 64, 3, 3), CALL)
    x, weight = (torch.empty(s, dtype=torch.float16, device="meta") for s in (case.x_shape, case.w_shape))
    for variant in pruned_variants(case.geometry, tf32=False, parts=1):
        times = [
            predict(kernel_of(case, x, weight, dict.fromkeys(WIDTHS, share)), variant.name, load).ms
            for share, load in ((0.0, 1.0), (0.2, 0.5), (0.2, 1.0), (1.0, 1.0))
        ]
        assert times == sorted(times)


def test_the_grids_counted_are_the_grids_launched():
    case = Case((128, 64, 28, 28), (256, 64, 3, 3), CALL)
    x, weight = (torch.empty(s, dtype=torch.float16, device="meta") for s in (case.x_shape, case.w_shape))
    kernel = kernel_of(case, x, weight)
    for variant in kernel.variants():
        with recording() as launches:
            kernel.compute(x, kernel.prescan(x, variant), kernel.pack(weight, variant), None, variant)
        stages = predict(kernel, variant, 0.3).stages
        assert [stage.programs for stage in stages] == [launch.grid[0] for launch in launches]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="tile8"):
        PrunedVariant.from_name("tile8-channels-n64-k32-w4-s3")
