"""Loops over neurons of snnTorch and SpikingJelly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparseflow.graph import trace
from sparseflow.graph.reroll import reroll
from sparseflow.graph.timeops import neuron_sequence

from ..nets import Function, loud
from .loops import N, T, calls, count, layers, rolled, sequences


@pytest.fixture
def snn():
    return pytest.importorskip("snntorch")


@pytest.fixture
def sj():
    return pytest.importorskip("spikingjelly.activation_based.neuron")


def tutorial5(s, x):
    mem1, mem2 = s.lif1.init_leaky(), s.lif2.init_leaky()
    spikes, mems = [], []
    for _ in range(T):
        spike, mem1 = s.lif1(s.fc1(x), mem1)
        spike, mem2 = s.lif2(s.fc2(spike), mem2)
        spikes.append(spike)
        mems.append(mem2)
    return torch.stack(spikes, dim=0), torch.stack(mems, dim=0)


def tutorial6(s, x):
    mem1, mem2, mem3 = s.lif1.init_leaky(), s.lif2.reset_mem(), s.lif3.init_leaky()
    spikes, mems = [], []
    for _ in range(T):
        spike, mem1 = s.lif1(F.max_pool2d(s.conv1(x), 2), mem1)
        spike, mem2 = s.lif2(F.max_pool2d(s.conv2(spike), 2), mem2)
        spike, mem3 = s.lif3(s.fc1(spike.view(x.size(0), -1)), mem3)
        spikes.append(spike)
        mems.append(mem3)
    return torch.stack(spikes), torch.stack(mems)


@pytest.mark.parametrize("options", [{}, {"reset_mechanism": "zero"}, {"reset_delay": False}, {"threshold": 0.3}])
def test_snntorch_tutorial_5(snn, options):
    def leaky():
        return snn.Leaky(beta=0.9, **options)

    parts = {"fc1": nn.Linear(6, 8), "lif1": leaky(), "fc2": nn.Linear(8, 3), "lif2": leaky()}
    graph = rolled(loud(Function(tutorial5, **parts)), torch.rand(N, 6))
    assert calls(graph) == {"fc1": 1, "fc2": 1}
    assert sequences(graph) == ["lif1", "lif2"]
    assert count(graph, torch.stack) == 0


def test_snntorch_tutorial_6(snn):
    parts = {f"lif{i}": snn.Leaky(beta=0.5) for i in (1, 2, 3)}
    parts |= {"conv1": nn.Conv2d(1, 4, 5), "conv2": nn.Conv2d(4, 6, 5), "fc1": nn.Linear(6 * 4 * 4, 10)}
    graph = rolled(loud(Function(tutorial6, **parts)), torch.rand(N, 1, 28, 28))
    assert calls(graph) == {"conv1": 1, "conv2": 1, "fc1": 1}
    assert sequences(graph) == ["lif1", "lif2", "lif3"]
    first = next(node for node in graph.graph.nodes if node.target is neuron_sequence)
    assert first.args[1].target == "expand"
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"].count(torch.stack) == 0


SNN = {
    "Leaky": (lambda snn: snn.Leaky(beta=0.9), "init_leaky"),
    "Lapicque": (lambda snn: snn.Lapicque(beta=0.9, threshold=0.2), "init_lapicque"),
    "Synaptic": (lambda snn: snn.Synaptic(alpha=0.8, beta=0.9), "init_synaptic"),
    "Alpha": (lambda snn: snn.Alpha(alpha=0.9, beta=0.8, threshold=0.1), "init_alpha"),
    "RLeaky": (lambda snn: snn.RLeaky(beta=0.9, linear_features=6), "init_rleaky"),
    "RSynaptic": (lambda snn: snn.RSynaptic(alpha=0.8, beta=0.9, linear_features=6), "init_rsynaptic"),
    "SLSTM": (lambda snn: snn.SLSTM(6, 6, threshold=0.1), "init_slstm"),
}


@pytest.mark.parametrize("name", SNN)
@pytest.mark.parametrize("direct", [True, False])
def test_snntorch_neurons_pass_all_their_states(snn, name, direct):
    make, init = SNN[name]

    def forward(s, x):
        state = getattr(s.lif, init)()
        state = state if isinstance(state, tuple) else (state,)
        recorded = []
        for t in range(T):
            spike, *rest = s.lif(s.fc1(x if direct else x[t]), *state)
            state = (spike, *rest) if name.startswith("R") else tuple(rest)
            recorded.append(s.fc2(spike))
        return torch.stack(recorded), state

    parts = {"fc1": nn.Linear(4, 6), "lif": make(snn), "fc2": nn.Linear(6, 3)}
    graph = rolled(loud(Function(forward, **parts)), torch.rand(N, 4) if direct else torch.rand(T, N, 4))
    assert calls(graph) == {"fc1": 1, "fc2": 1}
    assert sequences(graph) == ["lif"]


def test_delta_leaky_passes_a_tuple(snn):
    def forward(s, x):
        state, spikes = s.lif.reset_mem(), []
        for step in x:
            spike, state = s.lif(s.fc1(step), state)
            spikes.append(spike)
        return torch.stack(spikes), state

    net = Function(forward, fc1=nn.Linear(4, 6), lif=snn.DeltaLeaky(beta=0.9, delta_threshold=0.1))
    graph = rolled(net, torch.rand(T, N, 4))
    assert sequences(graph) == ["lif"]


def test_spikes_fed_back_through_a_layer_stay_stepwise(snn):
    def forward(s, x):
        mem1, mem2, spike = s.lif1.reset_mem(), s.lif2.reset_mem(), torch.zeros(N, 6)
        spikes = []
        for step in x:
            spike, mem1 = s.lif1(s.fc1(step) + s.back(spike), mem1)
            out, mem2 = s.lif2(s.fc2(spike), mem2)
            spikes.append(out)
        return torch.stack(spikes), mem1, mem2

    parts = {"fc1": nn.Linear(4, 6), "back": nn.Linear(6, 6), "fc2": nn.Linear(6, 3)}
    net = Function(forward, lif1=snn.Leaky(beta=0.9), lif2=snn.Leaky(beta=0.9), **parts)
    graph = rolled(loud(net), torch.rand(T, N, 4))
    assert calls(graph) == {"fc1": 1, "back": T, "lif1": T, "fc2": 1}
    assert sequences(graph) == ["lif2"]


@pytest.mark.parametrize("method", ["reset_mem", "reset_hidden"])
def test_a_reset_in_the_middle_cuts_the_sequence(snn, method):
    def forward(s, x):
        s.lif.reset_mem()
        out = []
        for t, step in enumerate(x):
            if t == 2:
                getattr(s.lif, method)()
            out.append(s.fc2(s.lif(s.fc1(step))))
        return torch.stack(out)

    net = Function(forward, fc1=nn.Linear(4, 6), lif=snn.Leaky(beta=0.9, init_hidden=True), fc2=nn.Linear(6, 2))
    x = torch.rand(T, N, 4)
    graph = reroll(trace(loud(net), (x,)), (x,))
    assert calls(graph) == {"fc1": 1, "lif": T, "fc2": 1}
    with torch.no_grad():  # not with a copy: snnTorch resets those that were made by a constructor
        torch.testing.assert_close(graph(x), net(x))


def test_a_reset_before_the_loop_stays_before_it(snn):
    def forward(s, x):
        s.lif.reset_mem()
        return torch.stack([s.fc2(s.lif(s.fc1(step))) for step in x])

    net = Function(forward, fc1=nn.Linear(4, 6), lif=snn.Leaky(beta=0.9, init_hidden=True), fc2=nn.Linear(6, 2))
    graph = rolled(loud(net), torch.rand(T, N, 4))
    assert calls(graph) == {"fc1": 1, "fc2": 1}
    assert sequences(graph) == ["lif"]


def test_a_mixed_model_batches_what_it_can(snn, sj):
    def forward(s, x):
        mem, count, previous = s.lif.reset_mem(), 0, torch.zeros(N, 6)
        for t in range(T):
            spike, mem = s.lif(s.fc1(x[:, t]), mem)
            gated = torch.fft.ifft(torch.fft.fft(spike)).real + previous
            previous = s.sn(s.fc2(gated))
            count = count + s.fc3(previous + spike)
        return count / T, mem

    parts = {"fc1": nn.Linear(4, 6), "fc2": nn.Linear(6, 6), "fc3": nn.Linear(6, 2)}
    net = loud(Function(forward, lif=snn.Leaky(beta=0.9), sn=sj.LIFNode(), **parts))
    graph = rolled(net, torch.rand(N, T, 4))
    assert calls(graph) == {"fc1": 1, "fc2": T, "sn": T, "fc3": 1}
    assert sequences(graph) == ["lif"]
    assert count(graph, "sum") == 1


@pytest.mark.parametrize("name", ["IFNode", "LIFNode", "ParametricLIFNode", "KLIFNode", "IzhikevichNode"])
def test_spikingjelly_single_step_loops(sj, name):
    make = getattr(sj, name)
    parts = {"fc1": nn.Linear(4, 6), "sn1": make(), "fc2": nn.Linear(6, 3), "sn2": make()}
    net = loud(Function(lambda s, x: sum(s.sn2(s.fc2(s.sn1(s.fc1(step)))) for step in x) / T, **parts))
    graph = rolled(net, torch.rand(T, N, 4))
    assert calls(graph) == {"fc1": 1, "fc2": 1}
    assert sequences(graph) == ["sn1", "sn2"]


def test_multi_step_networks_have_nothing_to_roll(sj):
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    net = nn.Sequential(layer.Conv2d(1, 2, 3), layer.BatchNorm2d(2), sj.LIFNode(), layer.Flatten(), layer.Linear(72, 2))
    functional.set_step_mode(net.eval(), "m")
    x = torch.rand(T, N, 1, 8, 8)
    assert reroll(trace(net, (x,)), (x,)) is None


def test_a_spiking_resnet_in_a_loop(sj):
    from tests.graph import zoo

    model, x = zoo.build("spiking_resnet", "s")
    net = Function(lambda s, x: sum(s.model(x) for _ in range(T)) / T, model=model).eval()
    graph = rolled(net, x)
    assert set(calls(graph).values()) == {1}
    assert calls(graph) == {name: 1 for name in calls(trace(net, (x,))) if not name.split(".")[-1].startswith("sn")}
    assert all(name.split(".")[-1].startswith("sn") for name in sequences(graph))


@pytest.mark.parametrize("framework", ["snntorch", "spikingjelly"])
def test_a_spike_flipped_by_rounding_is_judged_in_float64(framework, request, monkeypatch):
    """A layer that rounds differently on a larger batch, as matrix products do, at the very threshold."""

    class Batchwise(nn.Linear):
        def _rounding(self, x):
            return (1 + 2e-7 * len(x)) if x.dtype is torch.float32 else 1.0

    def forward(module, x):
        return F.linear(x, module.weight, module.bias) * module._rounding(x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    monkeypatch.setattr(nn.Linear, "_rounding", Batchwise._rounding, raising=False)
    neurons = request.getfixturevalue("snn" if framework == "snntorch" else "sj")
    sn = neurons.Leaky(beta=0.9, init_hidden=True) if framework == "snntorch" else neurons.IFNode()
    net = Function(lambda s, x: torch.stack([s.fc2(s.sn(s.fc1(step))) for step in x]), **layers(), sn=sn)
    nn.init.zeros_(net.fc1.weight)
    nn.init.constant_(net.fc1.bias, 1.0 - 6e-7)
    x = torch.rand(T, N, 4)
    graph = trace(net, (x,))
    batched = reroll(graph, (x,))
    assert batched is not None
    with torch.no_grad():
        assert not torch.allclose(graph(x), batched(x)), "no spike has flipped"
