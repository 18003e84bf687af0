"""Measuring: the shortest undisturbed time, the variant that wins, and what happens on a busy machine."""

from __future__ import annotations

import logging

import pytest
import torch

from sparseflow.config import MeasureBudget
from sparseflow.dispatch import measure as measuring_module
from sparseflow.dispatch.measure import DENSITIES, Bench, fastest, measure
from sparseflow.dispatch.progress import compile_budget, layer_budget, measuring, note_disturbed
from sparseflow.kernels import functional
from sparseflow.kernels.base import LinearCall, counts
from sparseflow.kernels.select import select

from .fake import FakeEvent, FakeKernel


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


def test_deferred_kernels_are_measured_on_their_own_axis_and_counts():
    x, weight = torch.zeros(32, 64), torch.randn(16, 64)
    for kernel in (FakeKernel(), FakeEvent()):
        found = measure("key", kernel, x, weight, None, LinearCall(), MeasureBudget(layer_ms=2.0))
        assert found.axis == kernel.axis
        assert found.densities == tuple(sorted(set(found.densities)))
        assert found.densities[0] == 0.0
        bench = Bench(kernel, x, weight, None, LinearCall())
        for density in (0.0, 0.08, 1.0):
            expected = counts(kernel.prescan(bench.spikes(density), "a")).load(kernel.axis)
            assert bench.load(bench.spikes(density), density, "a") == expected


def test_compiling_is_bounded():
    x, weight = torch.zeros(4, 8), torch.randn(4, 8)
    for seconds, variants in ((60.0, {"a", "b"}), (0.0, {"a"})):
        bench = Bench(FakeKernel(), x, weight, None, LinearCall())
        assert set(bench.prepared(x, MeasureBudget(compile_s=seconds))) == variants


def test_the_time_for_compiling_is_shared_by_the_layers_of_a_model():
    budget = MeasureBudget(compile_s=10.0)
    with measuring(3, budget):
        compile_budget(budget).spent_s += 11.0
        assert compile_budget(budget).spent
        with layer_budget(budget) as share:
            assert share == budget, "compiling does not eat the time for measuring"
    assert not compile_budget(budget).spent


def test_one_line_says_that_the_machine_was_busy(caplog):
    with caplog.at_level(logging.WARNING, "sparseflow"):
        with measuring(3, MeasureBudget()):
            note_disturbed("conv1")
            note_disturbed("conv2")
        assert len(caplog.records) == 1
        assert "2 layers (first: conv1)" in caplog.text
        note_disturbed("alone")
    assert "alone: measured while" in caplog.text
