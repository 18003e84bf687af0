"""What is counted and timed of a network: against sums made by hand, and which path is called dense."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("snntorch")
pytest.importorskip("spikingjelly")

import sparseflow
from sparseflow.study import datasets, measurement, nets
from sparseflow.study.hardware import Accelerator, cycles
from sparseflow.study.records import Choice, LayerShape, Matched, Neuron, Surrogate
from sparseflow.study.training import accuracy

SNNTORCH = Choice("digits", "snntorch", Neuron.LIF, Surrogate.ARCTAN, 0.9, 1.0, None, Matched.BETA, 0)
SPIKINGJELLY = dataclasses.replace(SNNTORCH, framework="spikingjelly")
BOTH = pytest.mark.parametrize("choice", [SNNTORCH, SPIKINGJELLY], ids=["snntorch", "spikingjelly"])
WIDTH = 4


@pytest.fixture(scope="module")
def data():
    return datasets.load("digits-events", steps=5, limit=40)


@pytest.fixture(autouse=True)
def threads_kept():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(choice, data):
    torch.manual_seed(3)
    return nets.build(choice, data.shape, data.classes, WIDTH).eval()


@torch.no_grad()
def spikes_by_hand(network, x):
    """Spikes of both neurons ``[T, N, ...]``, pooled by time step and layer with neurons called one step at a time."""
    nets.reset(network)
    found = []
    for layer, neuron in ((network.conv1, network.neuron1), (network.conv2, network.neuron2)):
        currents = torch.stack([F.max_pool2d(F.conv2d(step, layer.weight, layer.bias, padding=1), 2) for step in x])
        if nets.loops(network):
            membrane, outputs = neuron.reset_mem(), []
            for current in currents:
                spike, membrane = neuron(current, membrane)
                outputs.append(spike)
            x = torch.stack(outputs)
        else:
            x = neuron(currents)
        found.append(x)
    nets.reset(network)
    return found


class TestActivity:
    @BOTH
    def test_counts_are_those_made_by_hand(self, choice, data):
        network, x = made(choice, data), data.test.spikes.float()
        found = measurement.activity(network, data.test)
        inputs = [x, *spikes_by_hand(network, x)]
        samples = len(data.test)
        assert [layer.shape.name for layer in found.layers] == ["conv1", "conv2", "fc"]
        for layer, spikes in zip(found.layers, inputs, strict=True):
            assert 0 < spikes.mean() < 1, "silent layers prove nothing"
            assert layer.density == pytest.approx(float(spikes.mean()))
            assert layer.spikes == pytest.approx(float(spikes.sum()) / samples / data.steps)
        assert found.spikes == pytest.approx(sum(float(spikes.sum()) for spikes in inputs[1:]) / samples)
        assert found.accuracy == pytest.approx(accuracy(network, data.test))

    def test_shapes(self, data):
        first, second, last = (layer.shape for layer in measurement.activity(made(SNNTORCH, data), data.test).layers)
        assert first == LayerShape("conv1", 2, 4, (3, 3), (1, 1), (1, 1), 1, (16, 16), (16, 16))
        assert second == LayerShape("conv2", 4, 8, (3, 3), (1, 1), (1, 1), 1, (8, 8), (8, 8))
        assert last == LayerShape("fc", 128, 10)

    @BOTH
    def test_cycles_are_those_of_the_counts_by_sample_step_and_channel(self, choice, data):
        network, accelerator = made(choice, data), Accelerator(neuron_units=2)
        found = measurement.activity(network, data.test, accelerator)
        x = data.test.spikes.float()
        spikes = [x, *spikes_by_hand(network, x)]
        counts = [values.sum((3, 4)) for values in spikes[:2]] + [spikes[2].flatten(2)]
        for layer, count in zip(found.layers, counts, strict=True):
            expected = cycles(layer.shape, count.transpose(0, 1), accelerator).mean()
            assert layer.cycles == pytest.approx(float(expected))
        assert found.cycles == pytest.approx(sum(layer.cycles for layer in found.layers))

    @BOTH
    def test_the_size_of_a_call_does_not_matter(self, choice, data, monkeypatch):
        network = made(choice, data)
        whole = measurement.activity(network, data.test)
        monkeypatch.setattr(measurement, "_COUNTED", 7)
        parts = measurement.activity(network, data.test)
        assert (parts.accuracy, parts.spikes) == (whole.accuracy, whole.spikes)
        for one, other in zip(parts.layers, whole.layers, strict=True):
            assert one.cycles == pytest.approx(other.cycles)
            assert one.density == pytest.approx(other.density)

    def test_no_hook_is_left(self, data):
        network = made(SNNTORCH, data)
        measurement.activity(network, data.test)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


class TestLatency:
    @BOTH
    def test_dense_is_the_fastest_of_the_dense_paths(self, choice, data):
        found = measurement.latency(lambda: made(choice, data), data, repeats=2)
        dense = {name: ms for name, ms in found.ms.items() if name not in ("dense", "accelerated")}
        assert found.ms["dense"] == dense[found.dense]
        assert found.ms["dense"][1] == min(middle for _, middle, _ in dense.values())
        paths = {measurement.LOOP, measurement.OVER_TIME} if choice is SNNTORCH else {measurement.MULTI_STEP}
        assert {name.removesuffix(", channels_last") for name in dense} == paths
        assert found.error == ""
        low, middle, high = found.ms["accelerated"]
        assert 0 < low <= middle <= high

    @BOTH
    def test_all_paths_see_the_same_samples_and_give_the_same_class(self, choice, data, monkeypatch):
        outputs = {}

        def run_once(runs, repeats):
            for name, run in runs.items():
                seen = outputs.setdefault(name, [])
                plain = run.run
                run.run = lambda x, plain=plain, seen=seen: seen.append((x, plain(x).mean(0).argmax(1)))
                for _ in range(3):
                    run()
                run.run = plain
            return {name: [1.0, 1.0] for name in runs}

        monkeypatch.setattr(measurement, "alternate", run_once)
        measurement.latency(lambda: made(choice, data), data, batch=2)
        assert "accelerated" in outputs
        first, *others = outputs.values()
        assert first[0][0].shape == (5, 2, 2, 16, 16)
        assert not torch.equal(first[0][0], first[1][0])
        for other in others:
            for (x, found), (same_x, same) in zip(other, first, strict=True):
                assert torch.equal(x, same_x)
                assert torch.equal(found, same)

    def test_what_leaves_its_error_budget_is_not_timed(self, data, monkeypatch):
        def red(network):
            raise sparseflow.MismatchError("conv2: 3 times outside its budget")

        monkeypatch.setattr(sparseflow, "verify", red)
        found = measurement.latency(lambda: made(SNNTORCH, data), data, repeats=2)
        assert "accelerated" not in found.ms
        assert "dense" in found.ms
        assert found.error == "conv2: 3 times outside its budget"
