"""The meaning of packed spikes and of the operations on them, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflow.kernels.blocks import reference
from sparseflow.kernels.blocks.buffers import BufferPool
from sparseflow.kernels.blocks.records import Dynamics, Epilogue, State
from sparseflow.kernels.blocks.spikes import PackedSpikes, as_tensor, channels_last, pack, spatial, unpack
from sparseflow.kernels.geometry import ConvGeometry
from sparseflow.neuron import Charge, Reset, ResetTiming

SEEDS = st.integers(0, 2**31 - 1)
LIF = Dynamics(Charge.LEAK_INPUT, ">=", Reset.HARD, ResetTiming.SAME_STEP, 0.0, 1.0, decay=2.0)


def spikes(shape, density, most=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    events = torch.rand(shape, generator=generator) < density
    return events * torch.randint(1, most + 1, shape, generator=generator).float()


@settings(max_examples=100, deadline=None)
@given(
    lead=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    channels=st.sampled_from([1, 15, 63, 64, 65, 130]),
    size=st.lists(st.integers(1, 5), max_size=3),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    most=st.sampled_from([1, 3, 255]),
    seed=SEEDS,
)
def test_packing_keeps_every_value(lead, channels, size, density, most, seed):
    x = spikes((*lead, channels, *size), density, most, seed)
    packed = pack(x, len(lead))
    assert packed.shape == tuple(x.shape)
    assert (packed.numel, packed.dims, packed.size) == (x.numel(), len(size), spatial(tuple(size)))
    assert packed.bits.shape == (packed.images, packed.pixels, packed.words)
    assert packed.bits.is_contiguous()
    assert (packed.counts is not None) == bool((x > 1).any())
    assert packed.nonzero.tolist() == [int(x.count_nonzero())]
    rows = packed.size[0] * packed.size[1]
    assert torch.equal(
        packed.row_counts, (channels_last(x, len(lead)) != 0).view(packed.images, rows, -1).sum(-1).int()
    )
    assert torch.equal(unpack(packed), x)
    assert unpack(packed, torch.float64).dtype is torch.float64


def test_where_a_channel_lies():
    x = torch.zeros(2, 3, 130, 1, 2)  # [T, N, C, H, W]
    x[1, 2, 129, 0, 1] = 1
    x[0, 1, 63, 0, 0] = 1
    packed = pack(x, 2)
    assert packed.bits.count_nonzero() == 2
    assert packed.bits[1 * 3 + 2, 1, 2] == 1 << (129 - 128)
    assert packed.bits[1, 0, 0] == -(1 << 63)


@pytest.mark.parametrize("value", [0.5, -1.0, 256.0, float("nan"), float("inf")])
def test_only_small_whole_numbers_are_packed(value):
    with pytest.raises(ValueError, match=r"whole numbers in 0\.\.255"):
        pack(torch.full((1, 2), value), 1)


def test_layouts():
    x = torch.randn(2, 3, 4, 5)
    flat = channels_last(x, 1)
    assert flat.shape == (2, 20, 3)
    assert torch.equal(as_tensor(flat, (2, 3, 4, 5), 1), x)
    last = x.contiguous(memory_format=torch.channels_last)
    assert channels_last(last, 1).data_ptr() == last.data_ptr()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [(1, 1), ((0, 2), 1)])
def test_conv_is_the_convolution_of_the_dense_tensor(groups, padding):
    x, weight = spikes((4, 6, 7, 5), 0.4, most=3), torch.randn(8, 6 // groups, 3, 2, dtype=torch.float64)
    geometry = ConvGeometry.from_call(x.shape, weight.shape, (2, 1), padding, (1, 2), groups)
    before = padding[0][0] if isinstance(padding[0], tuple) else 1
    after = padding[0][1] if isinstance(padding[0], tuple) else 1
    padded = F.pad(x.double(), (1, 1, before, after))
    expected = F.conv2d(padded, weight, None, (2, 1), 0, (1, 2), groups)
    packed = pack(x.view(2, 2, *x.shape[1:]), 2)
    sums = reference.conv(packed, weight.unsqueeze(2), geometry, Epilogue(), None, None, 2)
    assert isinstance(sums, torch.Tensor)
    torch.testing.assert_close(as_tensor(sums, tuple(expected.shape), 1), expected)


def test_pixels_that_no_window_reaches():
    """With a stride, the last pixels may lie behind the last window; here they are all of the input."""
    geometry = ConvGeometry.from_call((1, 1, 1), (1, 1, 1), (3,), ((2, 0),), (1,), 1)
    found = reference.sums(pack(torch.ones(1, 1, 1), 1), torch.ones(1, 1, 1, 1, 1), geometry)
    assert found.tolist() == [[[0.0]]]


def test_the_epilogue_comes_before_the_neuron():
    x, weight = spikes((4, 5), 0.5), torch.randn(7, 5)
    scale, shift, residual = torch.randn(7), torch.randn(7), spikes((2, 2, 7), 0.5, most=4)
    geometry = ConvGeometry.from_call((4, 5, 1), (7, 5, 1), (1,), (0,), (1,), 1)
    epilogue = Epilogue(scale, shift, pack(residual, 2))
    state = State(torch.empty(2, 1, 7))
    found = reference.conv(pack(x.view(2, 2, 5), 2), weight.view(7, 5, 1, 1, 1), geometry, epilogue, LIF, state, 2)
    currents = (x @ weight.T * scale + shift + residual.view(4, 7)).view(2, 2, 7)
    v, expected = torch.zeros(2, 7), []
    for current in currents:
        v = v + (current - v) / 2.0
        expected.append((v >= 1).float())
        v = v * (1 - expected[-1])
    assert isinstance(found, PackedSpikes)
    assert found.shape == (2, 2, 7)
    assert torch.equal(unpack(found), torch.stack(expected))
    torch.testing.assert_close(state.v.view(2, 7), v)


@pytest.mark.parametrize("charge", [Charge.INTEGRATE, Charge.SYNAPTIC])
def test_two_calls_are_one(charge):
    neuron = Dynamics(charge, ">", Reset.SOFT, ResetTiming.NEXT_STEP, 0.0, 1.0, 0.9, synapse_decay=0.5)
    currents = torch.randn(5 * 3, 4, 6)

    def blank():
        return State(torch.empty(3, 4, 6), torch.empty(3, 4, 6) if neuron.synaptic else None, start=0.25)

    whole, parts = blank(), blank()
    whole.v_seq = torch.empty(5, 3, 4, 6)
    expected = reference.run_neuron(currents, neuron, whole, 5)
    first = reference.run_neuron(currents[:6], neuron, parts, 2)
    parts.fresh = False
    second = reference.run_neuron(currents[6:], neuron, parts, 3)
    assert torch.equal(torch.cat([first, second]), expected)
    assert torch.equal(parts.v, whole.v)
    assert torch.equal(whole.v_seq[-1], whole.v)
    assert (whole.syn is None) == (parts.syn is None)
    assert whole.syn is None or torch.equal(parts.syn, whole.syn)


def test_buffers_are_used_again_only_when_given_back():
    pool = BufferPool()
    first, second = (pool.take((2, 3), torch.int64) for _ in range(2))
    assert first is not second
    pool.give(first)
    assert pool.take((3, 2), torch.int64) is not first
    assert pool.take((2, 3), torch.int32) is not first
    assert pool.take((2, 3), torch.int64) is first
    packed = pack(torch.ones(1, 2), 1)
    pool.give_spikes(packed)
    assert pool.take(tuple(packed.bits.shape), torch.int64) is packed.bits
