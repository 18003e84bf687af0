"""Several steps of a neuron as one, against the frameworks' own modules."""

from __future__ import annotations

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import neuron
from torch import nn

import sparseflow
from sparseflow.frameworks import live_spec
from sparseflow.temporal.chunks import chunk_lengths, decayed_sum
from sparseflow.temporal.neurons import Leak, UnknownNeuronError, collapsed

from .kinds import HIGH, KINDS, PER_CHANNEL, membrane, stepped


def drive(module, currents, size):
    leak = Leak.of(live_spec(module))
    weights = leak.weights(size)
    if leak.synapse is not None:
        weights = torch.stack([weights, leak.synapse_weights(size)])
    return decayed_sum(currents, weights)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - PER_CHANNEL))
@pytest.mark.parametrize("size", [2, 5, 12])
def test_below_the_threshold_the_membrane_is_that_of_all_steps(kind, size):
    exact, ours = KINDS[kind](HIGH), KINDS[kind](HIGH)
    for _ in range(2):  # the second time from where the first left off
        currents = torch.randn(12, 3, 6)
        assert stepped(exact, currents).count_nonzero() == 0
        (spikes,) = collapsed(ours, drive(ours, currents, size), chunk_lengths(12, size))
        assert spikes.count_nonzero() == 0
        torch.testing.assert_close(membrane(ours), membrane(exact), atol=1e-5, rtol=1e-4)
        if hasattr(exact, "syn"):
            torch.testing.assert_close(ours.syn, exact.syn, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_one_frame_are_the_neuron(kind):
    """Whatever the reset does, and when: in float32 the order of operations differs, which flips few spikes."""
    exact, ours = KINDS[kind](1.0), KINDS[kind](1.0)
    currents = torch.randint(-8, 24, (40, 3, 6)) / 8
    expected = stepped(exact, currents)
    (spikes,) = collapsed(ours, drive(ours, currents, 1), (1,) * 40)
    assert expected.count_nonzero() > 50
    assert (spikes != expected).float().mean() < 0.01
    if torch.equal(spikes, expected):
        torch.testing.assert_close(membrane(ours), membrane(exact), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["LIF", "Leaky", "IF soft"])
def test_at_most_one_spike_a_chunk(kind):
    module = KINDS[kind](0.1)
    (spikes,) = collapsed(module, drive(module, torch.ones(12, 2, 6), 4), (4, 4, 4))
    assert spikes.unique().tolist() == [1.0]
    assert spikes.shape == (3, 2, 6)


def test_held_frames_are_as_many_steps_with_the_same_input():
    exact, ours = KINDS["LIF"](HIGH), KINDS["LIF"](HIGH)
    frames = torch.randn(3, 2, 6)
    exact(frames.repeat_interleave(4, 0))
    collapsed(ours, frames, (1, 1, 1), hold=4)
    torch.testing.assert_close(membrane(ours), membrane(exact))


def test_a_synaptic_neuron_holds_no_frames():
    with pytest.raises(UnknownNeuronError, match="synaptic"):
        collapsed(KINDS["Synaptic"](1.0), torch.zeros(2, 1, 1, 6), (1,), hold=2)


def test_gradients_through_the_surrogate_and_trained_constants():
    plif = neuron.ParametricLIFNode(step_mode="m")
    leaky = snn.Leaky(0.7, learn_beta=True, learn_threshold=True, init_hidden=True)
    for module, parameters in ((plif, [plif.w]), (leaky, [leaky.beta, leaky.threshold])):
        currents = torch.rand(8, 2, 6, requires_grad=True)
        (spikes,) = collapsed(module, drive(module, currents, 4), (4, 4))
        spikes.sum().backward()
        assert currents.grad is not None
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in parameters)
        assert currents.grad.abs().sum() > 0


def test_a_reset_that_is_detached_carries_no_gradient():
    grads = []
    for detach in (True, False):
        module = neuron.IFNode(detach_reset=detach, v_reset=None, step_mode="m")
        currents = torch.full((4, 1, 1), 0.9, requires_grad=True)
        (spikes,) = collapsed(module, drive(module, currents, 2), (2, 2))
        spikes[-1].sum().backward()
        grads.append(float(currents.grad[0]))
    assert grads[0] != grads[1]


def test_states_that_the_caller_holds():
    held, passed = snn.Leaky(0.8, init_hidden=True), snn.Leaky(0.8)
    currents = torch.rand(6, 2, 5)
    (expected,) = collapsed(held, drive(held, currents, 3), (3, 3))
    spikes, mem = collapsed(passed, drive(passed, currents, 3), (3, 3), (torch.zeros(2, 5),))
    assert torch.equal(spikes, expected)
    assert torch.equal(mem[-1], held.mem)


def test_membranes_that_are_stored():
    module = neuron.LIFNode(step_mode="m", store_v_seq=True)
    collapsed(module, torch.rand(3, 2, 5), (2, 2, 1))
    assert module.v_seq.shape == (3, 2, 5)
    assert torch.equal(module.v_seq[-1], module.v)


def test_a_neuron_without_a_known_rule():
    with pytest.raises(UnknownNeuronError, match="QIFNode"):
        collapsed(neuron.QIFNode(step_mode="m"), torch.rand(3, 2, 5), (1, 1, 1))


def test_a_registered_neuron_of_ones_own():
    class Counter(nn.Module):
        v = 0.0

        def forward(self, x):
            self.v = self.v + x
            spike = (self.v >= 2).to(x)
            self.v = self.v - 2 * spike
            return spike

    spec = sparseflow.NeuronSpec(
        charge=sparseflow.frameworks.Charge.INTEGRATE,
        threshold=2.0,
        states=("v",),
        reset=sparseflow.frameworks.Reset.SOFT,
    )
    sparseflow.register_neuron(Counter, spec)
    try:
        ours, exact = Counter(), Counter()
        currents = torch.randint(0, 3, (9, 2, 4)).float()
        (spikes,) = collapsed(ours, currents, (1,) * 9)
        assert torch.equal(spikes, torch.stack([exact(x) for x in currents]))
        assert torch.equal(ours.v, exact.v)
    finally:
        from sparseflow.frameworks import unregister_neuron

        unregister_neuron(Counter)
