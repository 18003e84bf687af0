"""The event-driven Triton kernels against the float64 oracle, in the interpreter."""

from __future__ import annotations

import math
import mmap
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflow.kernels.base import ConvCall, LinearCall, conv_layout
from sparseflow.kernels.reference import excess
from sparseflow.kernels.triton import events, rows
from sparseflow.kernels.triton.events import EventConv, EventLinear, Walk
from sparseflow.kernels.triton.launch import recording
from sparseflow.kernels.triton.rows import chunk_channels, chunks_of, scan_rows

from .cases import DTYPES, SEEDS, Case, convolutions, with_layout

SAME = ConvCall((1, 1), ((1, 1), (1, 1)), (1, 1), 1)
DENSITIES = st.sampled_from([0.0, 0.02, 0.2, 1.0])
VALUES = st.sampled_from(["binary", "integer", "graded"])


def kernel_of(case: Case, x, weight) -> EventConv:
    layout = conv_layout(tuple(x.shape), x.stride(), tuple(weight.shape), weight.stride(), x.dtype, case.call)
    return EventConv(case.geometry, layout, x.dtype)


def run(kernel, x, weight, bias, variant=None):
    variant = variant or kernel.variants()[0]
    return kernel.compute(x, kernel.prescan(x, variant), kernel.pack(weight, variant, inspect=False), bias, variant)


