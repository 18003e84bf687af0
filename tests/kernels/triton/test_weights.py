"""Packed weights: what the parts add up to."""

from __future__ import annotations

import pytest
import torch

from sparseflow.kernels.triton.weights import Packed, pack, padded_outputs


def restored(packed: Packed) -> torch.Tensor:
    """``[groups, taps, channels, padded outputs]`` in float64."""
    total = packed.parts.double().sum(0)
    return total if packed.scale is None else total * packed.scale.double()[:, None, None]


def rows(weight: torch.Tensor, groups: int) -> torch.Tensor:
    outputs = weight.shape[0] // groups
    return weight.double().reshape(groups, outputs, weight.shape[1], -1).permute(0, 3, 2, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_weights_are_only_moved(dtype):
    weight = torch.randn(6, 5, 3, 2).to(dtype)
    packed = pack(weight, 2, tf32=False, inspect=True)
    assert packed.parts.shape == (1, 2, 6, 5, padded_outputs(3))
    assert torch.equal(restored(packed)[..., :3], rows(weight, 2))
    assert not restored(packed)[..., 3:].any()


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_two_parts_hold_all_but_the_last_bit(scale):
    weight = torch.randn(40, 30, 3, 3) * scale * torch.logspace(-8, 8, 40).view(-1, 1, 1, 1)
    packed = pack(weight, 1, tf32=False, inspect=True)
    assert packed.parts.shape[0] == 2
    assert packed.parts.dtype == torch.float16
    largest = rows(weight, 1).abs().amax((1, 2), keepdim=True)
    error = (restored(packed)[..., :40] - rows(weight, 1)).abs()
    assert (error <= 2.0**-23 * rows(weight, 1).abs() + 2.0**-39 * largest).all()


def test_three_parts_hold_everything():
    weight = torch.randn(8, 30, 3, 3) * torch.logspace(-30, 20, 30).view(1, -1, 1, 1)
    for inspect in (True, False):
        packed = pack(weight, 1, tf32=False, inspect=inspect)
        assert packed.parts.shape[0] == 3
        assert packed.parts.dtype == torch.bfloat16
        assert torch.equal(restored(packed)[..., :8], rows(weight, 1))


def test_every_magnitude_of_float32_has_parts():
    weight = torch.tensor([[3.4e38, 1.0], [-3.4028234e38, 3e38], [1e-41, 3e-45], [2e-38, 1e-40]])
    for inspect, tf32 in ((True, False), (False, False), (True, True)):
        packed = pack(weight, 1, tf32=tf32, inspect=inspect)
        error = (restored(packed)[..., :4] - rows(weight, 1)).abs()
        bound = (2.0**-11 if tf32 else 2.0**-23) * rows(weight, 1).abs().amax((1, 2), keepdim=True)
        assert (error <= bound + 2.0**-133).all()


@pytest.mark.parametrize(
    "weight",
    [
        torch.tensor([[1e20, 0.1, 0.2], [0.3, 0.1, 0.4]]),  # one that dwarfs the other weights of its output
        torch.tensor([[1e20, 1e-30], [3e20, 2e-30]]),  # a channel that scaling makes zero
    ],
)
def test_a_channel_that_two_parts_would_lose_takes_three(weight):
    packed = pack(weight, 1, tf32=False, inspect=True)
    assert packed.parts.shape[0] == 3
    assert torch.equal(restored(packed)[..., :2], rows(weight, 1))


@pytest.mark.parametrize("size", [(64, 64, 3, 3), (512, 512), (16, 2048, 1, 1)])
def test_ordinary_weights_take_two_parts(size):
    assert pack(torch.randn(size), 1, tf32=False, inspect=True).parts.shape[0] == 2


def test_without_a_look_at_the_values_three_parts_are_taken():
    assert pack(torch.randn(4, 4, 1, 1), 1, tf32=False, inspect=False).parts.shape[0] == 3


def test_silent_output_channels_stay_silent():
    weight = torch.randn(4, 4, 1, 1)
    weight[2] = 0.0
    assert not restored(pack(weight, 1, tf32=False, inspect=True))[..., 2].any()
