"""Models stepped from outside: one call for all steps, batched over time; and every neuron's state put back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparseflow.frameworks import NeuronSpec, register_neuron, state_tensors, unregister_neuron
from sparseflow.graph import trace
from sparseflow.graph.reroll import reroll
from sparseflow.graph.stepping import Stepper, reset
from sparseflow.graph.timeops import neuron_sequence

T, N = 4, 2


def states(net):
    return {f"{name}.{key}": v for name, m in net.named_modules() for key, v in state_tensors(m).items()}


def call_targets(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]


def sequences(graph):
    return [str(n.args[0].target) for n in graph.graph.nodes if n.target is neuron_sequence]


class Outputs(nn.Module):
    def forward(self, x):
        return {"double": x * 2, "parts": (x, [x.sum(-1), None]), "top": x.max(-1)}


def test_outputs_of_any_structure_are_stacked():
    x = torch.rand(T, N, 3)
    out = Stepper(Outputs())(x)
    assert torch.equal(out["double"], x * 2)
    assert torch.equal(out["parts"][0], x)
    assert torch.equal(out["parts"][1][0], x.sum(-1))
    assert out["parts"][1][1] is None
    assert torch.equal(out["top"].indices, x.max(-1).indices)


def test_what_cannot_be_stepped_is_refused():
    with pytest.raises(ValueError, match="T of at least 1"):
        Stepper(nn.Identity())(torch.zeros(0, 3))
    with pytest.raises(TypeError, match="str"):
        Stepper(Text())(torch.zeros(2, 3))


class Text(nn.Module):
    def forward(self, x):
        return "spikes"


@pytest.fixture
def snn():
    return pytest.importorskip("snntorch")


def sequential(snn, **last):
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.MaxPool2d(2),
        snn.Leaky(beta=0.5, init_hidden=True, threshold=0.2),
        nn.Conv2d(4, 4, 3),
        snn.Synaptic(alpha=0.5, beta=0.5, init_hidden=True, threshold=0.2),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 3),
        snn.Leaky(beta=0.5, init_hidden=True, **last),
    )
    return net.eval()


def outputs(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("last", [{}, {"output": True}])
def test_snntorch_sequential_is_batched_over_time(snn, last):
    net, data = sequential(snn, **last), torch.rand(T, N, 1, 14, 14)
    reference = copy.deepcopy(net)
    stepper = Stepper(net)
    before = {key: value.clone() for key, value in states(net).items()}
    graph = reroll(trace(stepper, (data,)), (data,))
    assert call_targets(graph) == [f"model.{i}" for i in (0, 1, 3, 5, 6)]
    assert sequences(graph) == ["model.2", "model.4", "model.7"]
    assert all(torch.equal(value, before[key]) for key, value in states(net).items()), "state leaks out of tracing"
    with torch.no_grad():
        for scale in (1.0, 0.5):
            expected = [outputs(reference(step)) for step in data * scale]
            actual = outputs(graph(data * scale))
            for i, value in enumerate(actual):
                torch.testing.assert_close(value, torch.stack([step[i] for step in expected]))
    for key, value in states(reference).items():
        torch.testing.assert_close(states(net)[key], value)


def test_spikingjelly_single_step_networks_are_batched_over_time():
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import functional

    from tests.graph import zoo

    for family in ("sew_add", "vgg", "plif_mnist"):
        net, x = zoo.build(family, "s")
        data = torch.stack([x * scale for scale in (1.0, 0.6, 0.2)])
        reference = copy.deepcopy(net)
        graph = reroll(trace(Stepper(net), (data,)), (data,))
        assert len(call_targets(graph)) == len(set(call_targets(graph)))
        with torch.no_grad():
            expected = torch.stack([reference(step) for step in data])
            torch.testing.assert_close(graph(data), expected)
            functional.reset_net(net)
            torch.testing.assert_close(graph(data), expected)


def test_reset_does_what_spikingjelly_does():
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import functional

    from tests.graph import zoo

    net, x = zoo.build("spiking_resnet", "s")
    other = copy.deepcopy(net)
    with torch.no_grad():
        first = net(x), other(x)
        assert reset(net) is net
        functional.reset_net(other)
        assert [m._memories for m in net.modules() if hasattr(m, "_memories")] == [
            m._memories for m in other.modules() if hasattr(m, "_memories")
        ]
        assert torch.equal(net(x), first[0])


def test_reset_does_what_snntorch_does_for_this_model_alone(snn):
    from snntorch import utils

    net, other = sequential(snn), sequential(snn)
    nested = nn.Sequential(nn.Sequential(net))
    x = torch.rand(N, 1, 14, 14)
    with torch.no_grad():
        first = net(x)
        other(x)
        kept = {key: value.clone() for key, value in states(other).items()}
        reset(nested)
        found = states(net)
        assert all(not value.any() for value in found.values())
        assert all(torch.equal(value, kept[key]) for key, value in states(other).items())
        assert torch.equal(net(x), first)
        utils.reset(net)
    expected = states(net)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_reset_detaches(snn):
    net = sequential(snn)
    net(torch.rand(N, 1, 14, 14)).sum().backward()
    reset(net)
    assert not any(value.requires_grad for value in states(net).values())


@pytest.mark.parametrize("name", ["Lapicque", "Alpha", "RLeaky", "RSynaptic", "SLSTM", "DeltaLeaky"])
def test_reset_of_every_snntorch_neuron(snn, name):
    options = {
        "Lapicque": {"beta": 0.5},
        "Alpha": {"alpha": 0.8, "beta": 0.5},
        "RLeaky": {"beta": 0.5, "linear_features": 3},
        "RSynaptic": {"alpha": 0.8, "beta": 0.5, "linear_features": 3},
        "SLSTM": {"input_size": 3, "hidden_size": 3},
        "DeltaLeaky": {"beta": 0.5},
    }[name]
    neuron = getattr(snn, name)(init_hidden=True, **options)
    net, x = nn.Sequential(nn.Linear(3, 3), neuron), torch.rand(N, 3)
    with torch.no_grad():
        first = net(x)
        net(x)
        again = reset(net)(x)
    assert torch.equal(outputs(first)[0], outputs(again)[0])


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.v = None

    def forward(self, x):
        self.v = x if self.v is None else self.v + x
        return (self.v > 1).to(x)


class Resettable(Own):
    def reset(self):
        self.v = None


def test_reset_of_registered_neurons():
    for cls in (Own, Resettable):
        register_neuron(cls, NeuronSpec(states=("v",)))
    try:
        net = nn.Sequential(nn.Identity(), Resettable())
        net(torch.ones(1))
        assert reset(net)[1].v is None
        with pytest.raises(TypeError, match=r"1: Own keeps state and has no reset\(\)"):
            reset(nn.Sequential(nn.Identity(), Own()))
    finally:
        unregister_neuron(Own)
        unregister_neuron(Resettable)
