"""Stage 1 of the fused convolution: the active channels of every tile, against a walk over its halo."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflow.kernels.blocks.spikes import unpack
from sparseflow.kernels.geometry import ConvGeometry
from sparseflow.kernels.triton.blocks.dynamics import half_words
from sparseflow.kernels.triton.blocks.layout import Layout
from sparseflow.kernels.triton.blocks.lists import list_channels

from ..cases import SEEDS, Case, convolutions
from ..test_prescan import halos
from .cases import draw


@settings(max_examples=12, deadline=None)
@given(
    convolutions(groups=(1,), channels=(3, 40, 300)),
    st.sampled_from([16, 64]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.02, 0.4, 1.0]),
    SEEDS,
)
def test_lists_hold_the_active_channels_and_their_bits(case: Case, pixels, at_once, steps, density, seed):
    n, channels, *size = case.x_shape
    c = case.call
    geometry = ConvGeometry.from_call(
        (steps * n, channels, *size), case.w_shape, c.stride, c.padding, c.dilation, c.groups
    )
    layout = Layout.of(geometry, steps)
    tiling = layout.tiling(pixels)
    x = draw((steps, n), channels, tuple(size), density, seed=seed)
    found = list_channels(half_words(x.bits), layout, tiling, steps, at_once)
    runs = -(-steps // at_once)
    # [steps, tiles, halo pixels, channels], and silence after the last step
    seen = torch.stack([halos(image, tiling) for image in _rows_or_images(unpack(x), layout)])
    seen = torch.nn.functional.pad(seen, (0, 0, 0, 0, 0, 0, 0, runs * at_once - steps))
    for number in range(tiling.count * runs):
        tile, run = divmod(number, runs)
        here = seen[run * at_once : (run + 1) * at_once, tile].flatten(0, 1)
        active = here.any(0).nonzero().flatten().tolist()
        assert found.found[number].item() == len(active)
        assert found.channels[number, : len(active)].tolist() == active
        for block in range(-(-len(active) // 32)):
            some = here[:, active[block * 32 : block * 32 + 32]]
            words = (some.long() << torch.arange(some.shape[1])).sum(1).to(torch.int32)
            assert torch.equal(found.kept[number, block], words)


def _rows_or_images(dense: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``[steps, N, C, *size]`` as the layout sees it: perhaps as rows of pixels."""
    g = layout.geometry
    if dense.shape[1] == g.batch and dense.shape[3:].numel() == g.in_pixels:
        return dense
    return dense.flatten(3).transpose(1, 2).flatten(2)[:, None]
