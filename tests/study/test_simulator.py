"""The simulated pipeline computes the layer, and takes as long as the formulas say, as far as they say it."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import simulated_cycles
from sparseflow.study import simulator
from sparseflow.study.hardware import Accelerator, phases
from sparseflow.study.records import LayerShape
from sparseflow.study.simulator import Tap, simulate

from .layer_shapes import Drawn, convolution, convolutions, linears

WIDTHS = st.one_of(st.none(), st.integers(1, 40))
UNITS = st.integers(1, 6)


def test_it_does_not_know_the_formulas():
    names = {"phases", "cycles", "network_cycles", "positions", "hardware"}
    assert not names & vars(simulator).keys()


class Membranes:
    """What neuron units would add up: ``charge [T, C_out, H_out, W_out]``."""

    def __init__(self, shape: LayerShape, weight: Tensor, steps: int, units: int):
        self.shape, self.weight, self.units = shape, weight, units
        self.charge = torch.zeros(steps, shape.out_channels, *shape.out_size)

    def add(self, tap: Tap) -> None:
        shape = self.shape
        place = []
        offsets = divmod(tap.tap, shape.kernel[1])
        for at, offset, dim in zip(divmod(tap.position, shape.in_size[1]), offsets, (0, 1), strict=True):
            moved, left = divmod(at + shape.padding[dim] - offset, shape.stride[dim])
            if left or not 0 <= moved < shape.out_size[dim]:
                return
            place.append(moved)
        outputs, inputs = (size // shape.groups for size in (shape.out_channels, shape.in_channels))
        group_end = (tap.first_output // outputs + 1) * outputs
        chosen = slice(tap.first_output, min(tap.first_output + self.units, group_end))
        self.charge[tap.step, chosen, *place] += self.weight[chosen, tap.channel % inputs, *offsets]


@settings(deadline=None, max_examples=40)
@given(convolutions(), WIDTHS, UNITS)
def test_units_add_up_the_convolution(drawn: Drawn, width, units):
    shape, generator = drawn.shape, torch.Generator().manual_seed(drawn.seed)
    size = shape.out_channels, shape.in_channels // shape.groups, *shape.kernel
    weight = torch.randint(-4, 5, size, generator=generator).float()
    membranes = Membranes(shape, weight, len(drawn.spikes), units)
    simulate(shape, drawn.spikes, Accelerator(width, units), membranes.add)
    expected = F.conv2d(drawn.spikes, weight, stride=shape.stride, padding=shape.padding, groups=shape.groups)
    assert membranes.charge.equal(expected)


@settings(deadline=None, max_examples=80)
@given(convolutions(), WIDTHS, UNITS)
def test_phases_of_a_convolution_are_exact(drawn: Drawn, width, units):
    shape, accelerator = drawn.shape, Accelerator(width, units)
    run, expected = simulate(shape, drawn.spikes, accelerator), phases(shape, drawn.counts, accelerator)
    passes, steps = -(-(shape.out_channels // shape.groups) // units), len(drawn.spikes)
    silent = int((drawn.counts == 0).sum())
    assert run.accumulating == expected.accumulate.item()
    assert run.firing == expected.fire.item()
    # A silent channel has nothing to hand over; going to the next step takes a cycle, and so does the next pass.
    turns = passes * shape.groups * (steps + 1)
    assert run.encoding == expected.encode.item() - passes * silent + turns


@settings(deadline=None, max_examples=80)
@given(convolutions(), WIDTHS, UNITS)
def test_convolution_is_within_a_factor_of_two(drawn: Drawn, width, units):
    """Proven bounds: nothing overlaps with itself, and nothing waits but for the other machine."""
    shape, accelerator = drawn.shape, Accelerator(width, units)
    run, expected = simulate(shape, drawn.spikes, accelerator), phases(shape, drawn.counts, accelerator)
    taken = -(-(shape.out_channels // shape.groups) // units) * int((drawn.counts > 0).sum())
    turns = run.firing // (shape.out_size[0] * shape.out_size[1])
    busy = run.accumulating + run.firing
    assert max(run.encoding, busy) <= run.cycles <= run.encoding + busy + taken + 2 * turns
    silent = run.encoding - expected.encode.item()
    assert run.cycles <= 2 * expected.total.item() + taken + 2 * turns + max(0, silent)
    assert expected.total.item() <= 2 * run.cycles + max(0, -silent)


@settings(deadline=None, max_examples=80)
@given(convolutions(), WIDTHS, UNITS)
def test_cycles_are_accounted_for(drawn: Drawn, width, units):
    run = simulate(drawn.shape, drawn.spikes, Accelerator(width, units))
    busy = run.accumulating + run.firing
    assert run.encoding + run.waiting <= run.cycles
    assert run.encoding + busy - run.cycles <= run.overlapped <= min(run.encoding, busy)


@settings(deadline=None, max_examples=80)
@given(linears(), WIDTHS, UNITS)
def test_linear_layer_is_the_formula_and_what_it_leaves_out(drawn: Drawn, width, units):
    shape, accelerator, steps = drawn.shape, Accelerator(width, units), len(drawn.spikes)
    run, expected = simulate(shape, drawn.spikes, accelerator), phases(shape, drawn.counts, accelerator)
    assert run.accumulating == expected.accumulate.item()
    assert run.firing == expected.fire.item()
    assert run.encoding == expected.encode.item() + 3 * steps  # two cycles to read the inputs, one to the next step
    passes = shape.out_channels // units + 1  # a cycle each
    assert run.cycles == expected.total.item() + run.encoding + passes
    assert run.overlapped == 0


@settings(deadline=None, max_examples=30)
@given(convolutions(), WIDTHS, UNITS, st.integers(0, 10**6))
def test_one_more_spike_never_takes_less(drawn: Drawn, width, units, where):
    accelerator, more = Accelerator(width, units), drawn.spikes.clone()
    more.view(-1)[where % more.numel()] = 1.0
    assert simulate(drawn.shape, more, accelerator).cycles >= simulate(drawn.shape, drawn.spikes, accelerator).cycles


def test_encoder_and_units_overlap():
    """The first channel is encoded alone and the last accumulated alone; between them the slower one decides."""
    shape, spikes = convolution(8, 4, size=8), torch.zeros(1, 8, 8, 8)
    spikes[..., :2] = 1.0  # 16 spikes a channel: 144 cycles to accumulate, 43 to encode
    run = simulate(shape, spikes, Accelerator(neuron_units=4))
    encode, accumulate, fire, total = (
        part.item() for part in phases(shape, _counts(spikes), Accelerator(neuron_units=4))
    )
    assert encode / 8 == 43
    assert total == accumulate + fire
    taking = 8  # a cycle each to take a list
    assert run.cycles == pytest.approx(total + encode / 8 + taking, abs=3)
    assert run.overlapped > 7 * 40


def test_single_channel_cannot_overlap():
    """The formula lets a channel's encoding hide behind its own accumulation, which it cannot."""
    shape, spikes = convolution(1, 4, size=8), torch.ones(1, 1, 8, 8)
    run = simulate(shape, spikes, Accelerator(neuron_units=4))
    found = phases(shape, _counts(spikes), Accelerator(neuron_units=4))
    assert run.cycles > found.total.item()
    assert run.cycles == pytest.approx(sum(part.item() for part in found[:3]), abs=5)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.3])
