"""The neuron kernel in Triton's interpreter: bit for bit what the reference computes from the same currents."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparseflow.kernels.blocks import reference
from sparseflow.kernels.blocks.records import Dynamics, Epilogue, State
from sparseflow.kernels.blocks.spikes import PackedSpikes
from sparseflow.kernels.triton.blocks.dynamics import neuron_arguments, neuron_constants
from sparseflow.kernels.triton.blocks.ops import TritonBlockOps
from sparseflow.neuron import Charge, Reset, ResetTiming

from .cases import IF_AT_ONE, LIF, NEURONS, assert_same, copied, draw, neuron_of, same_state, state_of

OPS = TritonBlockOps()


def expected(
    currents: torch.Tensor, size: tuple[int, int, int], epilogue: Epilogue, neuron: Dynamics, state: State, steps: int
) -> PackedSpikes:
    spikes = reference.run_neuron(reference.affine(currents, epilogue), neuron, state, steps)
    return reference.packed_like(spikes, size, 2)


def check(currents, size, epilogue, neuron, state, steps) -> PackedSpikes:
    other = copied(state)
    found = OPS.neuron(currents, size, 2, epilogue, neuron, state, steps)
    assert_same(found, expected(currents, size, epilogue, neuron, other, steps))
    assert same_state(state, other)
    return found


@pytest.mark.parametrize("kind", NEURONS, ids=lambda kind: "-".join(k if isinstance(k, str) else k.name for k in kind))
def test_every_neuron_is_bit_exact(kind):
    fresh = kind[-1] == ">="
    neuron = neuron_of(*kind, None if fresh else 5)
    state = state_of(neuron, (2, 6, 5), 4, fresh=fresh, seq=True)
    found = check(torch.randn(8, 6, 5), (1, 2, 3), Epilogue(), neuron, state, 4)
    assert found.nonzero is not None
    assert 0 < found.nonzero.item() < found.numel


@pytest.mark.parametrize("residual", [None, "dense", "spikes", "counts"])
@pytest.mark.parametrize("channels", [1, 33, 64, 100, 300])
def test_epilogue_and_widths(channels, residual):
    other = {
        None: None,
        "dense": torch.randn(6, 4, channels),
        "spikes": draw((3, 2), channels, (2, 2), 0.3),
        "counts": draw((3, 2), channels, (2, 2), 0.5, most=4),
    }[residual]
    epilogue = Epilogue(torch.randn(channels), torch.randn(channels), other)
    state = state_of(LIF, (2, 4, channels), 3, fresh=True)
    check(torch.randn(6, 4, channels), (1, 2, 2), epilogue, LIF, state, 3)


@pytest.mark.parametrize("scaled", [True, False])
def test_scale_and_shift_may_be_left_out(scaled):
    epilogue = Epilogue(torch.randn(5), None) if scaled else Epilogue(None, torch.randn(5))
    check(torch.randn(4, 3, 5), (1, 1, 3), epilogue, LIF, state_of(LIF, (2, 3, 5), 2, fresh=True), 2)


def test_currents_may_be_the_same_at_every_step():
    currents, residual = torch.randn(2, 6, 5), torch.randn(6, 6, 5)
    states = [state_of(LIF, (2, 6, 5), 3, fresh=True, seq=True) for _ in range(2)]
    epilogue = Epilogue(torch.randn(5), torch.randn(5), residual)
    once = OPS.neuron(currents, (1, 2, 3), 2, epilogue, LIF, states[0], 3)
    repeated = OPS.neuron(currents.repeat(3, 1, 1), (1, 2, 3), 2, epilogue, LIF, states[1], 3)
    assert_same(once, repeated)
    assert same_state(*states)


@pytest.mark.parametrize("charge", [Charge.LEAK_INPUT, Charge.SYNAPTIC])
def test_state_is_carried_from_call_to_call(charge):
    neuron = neuron_of(charge, Reset.SOFT, ResetTiming.NEXT_STEP, ">")
    currents = torch.randn(12, 6, 5)
    whole, parts = (state_of(neuron, (2, 6, 5), 6, fresh=True) for _ in range(2))
    together = OPS.neuron(currents, (1, 2, 3), 2, Epilogue(), neuron, whole, 6)
    first = OPS.neuron(currents[:4], (1, 2, 3), 2, Epilogue(), neuron, parts, 2)
    parts = dataclasses.replace(parts, fresh=False)
    second = OPS.neuron(currents[4:], (1, 2, 3), 2, Epilogue(), neuron, parts, 4)
    assert torch.equal(torch.cat((first.bits, second.bits)), together.bits)
    assert torch.equal(whole.v, parts.v)


def test_a_membrane_at_the_threshold_fires_or_not():
    currents = torch.full((2, 3, 5), 0.5)
    for comparator, fired in ((">=", [0, 30]), (">", [0, 0])):
        neuron = dataclasses.replace(IF_AT_ONE, comparator=comparator)
        state = dataclasses.replace(state_of(neuron, (1, 3, 5), 2, fresh=True), start=0.0)
        found = check(currents, (1, 1, 3), Epilogue(), neuron, state, 2)
        assert [int(found.bits[t].count_nonzero()) * 10 for t in range(2)] == fired


def test_channels_that_do_not_exist_never_fire():
    neuron = dataclasses.replace(LIF, threshold=-1.0)
    found = check(torch.zeros(2, 3, 70), (1, 1, 3), Epilogue(), neuron, state_of(neuron, (1, 3, 70), 2, fresh=True), 2)
    assert found.nonzero is not None
    assert found.nonzero.item() == found.numel


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_infinite_currents_come_out_as_in_the_reference():
    currents = torch.tensor([float("inf"), float("-inf"), -0.0, 0.0, 1e38, -1e38]).repeat(4, 1).view(4, 6, 1)
    for kind in NEURONS[::7]:
        neuron = neuron_of(*kind)
        states = [state_of(neuron, (1, 6, 1), 4, fresh=True, seq=True) for _ in range(2)]
        found = OPS.neuron(currents, (1, 2, 3), 2, Epilogue(), neuron, states[0], 4)
        wanted = expected(currents, (1, 2, 3), Epilogue(), neuron, states[1], 4)
        assert torch.equal(found.bits, wanted.bits)
        assert torch.allclose(states[0].v_seq, states[1].v_seq, rtol=0, atol=0, equal_nan=True)


def test_halving_is_multiplication_and_thirds_are_not():
    halves, thirds = LIF, dataclasses.replace(LIF, decay=3.0)
    assert (neuron_constants(halves)["CHARGE"], neuron_arguments(halves)["decay"]) == ("LEAK_INPUT_RATE", 0.5)
    assert (neuron_constants(thirds)["CHARGE"], neuron_arguments(thirds)["decay"]) == ("LEAK_INPUT", 3.0)


def test_affine_is_the_epilogue_alone():
    epilogue = Epilogue(torch.randn(70), torch.randn(70), draw((6,), 70, (2, 3), 0.5, most=3))
    currents = torch.randn(6, 6, 70)
    assert torch.equal(OPS.affine(currents.clone(), epilogue), reference.affine(currents, epilogue))
