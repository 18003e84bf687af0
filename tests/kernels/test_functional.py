"""The functional operations against the float64 oracle, under autograd, compile and export."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflow.kernels import functional
from sparseflow.kernels.base import LinearCall, conv_layout
from sparseflow.kernels.reference import excess

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def spikes(shape, density, seed=0, values=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(shape, generator=generator) < density).to(dtype)
    if values == "graded":
        return mask * torch.randn(shape, generator=generator).to(dtype)
    if values == "integer":
        return mask * torch.randint(1, 4, shape, generator=generator).to(dtype)
    return mask


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


SEEDS = st.integers(0, 2**31 - 1)


@st.composite
def conv_cases(draw):
    rank = draw(st.sampled_from([1, 2, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    per_group = draw(st.sampled_from([1, 3, 8, 17, 33, 70]) if rank < 3 else st.sampled_from([1, 5, 16]))
    out_per_group = draw(st.sampled_from([1, 4, 16, 19, 40]))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(rank))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    same = draw(st.booleans())
    stride = (1,) * rank if same else tuple(draw(st.integers(1, 3)) for _ in range(rank))
    padding = "same" if same else tuple(draw(st.integers(0, 2)) for _ in range(rank))
    size = tuple(draw(st.integers(1, 4)) + d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
    case = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    x_shape = (draw(st.integers(0, 3)), per_group * groups, *size)
    w_shape = (out_per_group * groups, per_group, *kernel)
    return x_shape, w_shape, case


@settings(max_examples=120, deadline=None)
@given(
    conv_cases(),
    st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]),
    st.sampled_from([None, "integer", "graded"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.booleans(),
    SEEDS,
)
def test_conv_stays_inside_the_error_budget(case, density, values, dtype, channels_last, seed):
    x_shape, w_shape, arguments = case
    x = spikes(x_shape, density, seed, values, dtype)
    if channels_last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    weight, bias = randn(*w_shape, seed=seed, dtype=dtype), randn(w_shape[0], seed=seed + 1, dtype=dtype)
    y = functional.conv(x, weight, bias, **arguments)
    dense = _CONV[x.dim() - 2](x, weight, bias, **arguments)
    assert y.dtype == dense.dtype
    assert y.shape == dense.shape
    assert y.stride() == dense.stride() or not y.numel()
    call = functional.conv_call(x.dim() - 2, weight, **arguments)
    assert excess(y, x, weight, bias, call) <= 1.0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=0, max_size=3),
    st.sampled_from([1, 7, 64, 130, 515]),
    st.sampled_from([1, 10, 16, 33, 260]),
    st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    st.sampled_from([None, "graded"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.booleans(),
    SEEDS,
)
def test_linear_stays_inside_the_error_budget(lead, k, m, density, values, dtype, biased, seed):
    x = spikes((*lead, k), density, seed, values, dtype)
    weight = randn(m, k, seed=seed, dtype=dtype)
    bias = randn(m, seed=seed + 1, dtype=dtype) if biased else None
    y = functional.linear(x, weight, bias)
    assert y.shape == (*lead, m)
    assert excess(y, x, weight, bias, LinearCall()) <= 1.0


def test_an_event_is_what_is_not_zero():
    weight = torch.randn(2, 3, 1, 1)
    negative_zero = torch.tensor([-0.0, 0.0, 1.0]).view(1, 3, 1, 1)
    assert torch.equal(functional.conv(negative_zero, weight).flatten(), weight[:, 2].flatten())
    nan = torch.tensor([0.0, float("nan"), 0.0]).view(1, 3, 1, 1)
    assert functional.conv(nan, weight).isnan().all()


@pytest.mark.parametrize(
    "arguments", [{"padding": 1}, {"stride": 2, "groups": 2}, {"padding": "same", "dilation": 2}], ids=str
)
def test_conv_gradients(arguments):
    x = spikes((2, 4, 5, 4), 0.3, dtype=torch.float64).requires_grad_()
    weight = torch.randn(6, 4 // arguments.get("groups", 1), 2, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    inside = x.detach() + 0.5  # away from zero, so that the finite differences see one formula
    inside.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, w, b: functional.conv(a, w, b, **arguments), (inside, weight, bias))
    grads = torch.autograd.grad(functional.conv(x, weight, bias, **arguments).square().sum(), (x, weight, bias))
    dense = torch.autograd.grad(F.conv2d(x, weight, bias, **arguments).square().sum(), (x, weight, bias))
    for ours, theirs in zip(grads, dense, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_linear_gradients():
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(functional.linear, (x, weight, bias))
    assert torch.autograd.gradcheck(functional.linear, (x[0, 0].detach().requires_grad_(), weight, bias))


def test_operations_pass_opcheck():
    x, weight, bias = spikes((2, 8, 6, 6), 0.2), torch.randn(4, 8, 3, 3), torch.randn(4)
    torch.library.opcheck(
        torch.ops.sparseflow.conv.default, (x, weight, bias, [1, 1], [1, 1, 0, 1], [1, 1], 1, functional.STATELESS)
    )
    for sample in (x.requires_grad_(), x.detach().to(memory_format=torch.channels_last)):
        torch.library.opcheck(
            torch.ops.sparseflow.conv.default,
            (sample, weight, None, [2, 1], [1, 1, 1, 1], [1, 1], 1, functional.STATELESS),
        )
    rows = spikes((3, 2, 8), 0.2)
    torch.library.opcheck(
        torch.ops.sparseflow.linear.default, (rows, torch.randn(5, 8, requires_grad=True), None, functional.STATELESS)
    )


def test_layout_question_leaves_no_trace_and_matches_pytorch():
    call = functional.conv_call(2, torch.empty(4, 8, 3, 3), 2, 1, 1, 1)
    for form in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 8, 7, 5).to(memory_format=form)
        weight = torch.randn(4, 8, 3, 3)
        layout = conv_layout(tuple(x.shape), x.stride(), tuple(weight.shape), weight.stride(), x.dtype, call)
        dense = call.dense(x, weight, None)
        assert layout.out_shape == tuple(dense.shape)
        assert layout.channels_last == (not dense.is_contiguous())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="spatial dimensions"):
        functional.conv(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="padding must be"):
        functional.conv(torch.zeros(1, 3, 4), torch.zeros(2, 3, 1), padding="valued")
    with pytest.raises(ValueError, match="one value or 2"):
        functional.conv(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 1, 1), stride=(1, 1, 1))
    with pytest.raises(ValueError, match="int32"):
        functional.linear(torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int32))
