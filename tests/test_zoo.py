"""Whole SpikingJelly and snnTorch networks, every spike-fed layer on the sparse path, against themselves dense.

Layer by layer: fused blocks have tests of their own (modules/fused).
"""

from __future__ import annotations

import copy

import pytest
import torch
from spikingjelly.activation_based import functional
from torch import nn

import sparseflow
from sparseflow.modules.swap import runtimes

from .graph.zoo import FAMILIES, SINGLE_STEP, build

snn = pytest.importorskip("snntorch")
from snntorch import utils  # noqa: E402

CASES = [(name, "m") for name in FAMILIES] + [(name, "s") for name in SINGLE_STEP]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def teacher_forced(model, call) -> int:
    """Run ``call`` with every sparse layer checked against its own dense result; returns the number of checks."""
    with sparseflow.verify(model) as watch, torch.no_grad():
        call()
    assert watch.worst <= 1.0
    return watch.checked


@pytest.mark.parametrize(("family", "step_mode"), CASES)
def test_spikingjelly_families(family, step_mode):
    model, x = build(family, step_mode)
    sparseflow.accelerate(model, x, mode="sparse", fuse=False)
    report = sparseflow.report(model)
    assert report.method == "fx"
    assert report.accelerated >= 1
    assert all(layer.reason for layer in report.layers)
    with torch.no_grad():
        with sparseflow.disabled(model):
            dense = [model(x), model(x)]  # the second call starts from the first one's membranes
        functional.reset_net(model)
        assert teacher_forced(model, lambda: None) == 0
        ours = [model(x), model(x)]
    functional.reset_net(model)
    assert teacher_forced(model, lambda: model(x)) >= report.accelerated
    for a, b in zip(ours, dense, strict=True):
        assert (a - b).abs().median() <= 1e-4 * b.abs().max()  # a flip at the threshold may move a few outputs
    functional.reset_net(model)
    sparseflow.restore(model)
    with torch.no_grad():
        assert torch.equal(model(x), dense[0])


def test_densities_of_the_report_are_those_of_the_tensors():
    model, x = build("spiking_resnet", "m")
    seen: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(
                lambda m, args, name=name: seen.update({name: float((args[0] != 0).float().mean())})
            )
    sparseflow.accelerate(model, x, mode="sparse", fuse=False)
    with torch.no_grad():
        model(x)
    layers = {layer.name: layer for layer in sparseflow.report(model).layers if layer.path != "dense"}
    assert len(layers) > 5
    for name in seen.keys() & layers.keys():
        assert layers[name].density == pytest.approx(seen[name], abs=1e-6)


def test_reset_net_and_streaming_after_accelerate():
    model, x = build("sew_add", "m")
    with torch.no_grad():
        expected = [model(x), model(x * 0.5)]
        functional.reset_net(model)
        sparseflow.accelerate(model, x, mode="sparse")
        for _ in range(2):
            for frame, wanted in zip((x, x * 0.5), expected, strict=True):
                torch.testing.assert_close(model(frame), wanted, rtol=1e-3, atol=1e-3)
            functional.reset_net(model)


def test_training_gradients_through_a_spiking_resnet():
    model, x = build("spiking_resnet", "m")
    model.train()
    for module in model.modules():  # the running statistics are updated by both runs
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    sparseflow.accelerate(model, x, mode="sparse")

    def gradients():
        functional.reset_net(model)
        model.zero_grad()
        model(x).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    ours = gradients()
    with sparseflow.disabled(model):
        theirs = gradients()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).abs().median() <= 1e-4 * theirs[name].abs().max() + 1e-7, name


class Loop(nn.Module):
    """The tutorials' shape: state passed through an explicit loop over time."""

    def __init__(self, make):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.first = make()
        self.fc1 = nn.Conv2d(16, 16, 3)
        self.second = make()
        self.fc2 = nn.Linear(16 * 36, 10)

    def forward(self, x):
        states = [None, None]
        outputs = []
        for t in range(x.size(0)):
            a, states[0] = self._step(self.first, self.conv(x[t]), states[0])
            b, states[1] = self._step(self.second, self.fc1(a), states[1])
            outputs.append(self.fc2(b.flatten(1)))
        return torch.stack(outputs)

    @staticmethod
    def _step(neuron, current, state):
        spikes, *state = neuron(current, *(state or ()))
        return spikes, tuple(state)


NEURONS = {
    "leaky": lambda: snn.Leaky(beta=0.9, threshold=0.3),
    "leaky zero reset": lambda: snn.Leaky(beta=0.9, threshold=0.3, reset_mechanism="zero"),
    "lapicque": lambda: snn.Lapicque(beta=0.9, threshold=0.3),
    "synaptic": lambda: snn.Synaptic(alpha=0.8, beta=0.9, threshold=0.3),
    "alpha": lambda: snn.Alpha(alpha=0.9, beta=0.8, threshold=0.3),
    "rleaky": lambda: snn.RLeaky(beta=0.9, V=0.1, all_to_all=False, threshold=0.3),
    "rsynaptic": lambda: snn.RSynaptic(alpha=0.8, beta=0.9, V=0.1, all_to_all=False, threshold=0.3),
}


@pytest.mark.parametrize("name", NEURONS)
def test_snntorch_explicit_loops(name):
    torch.manual_seed(0)
    model, x = Loop(NEURONS[name]).eval(), torch.rand(4, 2, 1, 8, 8) * 3
    twin = copy.deepcopy(model)  # snnTorch's own reset forgets the recurrent spikes
    with torch.no_grad():
        expected = [twin(x), twin(x)]  # the second call starts from the first one's membranes
    sparseflow.accelerate(model, x, mode="sparse", fuse=False)
    assert {"fc1", "fc2"} <= set(runtimes(model))
    assert "conv" not in runtimes(model)
    with torch.no_grad():
        for wanted in expected:
            torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
    assert teacher_forced(model, lambda: model(x)) == 8


@pytest.mark.parametrize("neuron", [snn.Leaky, snn.Lapicque])
def test_snntorch_stepped_from_outside(neuron):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        neuron(beta=0.9, threshold=0.3, init_hidden=True),
        nn.Conv2d(8, 16, 3),
        neuron(beta=0.9, threshold=0.3, init_hidden=True),
        nn.Flatten(),
        nn.Linear(16 * 16, 10),
        neuron(beta=0.9, threshold=0.3, init_hidden=True, output=True),
    ).eval()
    frames = torch.rand(5, 2, 1, 8, 8) * 3

    def play():
        utils.reset(model)
        with torch.no_grad():
            return torch.stack([model(frame)[1] for frame in frames])

    expected = play()
    utils.reset(model)
    sparseflow.accelerate(model, frames[0], mode="sparse")
    assert set(runtimes(model)) == {"2", "5"}
    for _ in range(2):
        torch.testing.assert_close(play(), expected, rtol=1e-4, atol=1e-4)
