"""Every SpikingJelly family: traced bit-equal, spikes found, fx and dynamic discovery agree."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("spikingjelly")

from spikingjelly.activation_based import encoding, functional, layer, neuron
from torch import nn

from sparseflow.graph import spike_map, trace
from sparseflow.plan import Provenance
from tests.graph.labels import both_ways, provenances
from tests.graph.zoo import FAMILIES, SINGLE_STEP, build

CASES = [(family, "m") for family in FAMILIES] + [(family, "s") for family in SINGLE_STEP]


def calls(model, *inputs):
    """Outputs of successive calls without a reset between them, from a reset state."""
    functional.reset_net(model)
    with torch.no_grad():
        return [model(x) for x in inputs]


@pytest.mark.parametrize(("family", "step_mode"), CASES)
def test_graph_equals_the_model_also_on_a_second_call(family, step_mode):
    net, x = build(family, step_mode)
    expected = calls(net, x, x.flip(-1))
    assert len(torch.unique(expected[0])) > 4, "a silent net proves nothing"
    functional.reset_net(net)
    graph = trace(net, (x,))
    actual = calls(graph, x, x.flip(-1))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("family", "step_mode"), CASES)
def test_spikes_are_found(family, step_mode):
    net, x = build(family, step_mode)
    traced, watched = both_ways(net, x)
    assert traced.method == "fx"
    assert [(s.name, s.provenance, s.calls) for s in traced.layers] == [
        (s.name, s.provenance, s.calls) for s in watched.layers
    ]
    assert traced.layers[0].provenance is Provenance.DENSE, "the stem reads the image"
    fed = [site for site in traced.layers if site.provenance > Provenance.DENSE]
    attention = [site for site in traced.layers if "attention" in site.name]
    assert len(fed) > (len(traced.layers) - len(attention)) / 2


@pytest.mark.parametrize("family", [name for name in FAMILIES if "transformer" not in name])
def test_labels_are_true_of_the_values(family):
    """What a layer was said to be fed by is what it is fed."""
    net, x = build(family, "m")
    sites = {site.name: site for site in spike_map(net, (x,)).layers}
    seen = {}
    for name, module in net.named_modules():
        if name in sites:
            module.register_forward_pre_hook(lambda _m, args, name=name: seen.setdefault(name, args[0]))
    calls(net, x)
    for name, values in seen.items():
        if sites[name].provenance is Provenance.BINARY:
            assert set(values.unique().tolist()) <= {0.0, 1.0}, name
        if sites[name].provenance is Provenance.INTEGER:
            assert torch.equal(values, values.round()), name
    assert any(values.any() and sites[name].provenance is Provenance.BINARY for name, values in seen.items())


def test_known_structure_of_the_resnets():
    net, x = build("spiking_resnet", "m")
    sites = {site.name: site for site in spike_map(net, (x,)).layers}
    assert sites["layer1.0.conv1"].norm == "layer1.0.bn1"
    assert sites["layer1.0.conv1"].neuron == "layer1.0.sn1"
    assert (sites["layer1.0.conv2"].norm, sites["layer1.0.conv2"].neuron) == ("layer1.0.bn2", None), "add follows"
    assert sites["layer2.0.conv1"].detail == "layer1.0.sn2"
    assert sites["fc"].provenance is Provenance.SPARSE, "averaged spikes"
    net, x = build("sew_add", "m")
    sites = {site.name: site for site in spike_map(net, (x,)).layers}
    assert sites["layer2.0.conv1"].provenance is Provenance.INTEGER
    assert sites["layer2.0.conv1"].detail == "add(sn1, layer1.0.sn2)"


def test_ms_resnet_downsamples_read_the_membrane():
    net, x = build("ms_resnet", "m")
    dense = {site.name for site in spike_map(net, (x,)).layers if site.provenance is Provenance.DENSE}
    assert {name for name in dense if "shortcut" in name or "downsample" in name}


CONTAINERS = {
    "seq_to_ann": lambda: nn.Sequential(
        layer.SeqToANNContainer(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)),
        neuron.IFNode(step_mode="m"),
        layer.SeqToANNContainer(nn.Conv2d(4, 4, 3)),
    ),
    "multi_step": lambda: nn.Sequential(
        layer.MultiStepContainer(nn.Conv2d(2, 4, 3), neuron.IFNode(), nn.Conv2d(4, 4, 3)),
    ),
    "step_mode": lambda: nn.Sequential(
        layer.StepModeContainer(False, "m", nn.Conv2d(2, 4, 3)),
        layer.StepModeContainer(True, "m", neuron.IFNode(), nn.Conv2d(4, 4, 3)),
    ),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_are_looked_into(name):
    net = CONTAINERS[name]().eval()
    x = torch.rand(3, 2, 2, 8, 8) * 8
    assert list(provenances(net, x).values()) == ["DENSE", "BINARY"]
    expected = calls(net, x, x)
    functional.reset_net(net)
    assert all(torch.equal(a, b) for a, b in zip(calls(trace(net, (x,)), x, x), expected, strict=True))


def test_container_blocks_know_norm_and_neuron():
    site = spike_map(CONTAINERS["seq_to_ann"](), (torch.rand(3, 2, 2, 8, 8),)).layers[0]
    assert (site.name, site.norm, site.neuron) == ("0.0", "0.1", "1")


def test_recurrent_container_feeds_its_own_spikes_back():
    net = nn.Sequential(layer.LinearRecurrentContainer(neuron.IFNode(), 4, 4, step_mode="m"), layer.Linear(4, 2))
    found = provenances(net, torch.rand(3, 2, 4))
    assert found == {"0.rc": "DENSE", "1": "BINARY"}


ENCODERS = {"poisson": encoding.PoissonEncoder, "latency": lambda: encoding.LatencyEncoder(4)}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_emit_spikes(name):
    net = nn.Sequential(ENCODERS[name](), nn.Linear(4, 2))
    assert provenances(net, torch.rand(3, 4) * 0.9 + 0.05) == {"1": "BINARY"}


class ResetInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.sn, self.head = nn.Linear(4, 8), neuron.LIFNode(), nn.Linear(8, 2)

    def forward(self, x):
        functional.reset_net(self)
        return torch.stack([self.head(self.sn(self.fc(x * t))) for t in range(1, 4)])


def test_reset_net_inside_forward_stays_an_operation():
    net, x = ResetInside(), torch.rand(2, 4) * 4
    graph = trace(net, (x,))
    with torch.no_grad():
        expected = [net(x), net(x * 2)]
        actual = [graph(x), graph(x * 2)]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_dropout_keeps_spikes_in_eval_and_scales_them_in_training():
    net = nn.Sequential(layer.Linear(4, 8), neuron.IFNode(), layer.Dropout(0.5), layer.Linear(8, 2))
    x = torch.rand(2, 4) * 4
    assert provenances(net.eval(), x)["3"] == "BINARY"
    assert provenances(net.train(), x)["3"] == "SPARSE"


class OwnNode(neuron.LIFNode):
    """A subclass may emit anything, so it has to be registered itself."""


def test_unknown_subclass_is_dense_and_the_report_says_what_to_do():
    net = nn.Sequential(nn.Linear(4, 8), OwnNode(), nn.Linear(8, 2))
    site = spike_map(net, (torch.rand(2, 4),)).layers[1]
    assert site.provenance is Provenance.DENSE
    assert "OwnNode, not a registered neuron" in site.detail
