"""The twenty layer shapes of the density sweep: convolutions of known nets, odd ones, and linear layers."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer and its input size; ``size`` is ``[N, ...]`` with T folded into N, as multi-step models run it."""

    name: str
    size: tuple[int, ...]
    kind: str
    arguments: tuple[int, ...]
    options: tuple[tuple[str, int], ...] = ()

    def layer(self) -> nn.Module:
        """The layer with weights of unit gain and a bias."""
        torch.manual_seed(0)
        return getattr(nn, self.kind)(*self.arguments, **dict(self.options)).eval()


def _conv(name: str, batch: int, c_in: int, c_out: int, kernel: int, side: int, **options: int) -> Shape:
    options.setdefault("padding", kernel // 2)
    return Shape(name, (batch, c_in, side, side), "Conv2d", (c_in, c_out, kernel), tuple(options.items()))


SHAPES = (
    _conv("3x3 64@56", 4, 64, 64, 3, 56),
    _conv("3x3 128@28", 4, 128, 128, 3, 28),
    _conv("3x3 256@14", 4, 256, 256, 3, 14),
    _conv("3x3 512@7", 4, 512, 512, 3, 7),
    _conv("3x3 64->128@56 stride 2", 4, 64, 128, 3, 56, stride=2),
    _conv("1x1 64->128@56 stride 2", 4, 64, 128, 1, 56, stride=2),
    _conv("1x1 64->256@56", 4, 64, 256, 1, 56),
    _conv("1x1 256->64@56", 4, 256, 64, 1, 56),
    _conv("1x1 1024->256@14", 4, 1024, 256, 1, 14),
    _conv("3x3 32@32", 4, 32, 32, 3, 32),
    _conv("3x3 256@4", 4, 256, 256, 3, 4),
    _conv("3x3 128@16, batch 32", 128, 128, 128, 3, 16),
    _conv("5x5 32->64@28", 4, 32, 64, 5, 28),
    _conv("3x3 grouped (32) 128@28", 4, 128, 128, 3, 28, groups=32),
    _conv("3x3 depthwise 384@14", 4, 384, 384, 3, 14, groups=384),
    Shape("conv1d k1 256@196", (4, 256, 196), "Conv1d", (256, 256, 1)),
    Shape("conv3d 3x3x3 32@8x16x16", (2, 32, 8, 16, 16), "Conv3d", (32, 32, 3), (("padding", 1),)),
    Shape("linear 4096->4096, T*N 1", (1, 4096), "Linear", (4096, 4096)),
    Shape("linear 4096->4096, T*N 32", (32, 4096), "Linear", (4096, 4096)),
    Shape("linear 512->10, T*N 4", (4, 512), "Linear", (512, 10)),
)
DENSITIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0)
