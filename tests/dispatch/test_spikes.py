"""Inputs to measure with: their density, their structure, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparseflow.dispatch.spikes import clustered_spikes, synthetic_spikes

# Share of channels silent in a tile of 16 / 8 / 4 pixels with its 1-pixel halo, of a trained spiking ResNet at 10.7 %.
TRAINED = {16: 0.53, 8: 0.62, 4: 0.71}


def silent_share(spikes, side):
    tiles = F.max_pool2d(F.pad(spikes, (1, 1, 1, 1)), side + 2, stride=side, ceil_mode=True)
    return float((tiles == 0).float().mean())


@pytest.mark.parametrize("make", [synthetic_spikes, clustered_spikes])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_spikes_look_like_the_input(make, density):
    like = torch.zeros(4, 64, 16, 16, dtype=torch.float16).to(memory_format=torch.channels_last)
    state = torch.get_rng_state()
    spikes = make(like, density)
    assert (spikes.shape, spikes.dtype, spikes.stride()) == (like.shape, like.dtype, like.stride())
    assert set(spikes.unique().tolist()) <= {0.0, 1.0}
    assert float(spikes.float().mean()) == pytest.approx(density, abs=0.01)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(make(like, density), spikes)
    assert density in (0.0, 1.0) or not torch.equal(make(like, density, seed=1), spikes)


def test_clustered_spikes_leave_channels_silent_as_trained_nets_do():
    like = torch.zeros(4, 256, 56, 56)
    clustered, independent = clustered_spikes(like, 0.107), synthetic_spikes(like, 0.107)
    for side, share in TRAINED.items():
        assert silent_share(clustered, side) == pytest.approx(share, abs=0.1)
        assert silent_share(independent, side) < 0.1


@pytest.mark.parametrize("shape", [(3, 40), (2, 40, 9), (2, 40, 7, 7), (2, 10, 3, 5, 7), (1, 1, 1, 1), (0, 4, 3, 3)])
def test_clustered_spikes_of_any_rank(shape):
    spikes = clustered_spikes(torch.zeros(shape), 0.25)
    assert spikes.shape == shape
    if spikes.numel() > 50:
        assert float(spikes.mean()) == pytest.approx(0.25, abs=1 / spikes.numel())
