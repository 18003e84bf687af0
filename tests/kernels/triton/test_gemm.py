"""Stage 2 of the tile kernels against the float64 oracle."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflow.kernels.base import ConvCall, LinearCall, conv_layout
from sparseflow.kernels.reference import excess
from sparseflow.kernels.triton import gemm
from sparseflow.kernels.triton.backend import TileConv, TileLinear, TileVariant, tile_variants
from sparseflow.kernels.triton.gemm import tile_gemm
from sparseflow.kernels.triton.launch import recording
from sparseflow.kernels.triton.prescan import prescan_tiles
from sparseflow.kernels.triton.tiles import Tiling
from sparseflow.kernels.triton.weights import pack

from .cases import DTYPES, SEEDS, Case, convolutions, with_layout

CALL = ConvCall((1, 1), ((1, 1), (1, 1)), (1, 1), 1)


def kernel_of(case: Case, x, weight) -> TileConv:
    layout = conv_layout(tuple(x.shape), x.stride(), tuple(weight.shape), weight.stride(), x.dtype, case.call)
    return TileConv(case.geometry, layout, x.dtype, tf32=False)


def run(case: Case, x, weight, bias, variant: TileVariant, inspect: bool = True):
    kernel = kernel_of(case, x, weight)
    packed = kernel.pack(weight, variant.name, inspect=inspect)
    return kernel.compute(x, kernel.prescan(x, variant.name), packed, bias, variant.name)


@settings(max_examples=60, deadline=None)
@given(
    convolutions(),
    st.sampled_from([(8, 32, 16), (4, 16, 16), (4, 32, 32)]),
    st.booleans(),
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    st.sampled_from(["binary", "integer", "graded"]),
    st.sampled_from(DTYPES),
    st.sampled_from(["first", "last", "strided"]),
    st.booleans(),
    st.booleans(),
    SEEDS,
)
def test_conv_stays_inside_the_error_budget(
    case: Case, tile, gather, density, values, dtype, layout, biased, inspect, seed
):
    x, weight, bias = case.tensors(dtype, density, values, seed)
    x = with_layout(x, layout)
    side, block_n, block_k = tile
    bias = bias if biased else None
    y = run(case, x, weight, bias, TileVariant(side, gather, block_n, block_k, 4, 2), inspect)
    dense = case.call.dense(x, weight, bias)
    assert (y.dtype, y.shape, y.stride()) == (dense.dtype, dense.shape, dense.stride())
    assert excess(y, x, weight, bias, case.call) <= 1.0


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 20),
    st.sampled_from([1, 40, 70]),
    st.sampled_from([1, 10, 33]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from(DTYPES),
    SEEDS,
)
def test_linear_stays_inside_the_error_budget(rows, k, m, density, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(rows, 1, k, generator=generator) < density).to(dtype)
    weight, bias = torch.randn(m, k, generator=generator).to(dtype), torch.randn(m, generator=generator).to(dtype)
    kernel = TileLinear(rows, k, m, dtype, tf32=False)
    for variant in kernel.variants():
        y = kernel.compute(x, kernel.prescan(x, variant), kernel.pack(weight, variant), bias, variant)
        assert y.shape == (rows, 1, m)
        assert y.is_contiguous()
        assert excess(y, x, weight, bias, LinearCall()) <= 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [33, 9, 3])
def test_every_configuration_that_ships(size, dtype):
    case = Case((1, 20, size, 4), (18, 20, 3, 3), CALL)
    x, weight, bias = case.tensors(dtype, 0.1, "binary", size)
    variants = tile_variants(case.geometry, tf32=False, parts=2 if dtype == torch.float32 else 1)
    assert {v.gather for v in variants} == {True, False}
    for variant in variants:
        assert TileVariant.from_name(variant.name) == variant
        assert excess(run(case, x, weight, bias, variant), x, weight, bias, CALL) <= 1.0


def test_a_silent_tile_is_its_bias():
    case = Case((1, 8, 16, 4), (5, 8, 3, 3), CALL)
    x, weight, bias = case.tensors(torch.float16, 0.0, "binary", 0)
    x[0, 3, 0, 0] = 1.0
    y = run(case, x, weight, bias, TileVariant(4, True, 16, 16, 4, 2))
    assert torch.equal(y[0, :, 4:], bias[:, None, None].expand(5, 12, 4))


def test_neither_bias_nor_weight_need_be_contiguous():
    case = Case((1, 20, 5, 5), (6, 20, 3, 3), CALL)
    x, weight, bias = case.tensors(torch.float32, 0.3, "binary", 0)
    weight = weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    bias = torch.stack((bias, torch.full_like(bias, float("nan"))), -1)[:, 0]
    assert excess(run(case, x, weight, bias, TileVariant(4, True, 16, 16, 4, 2)), x, weight, bias, CALL) <= 1.0


def test_results_do_not_depend_on_the_run_or_the_tile():
    case = Case((1, 40, 9, 9), (6, 40, 3, 3), CALL)
    x, weight, bias = case.tensors(torch.float32, 0.3, "binary", 0)
    weight = (weight * 64).round() / 64  # sums of these are exact in any order
    first = run(case, x, weight, bias.round(), TileVariant(8, True, 16, 16, 4, 2))
    for variant in (TileVariant(8, True, 16, 16, 4, 2), TileVariant(4, False, 16, 32, 4, 2)):
        assert torch.equal(run(case, x, weight, bias.round(), variant), first)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_beyond_every_range_come_out_as_in_dense(value, dtype):
    case = Case((1, 20, 5, 5), (4, 20, 3, 3), CALL)
    x, weight, bias = case.tensors(dtype, 0.1, "binary", 0)
    x[0, 3, 2, 2] = value
    y = run(case, x, weight, bias, TileVariant(4, True, 16, 16, 4, 2))
    dense = torch.conv2d(x, weight, bias, padding=1)
    assert torch.equal(y.isnan(), dense.isnan())
    torch.testing.assert_close(y, dense, equal_nan=True, rtol=1e-2, atol=1e-2)


def test_offsets_need_not_fit_32_bits():
    case = Case((1, 20, 2, 3), (4, 20, 1, 1), ConvCall((1, 1), ((0, 0), (0, 0)), (1, 1), 1))
    x, weight, bias = case.tensors(torch.float16, 0.5, "binary", 0)
    row = 2**31 + 16
    # 4 GB of which only a few pages are ever touched, and so exist.
    far = torch.tensor([], dtype=torch.float16).set_(
        torch.UntypedStorage(2 * (row + 60)), 0, case.x_shape, (row + 60, 1, row, 20)
    )
    far.copy_(x)
    assert excess(run(case, far, weight, bias, TileVariant(4, True, 16, 16, 4, 2)), x, weight, bias, case.call) <= 1.0


@pytest.mark.parametrize("features", [4096, 50_000])
def test_offsets_inside_the_weight_are_wide_where_they_have_to_be(features):
    x = torch.empty(4, features, dtype=torch.float16, device="meta")
    kernel = TileLinear(4, features, features, x.dtype, tf32=False)
    variant = kernel.variants()[0]
    with recording() as launches:
        packed = kernel.pack(torch.empty(features, features, dtype=x.dtype, device="meta"), variant)
        kernel.compute(x, kernel.prescan(x, variant), packed, None, variant)
    assert [launch.constants["WIDE"] for launch in launches] == [False, features == 50_000]


def test_wide_offsets_find_the_same_weights():
    case = Case((1, 20, 5, 5), (6, 20, 3, 3), CALL)
    x, weight, bias = case.tensors(torch.float32, 0.3, "graded", 0)
    variant = TileVariant(4, True, 16, 16, 4, 2)
    narrow = run(case, x, weight, bias, variant)
    with mock.patch.object(gemm, "is_wide", return_value=True):
        assert torch.equal(run(case, x, weight, bias, variant), narrow)


def test_tf32_rounds_no_worse_than_tf32():
    case = Case((1, 20, 5, 5), (4, 20, 3, 3), CALL)
    x, weight, _ = case.tensors(torch.float32, 0.3, "binary", 0)
    tiling = Tiling.of_side(case.geometry, 4)
    scan = prescan_tiles(x, tiling, 16, gather=True)
    packed = pack(weight, 1, tf32=True, inspect=True)
    y = tile_gemm(x, scan, packed, None, torch.empty(1, 4, 5, 5), tiling, block_n=16, block_k=16, warps=4, stages=2)
    magnitude = torch.conv2d(x.double(), weight.double().abs(), padding=1)
    error = (y.double() - torch.conv2d(x.double(), weight.double(), padding=1)).abs()
    assert packed.parts.shape[0] == 1
    assert (error <= 2.0**-11 * magnitude).all()
    assert error.max() > 2.0**-20 * magnitude.max()
