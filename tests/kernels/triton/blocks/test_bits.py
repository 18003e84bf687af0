"""Operations on packed bits in Triton's interpreter against plain PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflow.kernels.blocks import spikes
from sparseflow.kernels.blocks.spikes import PackedSpikes, unpack
from sparseflow.kernels.triton.blocks.ops import TritonBlockOps

from ..cases import SEEDS
from .cases import assert_same, draw

OPS = TritonBlockOps()
CHANNELS = st.sampled_from([1, 31, 32, 33, 64, 65, 100, 200])
SIZES = st.sampled_from([(), (5,), (3, 4), (2, 3, 2)])
DENSITIES = st.sampled_from([0.0, 0.1, 0.6, 1.0])


def packed(x: torch.Tensor, lead: int) -> PackedSpikes:
    return spikes.pack(x, lead)


@settings(max_examples=10, deadline=None)
@given(CHANNELS, SIZES, DENSITIES, st.sampled_from([torch.float32, torch.float16, torch.uint8]), SEEDS)
def test_packing_takes_any_layout(channels, size, density, dtype, seed):
    wanted = draw((2, 3), channels, size, density, seed=seed)
    x = unpack(wanted).to(dtype)
    for layout in (x, x.contiguous(), torch.stack((x, x), -1)[..., 0], x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert_same(OPS.pack(layout, 2), wanted)


@settings(max_examples=10, deadline=None)
@given(CHANNELS, SIZES, DENSITIES, st.sampled_from([1, 9]), SEEDS)
def test_unpacking_gives_the_values_channels_last(channels, size, density, most, seed):
    x = draw((2, 2), channels, size, density, most=most, seed=seed)
    found, wanted = OPS.unpack(x), unpack(x)
    assert found.dtype == torch.float32
    assert found.movedim(2, -1).is_contiguous()
    assert torch.equal(found, wanted)


@settings(max_examples=10, deadline=None)
@given(CHANNELS, SIZES, st.sampled_from([(1, 1), (1, 4), (200, 200)]), DENSITIES, SEEDS)
def test_sums_are_counts_up_to_255(channels, size, most, density, seed):
    a, b = (draw((3,), channels, size, density, most=m, seed=seed + i) for i, m in enumerate(most))
    total = OPS.add(a, b)
    assert total.counts is not None
    assert_same(total, packed((unpack(a) + unpack(b)).clamp_max(255), 1))


@settings(max_examples=10, deadline=None)
@given(CHANNELS, SIZES, DENSITIES, SEEDS)
def test_logical_operations(channels, size, density, seed):
    a, b = (draw((2,), channels, size, density, seed=seed + i) for i in range(2))
    x, y = unpack(a), unpack(b)
    for op, wanted in (("and", x * y), ("and_not", x * (1 - y)), ("or", torch.maximum(x, y))):
        assert_same(OPS.logical(a, b, op), packed(wanted, 1))


def test_another_operation_is_refused():
    a = draw((1,), 3, (2,), 0.5)
    with pytest.raises(ValueError, match="and_not"):
        OPS.logical(a, a, "xor")


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.tuples(CHANNELS, st.sampled_from([1, 1, 5])), min_size=1, max_size=4),
    st.sampled_from([(), (2, 3)]),
    DENSITIES,
    SEEDS,
)
def test_concatenation_keeps_every_channel(parts, size, density, seed):
    drawn = [draw((2, 2), c, size, density, most=most, seed=seed + i) for i, (c, most) in enumerate(parts)]
    whole = OPS.concat(tuple(drawn))
    assert (whole.counts is None) == all(part.counts is None for part in drawn)
    assert_same(whole, packed(torch.cat([unpack(part) for part in drawn], 2), 2))


WINDOWS = tuple(itertools.product((1, 2, 3), (1, 2), (0, 1)))


@pytest.mark.parametrize(("dims", "channels"), [(1, 70), (2, 70), (3, 3)])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [w for w in WINDOWS if w[2] <= w[0] // 2])
def test_pooling(dims, kernel, stride, padding, channels):
    x = draw((1, 2), channels, (5, 6, 3)[:dims], 0.15)
    dense = unpack(x).flatten(0, 1)
    lead = [1] * (3 - dims)
    triples = [(*lead, *[kernel] * dims), (*lead, *[stride] * dims), (*[0] * (3 - dims), *[padding] * dims)]
    pooling = {1: (F.max_pool1d, F.avg_pool1d), 2: (F.max_pool2d, F.avg_pool2d), 3: (F.max_pool3d, F.avg_pool3d)}
    maximum, average = pooling[dims]
    for dilation in (1, 2):
        if dilation * (kernel - 1) >= 3 + 2 * padding:
            continue
        wanted = maximum(dense, kernel, stride, padding, dilation)
        found = OPS.max_pool(x, *triples, (*lead, *[dilation] * dims))
        assert_same(found, packed(wanted.unflatten(0, (1, 2)), 2))
    for include in (True, False):
        found = OPS.avg_pool(x, *triples, include)
        wanted = average(dense, kernel, stride, padding, count_include_pad=include).unflatten(0, (1, 2))
        assert torch.equal(found, wanted)
        assert found.movedim(2, -1).is_contiguous()


def test_counts_are_averaged_too():
    x = draw((2,), 40, (4, 4), 0.5, most=9)
    found = OPS.avg_pool(x, (1, 2, 2), (1, 2, 2), (0, 0, 0), True)
    assert torch.equal(found, F.avg_pool2d(unpack(x), 2))