def test_formula_is_close_on_usual_layers(density):
    """Many channels, maps of a few hundred positions: within a tenth."""
    generator = torch.Generator().manual_seed(0)
    for channels, size in itertools.product((8, 16), (8, 16)):
        shape = convolution(channels, 8, size=size)
        spikes = (torch.rand(2, channels, size, size, generator=generator) < density).float()
        run = simulate(shape, spikes, Accelerator(neuron_units=8))
        assert run.cycles == pytest.approx(
            phases(shape, _counts(spikes), Accelerator(neuron_units=8)).total.item(), rel=0.1
        )


def _counts(spikes: Tensor) -> Tensor:
    return spikes.flatten(2).sum(2)[None]


def test_committed_table_is_what_both_sides_say():
    committed = json.loads(simulated_cycles.RESULTS.read_text())["rows"]
    assert list(itertools.islice(simulated_cycles.rows(), 3)) == committed[:3]
    assert len(committed) == len(simulated_cycles.LAYERS) * len(simulated_cycles.DENSITIES)


def test_silence_is_scanned_and_fired():
    shape = convolution(2, 4, size=4)
    run = simulate(shape, torch.zeros(3, 2, 4, 4), Accelerator(neuron_units=4))
    assert run.accumulating == 0
    assert run.firing == 3 * 16


@pytest.mark.parametrize("spikes", [torch.zeros(2, 3, 4, 4), torch.zeros(0, 2, 6, 6), torch.zeros(2, 2, 6)])
def test_spikes_have_to_fit(spikes):
    with pytest.raises(ValueError, match=r"conv: spikes are \[T, 2, 6, 6\]"):
        simulate(convolution(2, 4), spikes, Accelerator())


def test_spikes_are_binary():
    with pytest.raises(ValueError, match="0 or 1"):
        simulate(convolution(1, 4), torch.full((1, 1, 6, 6), 2.0), Accelerator())
