"""Random small layers with spikes, for property tests."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparseflow.study.records import LayerShape


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A layer, spikes ``[T, C_in, H, W]`` (``[T, C_in]`` if linear), and a seed."""

    shape: LayerShape
    spikes: Tensor
    seed: int

    @property
    def counts(self) -> Tensor:
        """``[1, T, C_in]``."""
        return self.spikes.reshape(*self.spikes.shape[:2], -1).sum(2)[None]


def convolution(
    inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, padding: int = 1, size: int = 6, groups: int = 1
) -> LayerShape:
    """A square convolution."""
    out = (size + 2 * padding - kernel) // stride + 1
    pairs = {"kernel": kernel, "stride": stride, "padding": padding, "in_size": size, "out_size": out}
    return LayerShape("conv", inputs, outputs, groups=groups, **{name: (value, value) for name, value in pairs.items()})


@st.composite
def convolutions(draw) -> Drawn:
    """Convolutions of any stride, padding and groups, whose maps may be empty or full."""
    groups = draw(st.sampled_from([1, 1, 2]))
    kernel = draw(st.sampled_from([1, 2, 3]))
    shape = convolution(
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 4)),
        kernel=kernel,
        stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, kernel - 1)),
        size=draw(st.integers(3, 6)),
        groups=groups,
    )
    return _with_spikes(draw, shape, shape.in_channels, *shape.in_size)


@st.composite
def linears(draw) -> Drawn:
    """Linear layers."""
    shape = LayerShape("fc", draw(st.integers(1, 20)), draw(st.integers(1, 12)))
    return _with_spikes(draw, shape, shape.in_channels)


def _with_spikes(draw, shape: LayerShape, *size: int) -> Drawn:
    seed, steps = draw(st.integers(0, 2**16)), draw(st.integers(1, 3))
    density = draw(st.sampled_from([0.0, 0.05, 0.3, 0.8, 1.0]))
    generator = torch.Generator().manual_seed(seed)
    return Drawn(shape, (torch.rand(steps, *size, generator=generator) < density).float(), seed)


layers = st.one_of(convolutions(), linears())
