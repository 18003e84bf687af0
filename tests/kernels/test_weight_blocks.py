"""Which blocks of a weight are present, against a plain walk over them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflow.kernels.weight_blocks import present_blocks, present_share


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([(), (1,), (3, 3), (1, 2, 3)]),
    st.sampled_from([(16, 16), (4, 8), (64, 16)]),
    st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    st.integers(0, 2**31 - 1),
)
def test_a_block_is_present_where_something_is_not_zero(outputs, channels, kernel, block, density, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.rand(outputs, channels, *kernel, generator=generator) < density).float()
    found = present_blocks(weight, block)
    taps = weight.reshape(outputs, channels, -1)
    for row, some in enumerate(taps.split(block[0])):
        for column, of_block in enumerate(some.split(block[1], 1)):
            assert found[row, column].tolist() == of_block.any(0).any(0).tolist()
    assert found.shape == (-(-outputs // block[0]), -(-channels // block[1]), taps.shape[2])
    if block == (16, 16):
        assert present_share(weight) == round(float(found.float().mean()), 2)


def test_nan_and_infinity_are_present_and_negative_zero_is_not():
    for value, present in ((float("nan"), True), (float("-inf"), True), (-0.0, False), (1e-45, True)):
        assert present_blocks(torch.full((1, 1), value)).item() is present


def test_weights_in_any_layout():
    weight = torch.zeros(32, 48, 3, 3)
    weight[20, 33, 1, 2] = 1.0
    for form in (weight, weight.to(memory_format=torch.channels_last), weight.transpose(2, 3)):
        assert present_blocks(form).sum() == 1
    assert present_blocks(weight)[1, 2, 5]


@pytest.mark.parametrize("weight", [torch.empty(16, 16, device="meta"), torch.empty(0, 16)])
def test_a_weight_without_values_counts_as_full(weight):
    assert present_share(weight) == 1.0
