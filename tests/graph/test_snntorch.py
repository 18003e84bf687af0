"""snnTorch nets: explicit loops with returned states, and Sequential(init_hidden=True) stepped from outside."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("snntorch")

import snntorch as snn
from snntorch import spikegen, utils
from torch import nn

from sparseflow.graph import spike_map, trace
from sparseflow.plan import Provenance
from tests.graph.labels import provenances
from tests.graph.nets import loud

NEURONS = {
    "Leaky": (lambda n: snn.Leaky(beta=0.9), "init_leaky"),
    "Leaky zero": (lambda n: snn.Leaky(beta=0.9, reset_mechanism="zero"), "reset_mem"),
    "Leaky no delay": (lambda n: snn.Leaky(beta=0.9, reset_delay=False), "reset_mem"),
    "Lapicque": (lambda n: snn.Lapicque(beta=0.9, threshold=0.2), "init_lapicque"),
    "Synaptic": (lambda n: snn.Synaptic(alpha=0.8, beta=0.9), "init_synaptic"),
    "Alpha": (lambda n: snn.Alpha(alpha=0.9, beta=0.8, threshold=0.1), "init_alpha"),
    "RLeaky": (lambda n: snn.RLeaky(beta=0.9, linear_features=n), "init_rleaky"),
    "RSynaptic": (lambda n: snn.RSynaptic(alpha=0.8, beta=0.9, linear_features=n), "init_rsynaptic"),
}
RECURRENT = ("RLeaky", "RSynaptic")


class Loop(nn.Module):
    """Tutorial 5: a fixed number of steps, states passed in and returned."""

    def __init__(self, name, steps=None):
        super().__init__()
        make, self.init = NEURONS[name]
        self.fc1, self.lif1, self.fc2, self.lif2 = nn.Linear(6, 12), make(12), nn.Linear(12, 4), make(4)
        self.steps, self.recurrent = steps, name in RECURRENT

    def forward(self, x):
        state1, state2 = self._initial(self.lif1), self._initial(self.lif2)
        spikes, membranes = [], []
        for t in range(self.steps or x.size(0)):
            spk, state1 = self._step(self.lif1, self.fc1(x if self.steps else x[t]), state1)
            spk, state2 = self._step(self.lif2, self.fc2(spk), state2)
            spikes.append(spk)
            membranes.append(state2[-1])
        return torch.stack(spikes), torch.stack(membranes)

    def _initial(self, neuron):
        state = getattr(neuron, self.init)()
        return state if isinstance(state, tuple) else (state,)

    def _step(self, neuron, current, state):
        spk, *rest = neuron(current, *state)
        return spk, ((spk, *rest) if self.recurrent else tuple(rest))


@pytest.mark.parametrize("name", NEURONS)
@pytest.mark.parametrize("steps", [None, 5])
def test_loop_is_traced_and_right_on_the_second_call(name, steps):
    net = loud(Loop(name, steps))
    x = torch.rand(3, 6) if steps else torch.rand(5, 3, 6)
    with torch.no_grad():
        expected = [net(x), net(x * 0.3)]
        assert 0 < expected[0][0].mean() < 1, "silent or saturated neurons prove nothing"
        graph = trace(net, (x,))
        actual = [graph(x), graph(x * 0.3)]
    for got, want in zip(actual, expected, strict=True):
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("name", NEURONS)
def test_layers_behind_neurons_are_found(name):
    net = loud(Loop(name, 4))
    found = provenances(net, torch.rand(3, 6))
    assert found["fc1"] == "DENSE"
    assert found["fc2"] == "BINARY"
    if name in RECURRENT:
        assert found["lif1.recurrent"] == "BINARY", "its own spikes of the step before"
    sites = {site.name: site for site in spike_map(net, (torch.rand(3, 6),)).layers}
    assert (sites["fc1"].neuron, sites["fc2"].detail, sites["fc2"].calls) == ("lif1", "lif1", 4)


def sequential(output=False):
    def leaky(**options):
        return snn.Leaky(beta=0.5, init_hidden=True, **options)

    return loud(
        nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.MaxPool2d(2),
            leaky(),
            nn.Conv2d(4, 4, 3),
            leaky(),
            nn.Flatten(),
            nn.Linear(4 * 4 * 4, 3),
            leaky(output=output),
        )
    )


@pytest.mark.parametrize("output", [False, True])
def test_sequential_with_hidden_state_steps_on(output):
    net, x = sequential(output), torch.rand(2, 1, 14, 14)
    assert provenances(net, x) == {"0": "DENSE", "3": "BINARY", "6": "BINARY"}
    steps = [x * scale for scale in (1.0, 0.7, 0.4)]
    with torch.no_grad():
        expected = [net(step) for step in steps]
        utils.reset(net)
        graph = trace(net, (x,))
        actual = [graph(step) for step in steps]
    for got, want in zip(actual, expected, strict=True):
        pairs = zip(got, want, strict=True) if output else [(got, want)]
        assert all(torch.equal(a, b) for a, b in pairs)


def test_hidden_state_of_every_neuron_is_left_alone():
    net, x = sequential(), torch.rand(2, 1, 14, 14)
    net(x)
    before = [(net[i].mem, net[i].mem.clone()) for i in (2, 4, 7)]
    spike_map(net, (x,))
    for index, (tensor, values) in zip((2, 4, 7), before, strict=True):
        assert net[index].mem is tensor
        assert torch.equal(tensor, values)


def test_graded_spikes_are_sparse_not_binary():
    net = loud(nn.Sequential(nn.Linear(6, 8), snn.Leaky(beta=0.9, init_hidden=True), nn.Linear(8, 2)))
    assert provenances(net, torch.rand(2, 6))["2"] == "BINARY"
    net[1].graded_spikes_factor.fill_(0.5)
    assert provenances(net, torch.rand(2, 6))["2"] == "SPARSE"


class Encoded(nn.Module):
    def __init__(self, encode):
        super().__init__()
        self.encode, self.fc, self.lif = encode, nn.Linear(6, 4), snn.Leaky(beta=0.9)

    def forward(self, x):
        mem = self.lif.reset_mem()
        return torch.stack([self.lif(self.fc(step), mem)[0] for step in self.encode(x)])


def test_encoder_functions_inside_the_forward():
    x = torch.rand(3, 6) * 0.4 + 0.1
    (site,) = spike_map(Encoded(lambda x: spikegen.rate(x, num_steps=3)), (x,)).layers
    assert site.provenance is Provenance.BINARY
    (site,) = spike_map(Encoded(lambda x: spikegen.latency(x, num_steps=3)), (x,)).layers
    assert site.provenance >= Provenance.SPARSE


class ResetsAll(nn.Module):
    """``utils.reset`` rewrites the state of every neuron of the process, which no graph can hold."""

    def __init__(self):
        super().__init__()
        self.fc, self.lif, self.head = nn.Linear(6, 4), snn.Leaky(beta=0.9, init_hidden=True), nn.Linear(4, 2)

    def forward(self, x):
        utils.reset(self)
        return self.head(self.lif(self.fc(x)))


def test_process_wide_reset_falls_back_to_dynamic_discovery():
    found = spike_map(ResetsAll(), (torch.rand(2, 6),))
    assert found.method == "dynamic"
    assert [site.provenance.name for site in found.layers] == ["DENSE", "BINARY"]
