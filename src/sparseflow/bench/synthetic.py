"""A network to try the tools on when there is no model at hand: random weights, calibrated batch norm."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from sparseflow.frameworks import register_neuron

NOTE = (
    "synthetic network: random weights, batch norm calibrated on noise. Its densities are not those of a trained "
    "model; pass FILE.py:function to measure your own."
)
_TIME_STEPS = 4
_WIDTHS = (3, 64, 128, 256)
_SIZE = 32


class MultiStepLIF(nn.Module):
    """Stateless LIF from ``[T, ...]`` to ``[T, ...]``: tau = 2, threshold 1, hard reset to 0."""

    def forward(self, current: Tensor) -> Tensor:
        spikes = torch.empty_like(current)
        v = torch.zeros_like(current[0])
        for t, x in enumerate(current):
            v = v + (x - v) / 2.0
            spikes[t] = v >= 1.0
            v = v.masked_fill(v >= 1.0, 0.0)
        return spikes


class _PerStep(nn.Sequential):
    """Applies its modules to every time step of ``[T, N, C, H, W]`` at once."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(0, 1)).unflatten(0, input.shape[:2])


def synthetic_network(seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A three-stage convolutional SNN in eval mode, and one input ``[4, 1, 3, 32, 32]``.

    >>> network, example = synthetic_network()
    >>> network(example).shape
    torch.Size([4, 1, 10])
    """
    register_neuron(MultiStepLIF, overwrite=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network()
        _calibrate_norms(network, _noise_images(16))
        return network, _noise_images(1)


def _network() -> nn.Module:
    stages: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(_WIDTHS):
        for source in (inputs, outputs):
            stride = 2 if source == inputs and inputs != _WIDTHS[0] else 1
            conv = nn.Conv2d(source, outputs, 3, stride, padding=1, bias=False)
            stages += [_PerStep(conv, nn.BatchNorm2d(outputs)), MultiStepLIF()]
    head = _PerStep(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(_WIDTHS[-1], 10))
    return nn.Sequential(*stages, head)


def _noise_images(count: int) -> Tensor:
    coarse = torch.rand(count, _WIDTHS[0], _SIZE // 4, _SIZE // 4)
    images = nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")
    return images.repeat(_TIME_STEPS, 1, 1, 1, 1)


def _calibrate_norms(network: nn.Module, x: Tensor) -> None:
    # Without it hardly a neuron fires, and a silent network would make any sparse path look good.
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        network.train()(x)
    network.eval()
