"""Measuring: the shortest undisturbed time, the variant that wins, and what happens on a busy machine."""

from __future__ import annotations

import logging

import pytest
import torch

from sparseflow.config import MeasureBudget
from sparseflow.dispatch import measure as measuring_module
from sparseflow.dispatch.measure import DENSITIES, fastest, measure, synthetic_spikes
from sparseflow.dispatch.progress import measuring, note_disturbed
from sparseflow.kernels import functional
from sparseflow.kernels.select import select


class Clock:
    """Stands in for the timer: every run takes the next of the times it was given."""

    def __init__(self, **times):
        self.times = {name: iter(values) for name, values in times.items()}
        self.preempted = 0

    def run(self, name):
        return lambda: name

    def time(self, run):
        elapsed, preempted = next(self.times[run()])
        self.preempted += preempted
        return elapsed


@pytest.fixture
def clock(monkeypatch):
    def install(**times):
        fake = Clock(**times)
        monkeypatch.setattr(measuring_module, "_time_ms", fake.time)
        monkeypatch.setattr(measuring_module, "_preemptions", lambda: fake.preempted)
        return {name: fake.run(name) for name in times}

    return install


def test_disturbed_runs_do_not_count(clock):
    steady, short_but_preempted = [(2.0, 0)] * 100, [(1.0, 1), (3.0, 0)] * 50
    found = fastest(clock(a=steady, b=short_but_preempted), budget_ms=1e9)
    assert found.ms == {"a": 2.0, "b": 3.0}
    assert found.quiet


def test_a_busy_machine_is_noticed(clock):
    found = fastest(clock(a=[(2.0, 0)] * 100, b=[(5.0, 1), (4.0, 1)] * 50), budget_ms=1e9)
    assert found.ms["b"] in (4.0, 5.0)
    assert not found.quiet


def _case(density=0.1):
    x = (torch.rand(2, 32, 8, 8) < density).float()
    weight = torch.randn(48, 32, 3, 3)
    call = functional.conv_call(2, weight, 1, 1, 1, 1)
    return select(x, weight, call, "auto"), x, weight, None, call


def test_a_crossover_is_complete():
    kernel, *arguments = _case()
    found = measure("key", kernel, *arguments, MeasureBudget(layer_ms=5.0))
    assert found.variant in kernel.variants()
    assert found.densities == DENSITIES[: len(found.densities)]
    assert len(found.densities) == len(found.sparse_ms) >= 2
    assert found.dense_ms > 0
    assert found.prescan_ms > 0
    assert 0.0 <= found.density <= 1.0


def test_measuring_leaves_input_and_generator_alone():
    kernel, x, *rest = _case()
    before, state = x.clone(), torch.get_rng_state()
    measure("key", kernel, x, *rest, MeasureBudget(layer_ms=2.0))
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_synthetic_spikes_look_like_the_input(density):
    like = torch.zeros(4, 64, 16, 16).to(memory_format=torch.channels_last)
    spikes = synthetic_spikes(like, density)
    assert spikes.stride() == like.stride()
    assert set(spikes.unique().tolist()) <= {0.0, 1.0}
    assert float(spikes.mean()) == pytest.approx(density, abs=0.01)


def test_one_line_says_that_the_machine_was_busy(caplog):
    with caplog.at_level(logging.WARNING, "sparseflow"):
        with measuring(3, MeasureBudget()):
            note_disturbed("conv1")
            note_disturbed("conv2")
        assert len(caplog.records) == 1
        assert "2 layers (first: conv1)" in caplog.text
        note_disturbed("alone")
    assert "alone: measured while" in caplog.text