def lazy_zeros(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take no memory until they are touched."""
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize), dtype=dtype)


@settings(max_examples=30, deadline=None)
@given(
    convolutions(),
    st.sampled_from(["p16e4o16s1", "p2e2o16s1", "p1e8o32s1", None]),
    st.sampled_from([16, 512]),
    DENSITIES,
    VALUES,
    st.sampled_from(DTYPES),
    st.sampled_from(["first", "last", "strided"]),
    st.booleans(),
    SEEDS,
)
def test_conv_stays_inside_the_error_budget(case, walk, chunk, density, values, dtype, layout, biased, seed):
    x, weight, bias = case.tensors(dtype, density, values, seed)
    x = with_layout(x, layout)
    bias = bias if biased else None
    with mock.patch.object(rows, "_CHUNK", chunk):
        y = run(kernel_of(case, x, weight), x, weight, bias, walk)
    dense = case.call.dense(x, weight, bias)
    assert (y.dtype, y.shape, y.stride()) == (dense.dtype, dense.shape, dense.stride())
    assert excess(y, x, weight, bias, case.call) <= 1.0


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 3), max_size=2),
    st.sampled_from([1, 40, 600]),
    st.sampled_from([1, 10, 33]),
    st.sampled_from([None, "p1e8o16s1", "p1e4o32s4", "p1e16o16s16"]),
    DENSITIES,
    VALUES,
    st.sampled_from(DTYPES),
    st.booleans(),
    SEEDS,
)
def test_linear_stays_inside_the_error_budget(lead, k, m, walk, density, values, dtype, biased, seed):
    case = Case((math.prod(lead), k, 1), (m, k, 1), SAME)
    x, weight, bias = case.tensors(dtype, density, values, seed)
    x, weight, bias = x.view(*lead, k), weight[..., 0], bias if biased else None
    y = run(EventLinear(math.prod(lead), k, m, dtype), x, weight, bias, walk)
    assert y.shape == (*lead, m)
    assert y.is_contiguous()
    assert excess(y, x, weight, bias, LinearCall()) <= 1.0


@pytest.mark.parametrize("layout", ["first", "last", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lists_hold_every_event_in_order(layout, dtype):
    case = Case((2, 2 * 37, 3, 5), (4, 37, 1, 1), ConvCall((1, 1), ((0, 0), (0, 0)), (1, 1), 2))
    x, _, _ = case.tensors(dtype, 0.3, "graded", 0)
    with mock.patch.object(rows, "_CHUNK", 16):
        chunk, chunks = chunk_channels(case.geometry), chunks_of(case.geometry)
        scan = scan_rows(with_layout(x, layout), case.geometry)
    assert (chunk, chunks, scan.words, scan.numel) == (16, 3, 2 * 2 * 3 * 15, x.numel())
    padded = torch.nn.functional.pad(x.view(2, 2, 37, 15), (0, 0, 0, chunk * chunks - 37))
    lists = padded.view(2, 2, chunks, chunk, 15).transpose(-1, -2).reshape(-1, chunk)
    for row, count, channels, values in zip(lists, scan.counts, scan.channels, scan.values, strict=True):
        active = row.nonzero()[:, 0]
        assert int(count) == len(active)
        assert torch.equal(channels[:count].long(), active)
        assert torch.equal(values[:count], row[active])
    assert scan.totals().tolist() == [int((x != 0).sum()), int((lists != 0).any(1).sum())]


def test_only_weights_of_active_channels_are_read():
    case = Case((1, 20, 4, 4), (6, 20, 3, 3), SAME)
    x, weight, _ = case.tensors(torch.float32, 0.3, "binary", 0)
    silent = torch.arange(20) % 3 == 0
    x[:, silent] = 0
    clean, poisoned = weight.clone(), weight.clone()
    poisoned[:, silent] = float("nan")
    assert excess(run(kernel_of(case, x, poisoned), x, poisoned, None), x, clean, None, SAME) <= 1.0


def test_only_weights_of_active_inputs_are_read():
    x, weight = torch.zeros(2, 600), torch.randn(10, 600)
    x[:, ::7] = 1.0
    poisoned = weight.clone()
    poisoned[:, x[0] == 0] = float("nan")
    kernel = EventLinear(2, 600, 10, torch.float32)
    for variant in kernel.variants():
        assert excess(run(kernel, x, poisoned, None, variant), x, weight, None, LinearCall()) <= 1.0


@pytest.mark.parametrize("bias", [None, torch.arange(6.0)])
def test_a_silent_input_costs_its_bias(bias):
    case = Case((2, 20, 4, 4), (6, 20, 3, 3), SAME)
    x, weight = torch.zeros(case.x_shape), torch.full(case.w_shape, float("nan"))
    expected = torch.zeros(2, 6, 4, 4) if bias is None else bias.view(6, 1, 1).expand(2, 6, 4, 4)
    assert torch.equal(run(kernel_of(case, x, weight), x, weight, bias), expected)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_inputs_reach_what_they_reach_in_dense(value, dtype):
    case = Case((2, 5, 4, 4), (6, 5, 3, 3), SAME)
    x, weight, bias = case.tensors(dtype, 0.3, "graded", 3)
    x[1, 2, 0, 1] = value
    y, dense = run(kernel_of(case, x, weight), x, weight, bias), SAME.dense(x, weight, bias)
    assert torch.equal(y.isnan(), dense.isnan())
    assert torch.equal(y.isinf(), dense.isinf())
    assert torch.equal(y[y.isinf()], dense[dense.isinf()])


def test_results_are_the_same_every_time():
    x, weight = (torch.rand(3, 600) < 0.3) * torch.randn(3, 600), torch.randn(33, 600)
    kernel = EventLinear(3, 600, 33, torch.float32)
    for variant in kernel.variants():
        assert torch.equal(run(kernel, x, weight, None, variant), run(kernel, x, weight, None, variant))


@pytest.mark.parametrize(
    ("x_shape", "w_shape"), [((0, 4, 5, 5), (3, 4, 3, 3)), ((2, 4, 5, 5), (0, 4, 3, 3)), ((2, 0, 5, 5), (3, 0, 3, 3))]
)
def test_empty_convolutions(x_shape, w_shape):
    case = Case(x_shape, w_shape, SAME)
    x, weight, bias = torch.ones(x_shape), torch.ones(w_shape), torch.ones(w_shape[0])
    layout = conv_layout((2, 4, 5, 5), (100, 25, 5, 1), (3, 4, 3, 3), (36, 9, 3, 1), x.dtype, SAME)
    shape = (x_shape[0], w_shape[0], 5, 5)
    kernel = EventConv(case.geometry, type(layout)(shape, layout.out_stride, layout.channels_last), x.dtype)
    assert torch.equal(run(kernel, x, weight, bias), torch.ones(shape))
    assert kernel.prescan(x, kernel.variants()[0]).totals().tolist()[0] == x.numel()


@pytest.mark.parametrize(("batch", "k", "m"), [(0, 600, 3), (2, 0, 3), (2, 600, 0)])
def test_empty_linear_layers(batch, k, m):
    kernel = EventLinear(batch, k, m, torch.float32)
    for variant in kernel.variants():
        y = run(kernel, torch.zeros(batch, k), torch.ones(m, k), torch.ones(m), variant)
        assert torch.equal(y, torch.ones(batch, m))


@pytest.mark.parametrize("strides", [(2**30 + 16, 15, 5, 1), (45, 2**30 + 16, 5, 1)])
def test_offsets_beyond_32_bits(strides):
    """The third image, or channel, starts past element 2 ** 31, though its index and stride fit 32 bits."""
    case = Case((3, 3, 3, 5), (4, 3, 3, 3), SAME)
    small, weight, bias = case.tensors(torch.float16, 0.5, "graded", 0)
    x = lazy_zeros(2 * (2**30 + 16) + 200, torch.float16).as_strided(small.shape, strides)
    x.copy_(small)
    assert excess(run(kernel_of(case, small, weight), x, weight, bias), small, weight, bias, SAME) <= 1.0


def test_wide_offsets_find_the_same_rows():
    case = Case((2, 5, 4, 4), (6, 5, 3, 3), SAME)
    x, weight, bias = case.tensors(torch.float32, 0.5, "graded", 0)
    kernel = kernel_of(case, x, weight)
    narrow = run(kernel, x, weight, bias)
    with mock.patch.object(events, "is_wide", return_value=True):
        assert torch.equal(run(kernel, x, weight, bias), narrow)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_call_can_be_recorded_without_data(dtype):
    x = torch.empty(3, 70_000, 100, 110, dtype=dtype, device="meta")  # 2.3e9 elements
    weight, bias = torch.empty(40, 70_000, 1, 1, dtype=dtype, device="meta"), torch.empty(40, device="meta")
    call = ConvCall((1, 1), ((0, 0), (0, 0)), (1, 1), 1)
    kernel = kernel_of(Case(tuple(x.shape), tuple(weight.shape), call), x, weight)
    with recording() as launches:
        y = run(kernel, x, weight, bias)
        kernel.prescan(x, kernel.variants()[0]).totals()
    assert (y.device.type, y.shape, y.dtype) == ("meta", (3, 40, 100, 110), dtype)
    assert [launch.arguments["x_ptr"] is x for launch in launches if "x_ptr" in launch.arguments] == [True, True]
    assert launches[1].arguments["bias_ptr"].dtype == dtype


def test_a_long_row_is_shared_out():
    x, weight = torch.empty(1, 25088, device="meta").half(), torch.empty(4096, 25088, device="meta").half()
    kernel = EventLinear(1, 25088, 4096, torch.float16)
    with recording() as launches:
        run(kernel, x, weight, None)
    scan, add, total = (math.prod(launch.grid) for launch in launches)
    assert scan == 25
    assert add == 8 * 64
    assert total * events._SUM_BLOCK == 4096


@given(st.integers(0, 5000), st.sampled_from([1, 3, 7]), st.integers(1, 300), st.integers(1, 60))
def test_walks_stay_small(channels, side, outputs, size):
    case = Case((2, channels, size + 6, size + 6), (outputs, channels, side, side), SAME)
    names = EventConv(case.geometry, None, torch.float16).variants()
    assert 1 <= len(names) <= 3
    for walk in map(Walk.from_name, names):
        segments = side * side * chunks_of(case.geometry)
        assert walk.pixels * walk.events <= 64
        assert walk.pixels == 1 or walk.pixels * segments <= 1024
        assert Walk.from_name(walk.name) is walk


def test_another_name_is_no_walk():
    with pytest.raises(ValueError, match="p16e4o64s1"):
        Walk.from_name("avx512")


def test_weights_are_packed_from_any_layout_and_padded_with_zeros():
    weight = torch.randn(6, 3, 3, 5).transpose(2, 3)
    kernel = EventConv(
        Case((1, 6, 9, 9), (6, 3, 5, 3), ConvCall((1, 1), ((0, 0), (0, 0)), (1, 1), 2)).geometry, None, weight.dtype
    )
    packed = kernel.pack(weight, kernel.variants()[0])
    assert packed.shape == (2, 15, 3, 16)
    assert torch.equal(packed[1, 4, 2, :3], weight[3:, 2, 1, 1])
    assert not packed[..., 3:].any()
