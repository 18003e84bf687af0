"""The depthwise Triton kernel against the float64 oracle, in the interpreter."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflow.kernels.base import ConvCall, conv_layout
from sparseflow.kernels.reference import excess
from sparseflow.kernels.triton import depthwise
from sparseflow.kernels.triton.depthwise import BlockVariant, DepthwiseConv
from sparseflow.kernels.triton.launch import recording

from .cases import DTYPES, SEEDS, Case, convolutions, with_layout
from .test_events import lazy_zeros, run

SAME = ConvCall((1, 1), ((1, 1), (1, 1)), (1, 1), 5)
GROUPS = (2, 5, 17, 40)


def kernel_of(case: Case, x, weight) -> DepthwiseConv:
    layout = conv_layout(tuple(x.shape), x.stride(), tuple(weight.shape), weight.stride(), x.dtype, case.call)
    return DepthwiseConv(case.geometry, layout, x.dtype)


@settings(max_examples=30, deadline=None)
@given(
    convolutions(groups=GROUPS, channels=(1,), outputs=(1, 1, 2, 3)),
    st.sampled_from([None, "tile8-c32", "tile4-c4", "tile16-c16"]),
    st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    st.sampled_from(["binary", "integer", "graded"]),
    st.sampled_from(DTYPES),
    st.sampled_from(["first", "last", "strided"]),
    st.booleans(),
    SEEDS,
)
def test_conv_stays_inside_the_error_budget(case, variant, density, values, dtype, layout, biased, seed):
    x, weight, bias = case.tensors(dtype, density, values, seed)
    x = with_layout(x, layout)
    bias = bias if biased else None
    y = run(kernel_of(case, x, weight), x, weight, bias, variant)
    dense = case.call.dense(x, weight, bias)
    assert (y.dtype, y.shape, y.stride()) == (dense.dtype, dense.shape, dense.stride())
    assert excess(y, x, weight, bias, case.call) <= 1.0


@pytest.mark.parametrize("layout", ["first", "last"])
def test_counts_follow_tiles_and_blocks(layout):
    """Of 2 x 2 tiles and three blocks of two channels, the corner pixel is in one halo, one on the border in all."""
    case = Case((1, 5, 8, 8), (5, 1, 3, 3), SAME)
    x = torch.zeros(case.x_shape)
    x[0, 0, 0, 0] = 1.0
    x[0, 4, 3, 4] = float("nan")
    scan = kernel_of(case, x, torch.zeros(case.w_shape)).prescan(with_layout(x, layout), "tile4-c2")
    assert (scan.words, scan.numel) == (2 * 2 * 3, 5 * 64)
    assert scan.totals().tolist() == [2, 1 + 4]


def test_a_halo_larger_than_a_block_is_scanned_in_pieces():
    case = Case((1, 5, 9, 9), (5, 1, 3, 3), SAME)
    x, weight, bias = case.tensors(torch.float32, 0.1, "graded", 0)
    with mock.patch.object(depthwise, "_ELEMENTS", 64):
        kernel = kernel_of(case, x, weight)
        assert kernel.prescan(x, "tile8-c4").totals()[0] == (x != 0).sum()
        assert excess(run(kernel, x, weight, bias, "tile8-c4"), x, weight, bias, SAME) <= 1.0


def test_silent_blocks_read_no_weights():
    case = Case((1, 5, 8, 8), (5, 1, 3, 3), SAME)
    x, weight, bias = case.tensors(torch.float32, 0.5, "binary", 0)
    x[:, 2:4] = 0
    clean = weight.clone()
    weight[2:4] = float("nan")
    assert excess(run(kernel_of(case, x, weight), x, weight, bias, "tile4-c2"), x, clean, bias, SAME) <= 1.0


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_inputs_reach_what_they_reach_in_dense(value, dtype):
    case = Case((1, 5, 6, 6), (5, 1, 3, 3), SAME)
    x, weight, bias = torch.zeros(case.x_shape, dtype=dtype), *case.tensors(dtype, 0.3, "graded", 3)[1:]
    x[0, 2, 3, 4] = value
    y, dense = run(kernel_of(case, x, weight), x, weight, bias), SAME.dense(x, weight, bias)
    assert torch.equal(y.isnan(), dense.isnan())
    assert torch.equal(y.isinf(), dense.isinf())


@pytest.mark.parametrize("strides", [(2**30 + 16, 15, 5, 1), (45, 2**30 + 16, 5, 1)])
def test_offsets_beyond_32_bits(strides):
    """The third image, or channel, starts past element 2 ** 31, though its index and stride fit 32 bits."""
    case = Case((3, 3, 3, 5), (3, 1, 3, 3), dataclasses.replace(SAME, groups=3))
    small, weight, bias = case.tensors(torch.float16, 0.5, "graded", 0)
    x = lazy_zeros(2 * (2**30 + 16) + 200, torch.float16).as_strided(small.shape, strides)
    x.copy_(small)
    assert excess(run(kernel_of(case, small, weight), x, weight, bias), small, weight, bias, case.call) <= 1.0


def test_results_are_the_same_every_time():
    case = Case((1, 5, 8, 8), (10, 1, 3, 3), SAME)
    x, weight, bias = case.tensors(torch.float32, 0.5, "graded", 0)
    kernel = kernel_of(case, x, weight)
    assert torch.equal(run(kernel, x, weight, bias), run(kernel, x, weight, bias))


def test_an_empty_batch():
    case = Case((0, 5, 8, 8), (5, 1, 3, 3), SAME)
    x, weight, bias = case.tensors(torch.float32, 0.5, "graded", 0)
    kernel = kernel_of(case, x, weight)
    assert run(kernel, x, weight, bias).shape == (0, 5, 8, 8)
    assert kernel.prescan(x, kernel.variants()[0]).totals().tolist() == [0, 0]


@pytest.mark.parametrize("size", [4, 20, 60])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_a_call_can_be_recorded_without_data(size, form):
    x = torch.empty(2, 96, size, size, device="meta").half().to(memory_format=form)
    weight = torch.empty(192, 1, 3, 3, device="meta").half()
    kernel = kernel_of(Case(tuple(x.shape), tuple(weight.shape), dataclasses.replace(SAME, groups=96)), x, weight)
    assert 1 <= len(kernel.variants()) <= 3
    for variant in kernel.variants():
        with recording() as launches:
            y = run(kernel, x, weight, None, variant)
        assert y.shape == (2, 192, size, size)
        assert [launch.arguments["x_ptr"] is x for launch in launches] == [True, True]
        assert launches[1].grid[0] == 2 * launches[0].grid[0]
        assert BlockVariant.from_name(variant).name == variant


def test_other_groups_and_names_are_refused():
    with pytest.raises(ValueError, match="not depthwise"):
        DepthwiseConv(Case((1, 4, 5, 5), (4, 2, 3, 3), dataclasses.replace(SAME, groups=2)).geometry, None, torch.half)
    with pytest.raises(ValueError, match="not a variant"):
        BlockVariant.from_name("c32")
