"""Graphs built for the purpose: which layers are fed by spikes, by fx and by dynamic discovery alike."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparseflow.frameworks import NeuronSpec, register_neuron, unregister_neuron
from sparseflow.graph import spike_map
from sparseflow.plan import Provenance
from tests.graph.labels import Opaque, both_ways, provenances


class Fire(nn.Module):
    """A hand-written neuron with memory; returns spikes and membrane."""

    def __init__(self):
        super().__init__()
        self.v = 0.0

    def forward(self, x):
        self.v = 0.5 * self.v + x
        spike = (self.v > 1).to(x.dtype)
        self.v = self.v * (1 - spike)
        return spike


class FireWithState(nn.Module):
    def forward(self, x, v):
        v = 0.5 * v + x
        return v, (v > 1).to(x.dtype)


@pytest.fixture(autouse=True)
def registered():
    register_neuron(Fire)
    register_neuron(FireWithState, NeuronSpec(output_index=1))
    yield
    unregister_neuron(Fire)
    unregister_neuron(FireWithState)


class Graph(nn.Module):
    """A stem and two neurons, then whatever ``wiring(net, s, z)`` makes of spikes ``s`` and stem output ``z``."""

    def __init__(self, wiring):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.sn1, self.sn2 = Fire(), Fire()
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.avg = nn.AvgPool2d(2)
        self.drop = nn.Dropout(0.5)
        self.wide = nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(4 * 8 * 8, 3)
        self.wiring = wiring

    def forward(self, x):
        z = self.stem(x)
        return self.wiring(self, self.sn1(z), z)


# name: (wiring, provenance of the layer under test, what feeds it)
WIRINGS = {
    "direct": (lambda n, s, z: n.conv(s), "BINARY", "sn1"),
    "membrane": (lambda n, s, z: n.conv(z), "DENSE", "stem"),
    "fork, both read spikes": (lambda n, s, z: n.conv(s) + n.inner(s), "BINARY", "sn1"),
    "residual add": (lambda n, s, z: n.conv(s + n.sn2(n.inner(s))), "INTEGER", "add(sn1, sn2)"),
    "residual add in place": (lambda n, s, z: n.conv(n.sn2(n.inner(s)).add_(s)), "INTEGER", "add(sn2, sn1)"),
    "add of the membrane": (lambda n, s, z: n.conv(s + z), "DENSE", "add(sn1, stem)"),
    "and not": (lambda n, s, z: n.conv((1 - s) * n.sn2(n.inner(s))), "SPARSE", None),
    "gate": (lambda n, s, z: n.conv(s * z.sigmoid()), "SPARSE", None),
    "cat": (lambda n, s, z: n.wide(torch.cat([s, n.sn2(z)], 1)), "BINARY", "cat(sn1, sn2)"),
    "cat with the membrane": (lambda n, s, z: n.wide(torch.cat([s, z], 1)), "DENSE", None),
    "batch norm between": (lambda n, s, z: n.conv(n.bn(s)), "DENSE", "bn"),
    "biased layer between": (lambda n, s, z: n.conv(n.inner(s)), "DENSE", "inner"),
    "max pool": (lambda n, s, z: n.conv(n.pool(s)), "BINARY", "sn1"),
    "average pool": (lambda n, s, z: n.conv(n.avg(s)), "SPARSE", "avg_pool2d(sn1)"),
    "functional pool": (lambda n, s, z: n.conv(F.max_pool2d(F.relu(s), 2)), "BINARY", "sn1"),
    "flatten": (lambda n, s, z: n.fc(s.flatten(1)), "BINARY", "sn1"),
    "view through sizes": (lambda n, s, z: n.fc(s.view(s.size(0), -1)), "BINARY", "sn1"),
    "dropout in eval": (lambda n, s, z: n.conv(n.drop(s)), "BINARY", "sn1"),
    "unbound time": (lambda n, s, z: n.conv(torch.stack([s, s]).unbind(0)[1]), "BINARY", "sn1"),
    "buffer over time": (lambda n, s, z: n.conv(_written(s)[1]), "BINARY", "sn1"),
    "hybrid island": (lambda n, s, z: n.conv(n.sn2(n.inner(F.gelu(z)))), "BINARY", "sn2"),
    "by keyword": (lambda n, s, z: n.conv(input=s), "BINARY", "sn1"),
    "through an unknown function": (lambda n, s, z: n.conv(torch.fft.fft2(s).real), "DENSE", None),
}


def _written(spikes):
    out = torch.zeros(2, *spikes.shape)
    for t in range(2):
        out[t] = spikes
    return out


@pytest.mark.parametrize("name", WIRINGS)
def test_wiring(name):
    wiring, expected, detail = WIRINGS[name]
    net = Graph(wiring).eval()
    x = torch.rand(2, 2, 8, 8) * 4
    under_test = next(n for n in ("wide", "fc", "conv") if n in provenances(net, x))
    for found in both_ways(net, x):
        site = {site.name: site for site in found.layers}[under_test]
        assert site.provenance.name == expected
        if detail is not None:
            assert site.detail == detail


def test_blocks_are_layer_norm_neuron():
    net = Graph(lambda n, s, z: n.conv(n.sn2(n.bn(n.inner(s)))))
    sites = {site.name: (site.norm, site.neuron) for site in spike_map(net, (torch.rand(1, 2, 8, 8),)).layers}
    assert sites["inner"] == ("bn", "sn2")
    assert sites["conv"] == (None, None)
    assert sites["stem"] == (None, "sn1")


def test_norm_that_shares_its_input_is_not_a_block():
    def wiring(net, spikes, _membrane):
        y = net.inner(spikes)
        return net.conv(net.sn2(net.bn(y))) + y

    sites = {site.name: site.norm for site in spike_map(Graph(wiring), (torch.rand(1, 2, 8, 8),)).layers}
    assert sites["inner"] is None


class Shared(nn.Module):
    """One convolution called on the image and on spikes, also under a second name."""

    def __init__(self, both):
        super().__init__()
        self.conv, self.sn, self.both = nn.Conv2d(2, 2, 3, padding=1), Fire(), both
        self.alias = self.conv

    def forward(self, x):
        s = self.sn(x)
        return self.alias(s) + (self.conv(x) if self.both else self.conv(s))


@pytest.mark.parametrize(("both", "expected"), [(True, Provenance.DENSE), (False, Provenance.BINARY)])
def test_shared_layer_is_joined_over_its_calls(both, expected):
    for found in both_ways(Shared(both), torch.rand(1, 2, 6, 6) * 3):
        assert [(s.name, s.provenance, s.calls) for s in found.layers] == [("conv", expected, 2)]


class Steps(nn.Module):
    """A loop over the time axis of the input, and a tuple of outputs."""

    def __init__(self):
        super().__init__()
        self.fc1, self.sn, self.fc2 = nn.Linear(4, 8), FireWithState(), nn.Linear(8, 2)

    def forward(self, x, scale=1.0):
        v, outputs = torch.zeros(x.shape[1], 8), []
        for t in range(x.size(0)):
            v, s = self.sn(self.fc1(x[t] * scale), v)
            outputs.append(self.fc2(s))
        return torch.stack(outputs), v


def test_loop_over_time_and_tuple_outputs():
    found = spike_map(Steps(), (torch.rand(5, 3, 4) * 3,), {"scale": 2.0})
    assert found.method == "fx"
    assert [(s.name, s.provenance.name, s.detail, s.calls) for s in found.layers] == [
        ("fc1", "DENSE", "model input", 5),
        ("fc2", "BINARY", "sn", 5),
    ]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda x: (x > 0.9).float(), "BINARY"),
        (lambda x: (x > 0.9).float() * 3, "INTEGER"),
        (lambda x: (x > 0.1).float(), "DENSE"),
        (lambda x: x, "DENSE"),
        (lambda x: -(x > 0.9).float(), "DENSE"),
        (torch.zeros_like, "DENSE"),
        (lambda x: (x > 0.9).to(torch.uint8).float(), "BINARY"),
    ],
)
def test_example_of_spikes_is_told_from_an_image(make, expected):
    net = nn.Sequential(nn.Linear(16, 4), Fire(), nn.Linear(4, 2))
    assert provenances(net, make(torch.rand(64, 16)))["0"] == expected


def test_layers_that_never_ran_are_not_listed():
    net = nn.Sequential(nn.Linear(2, 2), Fire(), nn.Linear(2, 2))
    net.add_module("unused", nn.Identity())
    net.unused.extra = nn.Linear(2, 2)
    assert [site.name for site in spike_map(net, (torch.rand(1, 2),)).layers] == ["0", "2"]


def test_single_layer_and_attention_models_do_not_fail():
    (site,) = spike_map(nn.Linear(2, 2), (torch.rand(1, 2),)).layers
    assert (site.name, site.provenance) == ("", Provenance.DENSE)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert spike_map(nn.Sequential(encoder), (torch.rand(1, 3, 8),)).layers


def test_the_model_own_error_is_raised():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        spike_map(nn.Sequential(nn.Linear(2, 2), Fire()), (torch.rand(1, 3),))


@pytest.mark.parametrize("wrap", [lambda net: net, Opaque])
def test_nothing_in_the_model_changes(wrap):
    net = Graph(lambda n, s, z: n.conv(n.drop(n.sn2(n.bn(n.inner(s))))))
    net.train()
    net(torch.rand(1, 2, 8, 8)).sum().backward()
    recorded = []
    net.sn1.register_forward_hook(lambda *_: recorded.append(1))
    hooks = {name: list(module._forward_hooks.items()) for name, module in net.named_modules()}
    membrane, values = net.sn1.v, net.sn1.v.clone()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    x = torch.rand(1, 2, 8, 8)
    kept, generator, python = x.clone(), torch.get_rng_state(), random.getstate()
    spike_map(wrap(net), (x,))
    assert not recorded
    assert hooks == {name: list(module._forward_hooks.items()) for name, module in net.named_modules()}
    assert net.sn1.v is membrane
    assert torch.equal(membrane, values)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(torch.equal(p.grad, grads[name]) for name, p in net.named_parameters() if name in grads)
    assert torch.equal(torch.get_rng_state(), generator)
    assert random.getstate() == python
    assert torch.equal(x, kept)
    assert all(module.training for module in net.modules())


def test_compiled_model_is_followed_without_compiling():
    net = torch.compile(Graph(lambda n, s, z: n.conv(s)))
    found = {site.name.removeprefix("_orig_mod."): site.provenance.name for site in _layers(net)}
    assert found == {"stem": "DENSE", "conv": "BINARY"}


def _layers(net):
    return spike_map(net, (torch.rand(1, 2, 8, 8),)).layers


class WritesInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x.mul_(2))


def test_a_model_that_writes_into_its_input_leaves_the_example_alone():
    x = torch.rand(2, 4)
    kept = x.clone()
    spike_map(WritesInput(), (x,))
    assert torch.equal(x, kept)
