"""Cycles of the event-driven accelerator: the formulas, and what holds of them for every layer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflow.study.hardware import Accelerator, cycles, network_cycles, phases, positions
from sparseflow.study.records import LayerShape

from .layer_shapes import Drawn, convolution, convolutions, layers

WIDTHS = st.one_of(st.none(), st.integers(1, 40))
UNITS = st.integers(1, 6)


def test_convolution_by_hand():
    shape = convolution(2, 5, size=4)  # 16 positions, two passes with three units
    counts = torch.tensor([[[1.0, 0.0], [4.0, 16.0]]])
    # Two chunks of 8: encoding takes 2 s + 7, accumulating 9 s.
    by_hand = 2 * ((9 + 7 + 16) + (36 + 144 + 16))
    assert cycles(shape, counts, Accelerator(encoder_width=8, neuron_units=3)).tolist() == [by_hand]


def test_encoding_decides_where_there_are_few_spikes():
    shape = convolution(1, 4, size=10)
    found = phases(shape, torch.tensor([[[1.0]]]), Accelerator(encoder_width=10, neuron_units=4))
    assert found.encode.item() == 2 + 2 * 10 + 3
    assert found.accumulate.item() == 9
    assert found.total.item() == found.encode.item() + 100


def test_linear_by_hand():
    shape = LayerShape("fc", 6, 10)
    counts = torch.tensor([[[1.0, 0, 0, 1, 1, 0], [0.0, 0, 0, 0, 0, 0]]])
    assert cycles(shape, counts, Accelerator(neuron_units=4)).tolist() == [(10 // 4 + 1) * ((3 + 2) + (1 + 2))]


def test_linear_layer_takes_summed_counts():
    shape, counts = LayerShape("fc", 6, 10), torch.arange(12.0).reshape(1, 2, 6)
    assert cycles(shape, counts, Accelerator()).equal(cycles(shape, counts.sum(2, keepdim=True), Accelerator()))


def test_encoder_width_is_a_quarter_of_the_map():
    shape = convolution(1, 1, size=6)
    counts = torch.tensor([[[0.0]]])
    assert cycles(shape, counts, Accelerator()).equal(cycles(shape, counts, Accelerator(encoder_width=9)))


@settings(deadline=None, max_examples=60)
@given(layers, WIDTHS, UNITS, st.floats(0, 5))
def test_more_spikes_never_take_less(drawn: Drawn, width, units, more):
    accelerator = Accelerator(width, units)
    extra = more * torch.rand(drawn.counts.shape, generator=torch.Generator().manual_seed(drawn.seed))
    before, after = (phases(drawn.shape, counts, accelerator) for counts in (drawn.counts, drawn.counts + extra))
    assert all((late >= early).all() for early, late in zip(before, after, strict=True))


@settings(deadline=None, max_examples=60)
@given(layers, st.integers(1, 40), st.integers(1, 40), UNITS, UNITS)
def test_more_hardware_never_takes_longer(drawn: Drawn, width, other_width, units, other_units):
    small = Accelerator(min(width, other_width), min(units, other_units))
    large = Accelerator(max(width, other_width), max(units, other_units))
    assert cycles(drawn.shape, drawn.counts, large) <= cycles(drawn.shape, drawn.counts, small)


@settings(deadline=None, max_examples=60)
@given(layers, WIDTHS, UNITS)
def test_steps_add_up(drawn: Drawn, width, units):
    accelerator = Accelerator(width, units)
    each = [cycles(drawn.shape, step, accelerator) for step in drawn.counts.split(1, dim=1)]
    assert cycles(drawn.shape, drawn.counts, accelerator).item() == pytest.approx(sum(each).item())


@settings(deadline=None, max_examples=60)
@given(layers, WIDTHS, UNITS)
def test_images_are_counted_apart(drawn: Drawn, width, units):
    accelerator = Accelerator(width, units)
    twice = torch.cat([drawn.counts, torch.zeros_like(drawn.counts)])
    alone = [cycles(drawn.shape, image, accelerator).item() for image in twice.split(1)]
    assert cycles(drawn.shape, twice, accelerator).tolist() == alone


@settings(deadline=None, max_examples=60)
@given(convolutions(), WIDTHS, UNITS)
def test_total_lies_between_the_longer_phase_and_their_sum(drawn: Drawn, width, units):
    encode, accumulate, fire, total = phases(drawn.shape, drawn.counts, Accelerator(width, units))
    assert torch.maximum(encode, accumulate) + fire <= total <= encode + accumulate + fire


def test_groups_are_as_many_layers():
    accelerator, generator = Accelerator(neuron_units=2), torch.Generator().manual_seed(0)
    counts = torch.randint(0, 9, (3, 2, 4), generator=generator).float()
    grouped = cycles(convolution(4, 6, groups=2), counts, accelerator)
    halves = [cycles(convolution(2, 3), half, accelerator) for half in counts.split(2, dim=2)]
    assert grouped.equal(sum(halves))


def test_network_is_the_sum_or_the_slowest():
    shapes = [convolution(2, 4), LayerShape("fc", 8, 4)]
    counts = [torch.tensor([[[3.0, 1.0]], [[0.0, 0.0]]]), torch.tensor([[[2.0]], [[200.0]]])]
    pairs = list(zip(shapes, counts, strict=True))
    one, other = (cycles(shape, count, Accelerator()) for shape, count in pairs)
    assert network_cycles(pairs, Accelerator()).equal(one + other)
    assert network_cycles(pairs, Accelerator(), pipelined=True).equal(torch.maximum(one, other))
    assert one[0] > other[0]
    assert other[1] > one[1]


def test_positions():
    assert positions(convolution(3, 4, size=5)) == 25
    assert positions(LayerShape("fc", 7, 4)) == 7


def test_clock_turns_cycles_into_milliseconds():
    assert Accelerator(clock_mhz=50).ms(torch.tensor([100_000.0])).tolist() == [2.0]


@pytest.mark.parametrize(
    "options", [{"encoder_width": 0}, {"neuron_units": -1}, {"neuron_units": {"a": 0}}, {"clock_mhz": 0}]
)
def test_hardware_is_positive(options):
    with pytest.raises(ValueError, match="positive"):
        Accelerator(**options)


def test_units_by_name():
    accelerator, shape = Accelerator(neuron_units={"conv": 2}), convolution(1, 4)
    counts = torch.zeros(1, 1, 1)
    assert cycles(shape, counts, accelerator).equal(cycles(shape, counts, Accelerator(neuron_units=2)))
    with pytest.raises(ValueError, match="other: no neuron units; they are given for conv"):
        cycles(dataclasses.replace(shape, name="other"), counts, accelerator)


@pytest.mark.parametrize("counts", [torch.zeros(1, 2), torch.zeros(1, 1, 2), torch.zeros(2, 2, 2, 2)])
def test_counts_have_to_fit(counts):
    with pytest.raises(ValueError, match=r"conv: counts are \[N, T, 3\]"):
        cycles(convolution(3, 4), counts, Accelerator())


def test_counts_are_not_negative():
    with pytest.raises(ValueError, match="negative"):
        cycles(convolution(1, 4), torch.tensor([[[-1.0]]]), Accelerator())


def test_empty_network():
    with pytest.raises(ValueError, match="at least one layer"):
        network_cycles([], Accelerator())
