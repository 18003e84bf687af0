"""One layer's decisions over many call signatures."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import sparseflow
from sparseflow.dispatch import runtime
from sparseflow.modules.swap import runtimes

from ..modules.nets import Fire


def crossover(key, kernel, density):
    return sparseflow.plan.Crossover(key, density, 1.0, 0.01, 0.01, (0.01, 0.5), (0.1, 2.0), kernel.variants()[0])


@pytest.fixture
def measured(monkeypatch):
    """Input sizes of the measurements made, all of which say that sparse wins below 0.3."""
    sizes = []

    def record(key, kernel, x, *_):
        sizes.append(x.numel())
        return crossover(key, kernel, density=0.3)

    monkeypatch.setattr(runtime, "measure", record)
    monkeypatch.setattr(runtime.shared_cache, "get", lambda key: None)
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
    assert len(measured) == runtime._MAX_MEASURED
    assert runtimes(model)["1"].stats.calls[sparseflow.Path.EVENT] == 50


def test_the_measurement_of_the_nearest_size_is_used(measured):
    model = accelerated(8)
    with torch.no_grad():
        for length in (16, 32, 64, 128, 256, 512, 1024, 70):
            model(torch.zeros(1, 16, length))
    assert "16x64|" in runtimes(model)["1"].describe().crossover.key


def test_what_never_wins_may_win_after_a_new_measurement(measured, monkeypatch):
    monkeypatch.setattr(runtime, "measure", lambda key, kernel, *_: crossover(key, kernel, density=0.0))
    model = accelerated(10)
    layer = runtimes(model)["1"]
    with torch.no_grad():
        model(torch.zeros(1, 16, 10))
        assert layer.stats.calls == {sparseflow.Path.DENSE: 2}
        layer.last_site.retune(crossover("k", layer.last_site.kernel, density=0.3))
        model(torch.zeros(1, 16, 10))
    assert layer.stats.calls == {sparseflow.Path.DENSE: 2, sparseflow.Path.EVENT: 1}
