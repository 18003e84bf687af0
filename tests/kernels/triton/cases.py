"""Random convolutions for the interpreter, which is slow: everything is tiny."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparseflow.kernels.base import ConvCall
from sparseflow.kernels.geometry import ConvGeometry

SEEDS = st.integers(0, 2**31 - 1)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution: shapes and arguments."""

    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    call: ConvCall

    @property
    def geometry(self) -> ConvGeometry:
        """The geometry the kernels are built for."""
        c = self.call
        return ConvGeometry.from_call(self.x_shape, self.w_shape, c.stride, c.padding, c.dilation, c.groups)

    def tensors(self, dtype: torch.dtype, density: float, values: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Input, weight and bias."""
        generator = torch.Generator().manual_seed(seed)
        x = (torch.rand(self.x_shape, generator=generator) < density).to(dtype)
        if values == "graded":
            x = x * torch.randn(self.x_shape, generator=generator).to(dtype)
        if values == "integer":
            x = x * torch.randint(1, 5, self.x_shape, generator=generator).to(dtype)
        weight = torch.randn(self.w_shape, generator=generator).to(dtype)
        return x, weight, torch.randn(self.w_shape[0], generator=generator).to(dtype)


@st.composite
def convolutions(draw, groups=(1, 1, 1, 2), channels=(1, 3, 17, 40), outputs=(1, 5, 18)) -> Case:
    """Convolutions of one to three dimensions, with strides, dilation, uneven padding and groups."""
    rank = draw(st.sampled_from([1, 2, 2, 2, 3]))
    count = draw(st.sampled_from(groups))
    per_group, out_per_group = draw(st.sampled_from(channels)), draw(st.sampled_from(outputs))
    most = 3 if rank < 3 else 2
    kernel = tuple(draw(st.integers(1, most)) for _ in range(rank))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    padding = tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(rank))
    extents = [draw(st.integers(1, 6 if rank < 3 else 3)) for _ in range(rank)]
    size = tuple(extent + d * (k - 1) for extent, k, d in zip(extents, kernel, dilation, strict=True))
    call = ConvCall(stride, padding, dilation, count)
    x_shape = (draw(st.integers(1, 2)), per_group * count, *size)
    return Case(x_shape, (out_per_group * count, per_group, *kernel), call)


def with_layout(x: Tensor, layout: str) -> Tensor:
    """``x`` contiguous (``"first"``), channels innermost (``"last"``), or a view with gaps (``"strided"``)."""
    if layout == "last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        return torch.stack((x, torch.full_like(x, float("nan"))), -1)[..., 0]
    return x.contiguous()
