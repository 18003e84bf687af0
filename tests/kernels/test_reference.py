"""The error budget where numbers end: infinities, overflow, underflow."""

from __future__ import annotations

import pytest
import torch

from sparseflow.kernels import reference
from sparseflow.kernels.base import LinearCall
from sparseflow.kernels.reference import error_budget, excess

CALL = LinearCall()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_hides_no_error_elsewhere(value):
    x, weight = torch.ones(2, 4), torch.ones(3, 4)
    x[0, 0] = value
    y = CALL.dense(x, weight, None)
    assert excess(y, x, weight, None, CALL) <= 1.0
    y[1, 2] += 1.0
    assert excess(y, x, weight, None, CALL) > 1e3
    assert excess(torch.zeros_like(y), x, weight, None, CALL) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_sum_beyond_the_range_may_overflow_and_hides_no_error_elsewhere(dtype):
    x, weight = torch.ones(1, 4, dtype=dtype), torch.ones(2, 4, dtype=dtype)
    weight[0] = torch.finfo(dtype).max
    dense = CALL.dense(x, weight, None)
    assert dense[0, 0].isinf()
    assert excess(dense, x, weight, None, CALL) <= 1.0
    assert excess(dense + 1, x, weight, None, CALL) > 1.0
    assert excess(torch.full_like(dense, float("inf")), x, weight, None, CALL) == float("inf")


def test_what_is_flushed_to_zero_is_no_error():
    x, weight = torch.ones(1, 4), torch.full((2, 4), 1e-42)
    assert excess(torch.zeros(1, 2), x, weight, None, CALL) <= 1.0
    assert excess(torch.zeros(1, 2), x, weight * 1e6, None, CALL) > 1.0


def test_the_budget_of_half_precision_reaches_its_smallest_numbers():
    x, weight = torch.ones(1, 1, dtype=torch.float16), torch.full((1, 1), 1e-7, dtype=torch.float16)
    assert 2.0**-25 <= error_budget(x, weight, None, CALL).item() < 2.0**-24


class OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("allowed", [False, True])
def test_the_budget_is_that_of_tf32_only_where_the_user_allows_it(monkeypatch, allowed):
    monkeypatch.setattr(reference, "tf32_matmul", lambda: allowed)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.ones(1, 64), torch.randn(8, 64, generator=generator)
    rounded = weight.half().float()  # as many bits as TF32
    y = CALL.dense(x, rounded, None)
    assert (excess(y, x.as_subclass(OnGpu), weight, None, CALL) <= 1.0) == allowed
    assert excess(y, x, weight, None, CALL) > 1.0
    assert excess(y.half(), x.half().as_subclass(OnGpu), weight.half(), None, CALL) <= 1.0
