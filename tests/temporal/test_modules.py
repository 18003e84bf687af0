"""TAC and TAC-TP as layers: exact where they must be, as published where they are not."""

from __future__ import annotations

import copy

import pytest
import snntorch as snn
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from sparseflow.graph.stepping import reset
from sparseflow.temporal import TAC, TACTP, UnknownNeuronError

from .kinds import HIGH, KINDS, PER_CHANNEL, membrane, stepped


def conv_with_norm() -> nn.Module:
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(6)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    norm.weight.data.uniform_(-1, 1)
    norm.bias.data.uniform_(-1, 1)
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), norm).eval()


def frames(steps=12, samples=2):
    return (torch.rand(steps, samples, 2, 5, 4) < 0.3).float()


def linear_frames(steps=12):
    return (torch.rand(steps, 3, 8) < 0.4).float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [TAC, TACTP])
def test_groups_of_one_are_exact(kind, make):
    layer_, exact = nn.Linear(8, 6), KINDS[kind](1.0)
    ours = make(layer_, copy.deepcopy(exact), 1)
    x = linear_frames() * 4
    expected = stepped(exact, layer_(x))
    assert torch.equal(ours(x), expected)
    assert torch.equal(membrane(ours.neuron), membrane(exact))


@pytest.mark.parametrize("steps", [12, 11, 3])
def test_collapsed_currents_count_the_constant_part_for_every_frame(steps):
    """Bias and batch norm's shift, also in a last chunk that is shorter."""
    block, exact = (
        TAC(conv_with_norm(), neuron.LIFNode(v_threshold=HIGH, step_mode="m"), 5),
        neuron.LIFNode(v_threshold=HIGH, step_mode="m"),
    )
    x = frames(steps)
    exact(block.layer(x.flatten(0, 1)).unflatten(0, (steps, -1)))
    assert block(x).shape == (-(-steps // 5), 2, 6, 5, 4)
    torch.testing.assert_close(block.neuron.v, exact.v, atol=1e-5, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 9), steps=st.integers(1, 14), kind=st.sampled_from(sorted(KINDS)))
def test_preserve_is_exact_where_frames_do_not_change(size, steps, kind):
    torch.manual_seed(0)
    layer_, exact = nn.Linear(8, 6), KINDS[kind](1.0)
    ours = TACTP(layer_, copy.deepcopy(exact), size, normalise=True)
    x = (torch.rand(3, 8) < 0.5).float().expand(steps, 3, 8) * 2
    expected = stepped(exact, layer_(x))
    found = ours(x)
    assert found.shape == expected.shape
    assert (found != expected).float().mean() < 0.02  # a mean of equal frames rounds
    if kind not in PER_CHANNEL and torch.equal(found, expected):
        torch.testing.assert_close(membrane(ours.neuron), membrane(exact), atol=1e-4, rtol=1e-4)


def test_published_preserve_repeats_the_decayed_sum():
    layer_ = nn.Linear(8, 6)
    lif = neuron.LIFNode(tau=2.0, v_threshold=HIGH, step_mode="m", store_v_seq=True)
    block = TACTP(layer_, lif, 3)
    x = linear_frames(3)
    block(x)
    w = torch.tensor([0.25, 0.5, 1.0])
    current = layer_(x[0]) * w[0] + layer_(x[1]) * w[1] + layer_(x[2]) * w[2]
    expected, v = [], torch.zeros(3, 6)
    for _ in range(3):
        v = v + (current - v) / 2
        expected.append(v)
    torch.testing.assert_close(lif.v_seq, torch.stack(expected))


@pytest.mark.parametrize("make", [TAC, TACTP])
@pytest.mark.parametrize("kind", ["LIF", "Leaky", "Synaptic"])
def test_state_goes_on_from_chunk_to_chunk_and_call_to_call(make, kind):
    layer_ = nn.Linear(8, 6)
    whole, parts = make(layer_, KINDS[kind](0.3), 4), make(layer_, KINDS[kind](0.3), 4)
    x = linear_frames(12)
    expected = whole(x)
    found = torch.cat([parts(x[:8]), parts(x[8:])])
    assert torch.equal(found, expected)
    torch.testing.assert_close(membrane(parts.neuron), membrane(whole.neuron))
    reset(parts)
    assert torch.equal(parts(x), expected)


@pytest.mark.parametrize("make", [TAC, TACTP])
def test_states_that_the_caller_holds(make):
    layer_ = nn.Linear(8, 6)
    held, passed = make(layer_, snn.Leaky(0.8, init_hidden=True), 4), make(layer_, snn.Leaky(0.8), 4)
    x = linear_frames(8)
    spikes, mem = passed(x, torch.zeros(3, 6))
    assert torch.equal(spikes, held(x))
    torch.testing.assert_close(mem[-1], held.neuron.mem)


@pytest.mark.parametrize("mode", ["s", "m"])
def test_layers_of_spikingjelly_in_either_mode(mode):
    conv = layer.Conv2d(2, 6, 3, padding=1, step_mode=mode)
    plain = nn.Conv2d(2, 6, 3, padding=1)
    plain.load_state_dict(conv.state_dict())
    x = frames()
    for make in (TAC, TACTP):
        ours, expected = make(conv, KINDS["LIF"](0.2), 4), make(plain, KINDS["LIF"](0.2), 4)
        assert torch.equal(ours(x), expected(x))


def test_training_with_the_norm_of_chunks():
    """All parameters learn, and so do the batch norm's statistics, of as many frames as there are chunks."""
    norm = nn.BatchNorm2d(6)
    seen = []
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    block = TACTP(nn.Conv2d(2, 6, 3), neuron.LIFNode(step_mode="m", detach_reset=True), 4, norm=norm).train()
    block(frames()).sum().backward()
    assert seen == [(3 * 2, 6, 3, 2)]
    assert norm.running_mean.abs().sum() > 0
    assert all(p.grad is not None for p in block.parameters())


@pytest.mark.parametrize("make", [TAC, TACTP])
@pytest.mark.parametrize("kind", ["PLIF", "Synaptic"])
def test_weights_that_are_learned_start_as_the_leak(make, kind):
    torch.manual_seed(0)
    layer_ = nn.Linear(8, 6)
    x = linear_frames(10)
    fixed, learned = make(layer_, KINDS[kind](0.3), 4), make(layer_, KINDS[kind](0.3), 4, learn_weights=True)
    torch.testing.assert_close(learned.weights(), fixed.weights())
    out = learned(x)
    assert (out != fixed(x)).float().mean() < 0.02
    out.sum().backward()
    assert learned.log_weights.grad.abs().sum() > 0
    assert set(dict(fixed.named_parameters())) == set(dict(learned.named_parameters())) - {"log_weights"}


def test_weights_follow_a_leak_that_is_trained():
    plif = KINDS["PLIF"](1.0)
    block = TAC(nn.Linear(8, 6), plif, 4)
    before = block.weights()
    plif.w.data += 1
    assert not torch.equal(block.weights(), before)


def test_an_opaque_neuron_can_be_preserved_and_not_collapsed():
    x = linear_frames()
    layer_ = nn.Linear(8, 6)
    assert TACTP(layer_, neuron.QIFNode(step_mode="m"), 4, normalise=True)(x).shape == (12, 3, 6)
    with pytest.raises(UnknownNeuronError, match="QIFNode"):
        TAC(layer_, neuron.QIFNode(step_mode="m"), 4)(x)


@pytest.mark.parametrize("make", [TAC, TACTP])
def test_group_size_must_be_positive(make):
    with pytest.raises(ValueError, match="group_size"):
        make(nn.Linear(2, 2), neuron.IFNode(), 0)


def test_blocks_say_what_they_are_and_travel():
    block = TACTP(nn.Linear(8, 6), neuron.LIFNode(step_mode="m"), 4, normalise=True, learn_weights=True)
    assert "group_size=4, learned weights, normalise=True" in repr(block)
    twin = copy.deepcopy(block)
    twin.load_state_dict(block.state_dict())
    x = linear_frames()
    assert torch.equal(twin(x), block(x))
    functional.reset_net(block)
    assert block.neuron.v == 0.0
