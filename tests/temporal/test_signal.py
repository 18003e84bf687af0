from __future__ import annotations

import pytest
import torch

from sparseflow.temporal import time_share


def rates(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1000))


def drawn(rate, steps, seed=2):
    return (torch.rand(steps, *rate.shape, generator=torch.Generator().manual_seed(seed)) < rate).float()


def bar(steps, side, speed):
    x = torch.zeros(steps, 2, 1, side, side)
    for t in range(steps):
        for width in range(3):
            x[t, :, :, :, (t * speed + width) % side] = 1
    return x


@pytest.mark.parametrize("steps", [4, 16, 64])
@pytest.mark.parametrize("shape", [(8, 1, 16, 16), (8, 2, 10, 7), (16, 64)])
def test_independent_spikes_have_nothing_in_time(steps, shape):
    assert time_share(drawn(rates(*shape), steps)) < 0.05


def test_the_share_of_rate_coded_input_is_nearly_always_zero():
    found = [time_share(drawn(rates(8, 1, 16, 16), 8, seed)) for seed in range(30)]
    assert sum(found) / 30 < 0.01


@pytest.mark.parametrize("speed", [1, 2, 5])
def test_what_moves_is_in_time(speed):
    assert time_share(bar(16, 16, speed)) > 0.5


def test_noise_on_top_lowers_the_share_and_does_not_hide_it():
    moving = bar(16, 16, 1)
    noise = drawn(torch.full(moving.shape[1:], 0.2), 16)
    assert 0.2 < time_share((moving + noise).clamp(max=1)) < time_share(moving)


def test_rows_without_an_image():
    x = torch.zeros(16, 64, 32)
    for t in range(16):
        x[t, :, 2 * t : 2 * t + 4] = 1
    assert time_share(x) > 0.5


@pytest.mark.parametrize("x", [torch.ones(8, 2, 1, 4, 4), torch.rand(1, 2, 1, 4, 4), torch.zeros(4, 2, 3)])
def test_nothing_changes(x):
    assert time_share(x) == 0.0


def test_flicker_of_all_values_together():
    x = torch.ones(16, 32, 1, 8, 8)
    x[::2] = 0
    assert time_share(x) > 0.7
