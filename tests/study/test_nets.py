"""The networks: published surrogates, decays per step, equal outputs of both ways to run them, what there is not."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("snntorch")
pytest.importorskip("spikingjelly")

from sparseflow.frameworks import neuron_spec
from sparseflow.study import nets
from sparseflow.study.nets import ChoiceError, build, reset, run
from sparseflow.study.records import Choice, Matched, Neuron, Surrogate

CHOICE = Choice("digits", "snntorch", Neuron.LIF, Surrogate.ARCTAN, 0.9, 1.0, None, Matched.BETA, 0)
JELLY = dataclasses.replace(CHOICE, framework="spikingjelly")
X = torch.linspace(-6, 6, 49)

PUBLISHED = {
    Surrogate.FAST_SIGMOID: lambda x, k=25.0: 1 / (1 + k * x.abs()) ** 2,
    Surrogate.ARCTAN: lambda x, a=2.0: (a / 2) / (1 + (torch.pi * a * x / 2) ** 2),
    Surrogate.SPIKE_RATE_ESCAPE: lambda x, k=25.0: k * torch.exp(-(x - 1).abs()),
    Surrogate.SIGMOID: lambda x, k=25.0: k * torch.sigmoid(k * x.double()) * torch.sigmoid(-k * x.double()),
}


def changed(choice=CHOICE, **values):
    return dataclasses.replace(choice, **values)


def neuron_of(choice):
    """One neuron of the network."""
    return build(choice, (1, 8, 8), 4, 2).neuron1


def step(neuron, current):
    """Spikes of one step from rest."""
    if isinstance(neuron, torch.nn.Module) and hasattr(neuron, "reset_mem"):
        return neuron(current, torch.zeros_like(current))[0]
    neuron.reset()
    return neuron(current[None])[0]


def surrogate_gradient(choice):
    """Gradient of a spike with respect to the membrane, at ``X`` around the threshold."""
    current = (X + choice.threshold).requires_grad_()
    step(neuron_of(choice), current).sum().backward()
    return current.grad


@pytest.mark.parametrize("surrogate", PUBLISHED)
@pytest.mark.parametrize("slope", [None, 3.0])
def test_snntorch_gradients_are_the_published_ones(surrogate, slope):
    expected = PUBLISHED[surrogate](X) if slope is None else PUBLISHED[surrogate](X, slope)
    found = surrogate_gradient(changed(surrogate=surrogate, slope=slope, threshold=0.5))
    assert torch.allclose(found, expected.float(), rtol=1e-3, atol=1e-6)
    assert found.isfinite().all()


@pytest.mark.parametrize("surrogate", [Surrogate.ARCTAN, Surrogate.SIGMOID])
@pytest.mark.parametrize("slope", [None, 3.0])
def test_spikingjelly_gradients_are_the_published_ones(surrogate, slope):
    expected = PUBLISHED[surrogate](X) if slope is None else PUBLISHED[surrogate](X, slope)
    found = surrogate_gradient(changed(JELLY, surrogate=surrogate, slope=slope))
    assert torch.allclose(found, expected.float(), rtol=1e-3, atol=5e-6)


def test_stochastic_operator_is_noise_below_and_one_above_the_threshold():
    found = surrogate_gradient(changed(surrogate=Surrogate.STOCHASTIC))
    assert (found[X > 0] == 1).all()
    below = found[X < 0]
    assert below.abs().max() <= 0.1
    assert len(below.unique()) > 10


def membranes(neuron, currents):
    """Membrane after each step, of currents that do not make it fire."""
    if hasattr(neuron, "reset_mem"):
        membrane, found = neuron.reset_mem(), []
        for current in currents:
            _, membrane = neuron(current, membrane)
            found.append(membrane)
        return torch.stack(found)
    neuron.step_mode = "s"
    neuron.reset()
    found = []
    for current in currents:
        neuron(current)
        found.append(neuron.v)
    return torch.stack(found)


PULSE = torch.tensor([[0.5], [0.0], [0.0]])


@pytest.mark.parametrize(
    ("choice", "gain", "decay"),
    [
        (CHOICE, 1.0, 0.9),
        (changed(neuron=Neuron.PLIF), 1.0, 0.9),
        (changed(neuron=Neuron.IF), 1.0, 1.0),
        (changed(neuron=Neuron.LAPICQUE), 0.1053605, 1 - 0.1053605),  # -ln(0.9)
        (changed(neuron=Neuron.LAPICQUE, matched=Matched.TIME_CONSTANT), 0.1, 0.9),
        (JELLY, 1.0, 0.9),
        (changed(JELLY, neuron=Neuron.PLIF), 1.0, 0.9),
        (changed(JELLY, neuron=Neuron.IF), 1.0, 1.0),
    ],
    ids=lambda value: value.name if isinstance(value, Choice) else None,
)
def test_membrane_decays_as_chosen(choice, gain, decay):
    with torch.no_grad():
        found = membranes(neuron_of(choice), PULSE).flatten()
    expected = 0.5 * gain * decay ** torch.arange(3)
    assert torch.allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("choice", [CHOICE, JELLY], ids=["snntorch", "spikingjelly"])
@pytest.mark.parametrize("threshold", [0.5, 1.5])
def test_threshold_decides_and_is_subtracted(choice, threshold):
    neuron = neuron_of(changed(choice, threshold=threshold))
    current = torch.tensor([threshold - 0.01, threshold + 0.01])
    assert step(neuron, current).tolist() == [0.0, 1.0]
    with torch.no_grad():
        found = membranes(neuron, torch.tensor([[threshold + 0.25], [0.0]]))[-1].item()
    delayed = (threshold + 0.25) * 0.9 - threshold  # snnTorch resets a step later
    assert found == pytest.approx(delayed if choice is CHOICE else 0.25 * 0.9, abs=1e-5)


def test_plif_learns_its_decay():
    for choice in (changed(neuron=Neuron.PLIF), changed(JELLY, neuron=Neuron.PLIF)):
        network = build(choice, (1, 8, 8), 4, 4)
        run(network, torch.ones(3, 2, 1, 8, 8)).sum().backward()
        names = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
        assert {"neuron1.beta", "neuron2.beta"} <= names or {"neuron1.w", "neuron2.w"} <= names
    assert len(list(build(CHOICE, (1, 8, 8), 4, 4).parameters())) == 6


COMBINATIONS = [
    changed(framework=framework, neuron=neuron, surrogate=surrogate, matched=matched)
    for framework, neuron, surrogate, matched in itertools.product(nets.FRAMEWORKS, Neuron, Surrogate, Matched)
]


@pytest.mark.parametrize("choice", [c for c in COMBINATIONS if not nets.unsupported(c)], ids=lambda c: c.name)
def test_every_network_learns(choice):
    torch.manual_seed(0)
    network = build(choice, (2, 12, 12), 5, 4)
    spikes = (torch.rand(6, 3, 2, 12, 12) < 0.3).float()
    output = run(network, spikes)
    assert output.shape == (6, 3, 5)
    (output - 1).square().sum().backward()
    gradients = [network.get_submodule(name).weight.grad for name in ("conv1", "conv2", "fc")]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0].any()


@pytest.mark.parametrize("choice", [CHOICE, JELLY], ids=["snntorch", "spikingjelly"])
def test_neurons_fire_from_the_beginning(choice):
    torch.manual_seed(0)
    network, rates = build(choice, (1, 16, 16), 10).eval(), []
    for module in network.modules():
        if neuron_spec(module) is not None:
            record = lambda _m, _i, out: rates.append(float((out[0] if isinstance(out, tuple) else out).mean()))  # noqa: E731
            module.register_forward_hook(record)
    with torch.no_grad():
        run(network, (torch.rand(10, 8, 1, 16, 16) < 0.2).float())
    assert 0.01 < sum(rates) / len(rates) < 0.5


def test_loop_and_layer_by_layer_are_the_same_network():
    torch.manual_seed(0)
    network = build(changed(threshold=0.5), (1, 12, 12), 5, 4).eval()
    spikes = (torch.rand(6, 3, 1, 12, 12) < 0.3).float()
    with torch.no_grad():
        looped, at_once = network(spikes), run(network, spikes)
    assert looped.std() > 0.1
    assert torch.allclose(looped, at_once, atol=1e-5)


@pytest.mark.parametrize("choice", [CHOICE, JELLY], ids=["snntorch", "spikingjelly"])
def test_every_run_starts_from_rest(choice):
    torch.manual_seed(0)
    network = build(choice, (1, 12, 12), 5, 4).eval()
    spikes = (torch.rand(6, 3, 1, 12, 12) < 0.3).float()
    with torch.no_grad():
        first = run(network, spikes)
        assert torch.equal(run(network, spikes), first)
        reset(network)
        assert torch.allclose(network(spikes), first, atol=1e-5)


def test_seed_decides_the_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return build(CHOICE, (1, 8, 8), 4, 2).fc.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (changed(JELLY, neuron=Neuron.LAPICQUE), "no Lapicque neuron; use snntorch"),
        (changed(JELLY, surrogate=Surrogate.FAST_SIGMOID), "no surrogate with the formula of the fast sigmoid"),
        (changed(JELLY, surrogate=Surrogate.SPIKE_RATE_ESCAPE), "spike rate escape; use snntorch"),
        (changed(JELLY, surrogate=Surrogate.STOCHASTIC), "stochastic spike operator; use snntorch"),
        (changed(framework="norse"), "unknown framework 'norse'"),
        (changed(beta=1.0), "beta of a LIF neuron must be between 0 and 1, got 1.0"),
        (changed(neuron=Neuron.LAPICQUE, beta=0.0), "beta of a Lapicque neuron"),
        (changed(threshold=0.0), "threshold must be positive"),
        (changed(slope=-1.0), "slope must be positive"),
        (changed(surrogate=Surrogate.STOCHASTIC, slope=2.0), "stochastic spike operator has no slope"),
    ],
)
def test_what_there_is_not_is_said(choice, message):
    with pytest.raises(ChoiceError, match=message):
        build(choice, (1, 8, 8), 4)
