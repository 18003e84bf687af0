"""One layer's decisions over many call signatures."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import sparseflow
from sparseflow.dispatch import crossovers, runtime
from sparseflow.modules.swap import runtimes

from ..modules.nets import Fire


def crossover(key, kernel, density):
    return sparseflow.plan.Crossover(key, density, 1.0, 0.01, 0.01, (0.01, 0.5), (0.1, 2.0), kernel.variants()[0])


class EventStub:
    """A kernel as far as a crossover names one."""

    @staticmethod
    def variants():
        return ("v",)


@pytest.fixture
def measured(monkeypatch):
    """Input sizes of the measurements made, all of which say that sparse wins below 0.3."""
    sizes = []

    def record(key, kernel, x, *_):
        sizes.append(x.numel())
        return crossover(key, kernel, density=0.3)

    monkeypatch.setattr(crossovers, "measure", record)
    monkeypatch.setattr(crossovers.shared_cache, "get", lambda key: None)
    return sizes


def accelerated(length: int) -> nn.Module:
    sparseflow.register_neuron(Fire, overwrite=True)
    model = nn.Sequential(Fire(), nn.Conv1d(16, 16, 3)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sparseflow.NothingAcceleratedWarning)
        return sparseflow.accelerate(model, torch.zeros(1, 16, length))


def test_a_stream_of_new_shapes_is_not_measured_for_ever(measured):
    model = accelerated(10)
    with torch.no_grad():
        for length in range(11, 60):
            model((torch.rand(1, 16, length) < 0.05) * 2.0)
    assert len(measured) == crossovers._MAX_MEASURED
    assert runtimes(model)["1"].stats.calls[sparseflow.Path.EVENT] == 50


def test_the_measurement_of_the_nearest_size_is_used(measured):
    model = accelerated(8)
    with torch.no_grad():
        for length in (16, 32, 64, 128, 256, 512, 1024, 70):
            model(torch.zeros(1, 16, length))
    assert "16x64|" in runtimes(model)["1"].describe().crossover.key


def test_what_never_wins_may_win_after_a_new_measurement(measured, monkeypatch):
    monkeypatch.setattr(crossovers, "measure", lambda key, kernel, *_: crossover(key, kernel, density=0.0))
    model = accelerated(10)
    layer = runtimes(model)["1"]
    with torch.no_grad():
        model(torch.zeros(1, 16, 10))
        assert layer.stats.calls == {sparseflow.Path.DENSE: 2}
        layer.last_site.retune(crossover("k", layer.last_site.kernel, density=0.3))
        model(torch.zeros(1, 16, 10))
    assert layer.stats.calls == {sparseflow.Path.DENSE: 2, sparseflow.Path.EVENT: 1}


def test_a_pickled_layer_leaves_its_calibration_behind_on_another_machine(measured, monkeypatch):
    config = runtime.RuntimeConfig(known={"k": crossover("k", EventStub, density=0.3)})
    plan = sparseflow.LayerPlan("1", "conv1d", "dense", sparseflow.Reason.NOT_MEASURED, sparseflow.Provenance.BINARY)
    pickled = pickle.dumps(runtime.LayerRuntime(plan, config))
    assert pickle.loads(pickled).config.known == config.known
    monkeypatch.setattr(runtime, "fingerprint", lambda: {"cpu": "another"})
    assert pickle.loads(pickled).config.known == {}


def test_the_counts_of_a_copy_are_its_own(measured):
    layer = runtimes(accelerated(10))["1"]
    twin = copy.deepcopy(layer)
    twin.stats.calls[sparseflow.Path.DENSE] += 1
    assert layer.stats.calls[sparseflow.Path.DENSE] == 0
