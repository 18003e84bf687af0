"""Kernels whose counts stay on the device: chosen by what arrived earlier, without waiting."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle

import pytest
import torch

import sparseflow
from sparseflow.dispatch import runtime as runtime_module
from sparseflow.dispatch import sites
from sparseflow.dispatch.observe import CalibrationObserver
from sparseflow.dispatch.runtime import LayerRuntime, RuntimeConfig
from sparseflow.dispatch.sites import Measured
from sparseflow.kernels.base import counts
from sparseflow.modules.swap import swap
from sparseflow.plan import Path, Reason

from .fake import LINEAR, FakeEvent, FakeKernel, columns, curve, install, no_waiting, runtime_for, spikes

WEIGHT = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))


def tile(**times):
    kernel = FakeKernel()
    crossover = curve("tile", kernel, **{"at_zero": 0.0, "at_one": 2.0} | times)
    return kernel, Measured(crossover, crossover)


def event(**times):
    kernel = FakeEvent()
    crossover = curve("event", kernel, **{"at_zero": 0.0, "at_one": 20.0} | times)
    return kernel, Measured(crossover, crossover)


def paths(runtime, *inputs):
    """The path of each call; every result is that of the dense layer."""
    taken = []
    for x in inputs:
        before = runtime.stats.calls.copy()
        torch.testing.assert_close(runtime.run(x, WEIGHT, None, LINEAR), x @ WEIGHT.t())
        taken += list(runtime.stats.calls - before)
    return taken


def test_the_guard_notices_everything_that_waits():
    x = torch.ones(2)
    waiting = [
        *(lambda: x.tolist(), lambda: x.nonzero(), lambda: bool(x[0]), lambda: float(x[0]), lambda: x[0].item()),
        *(lambda: x[x > 0], lambda: torch.equal(x, x), lambda: x.cpu(), lambda: x.numpy()),
    ]
    for wait in waiting:
        with pytest.raises(AssertionError, match="waits for the device"), no_waiting():
            wait()


def test_counts_wait_for_a_deferred_scan():
    x = columns(0.5)
    assert counts(FakeKernel().prescan(x, "a")) == (50, 1000, 25, 50)


def test_the_first_call_is_decided_by_its_own_input(monkeypatch):
    assert paths(runtime_for(monkeypatch, tile()), columns(0.3)) == [Path.TILE]
    assert paths(runtime_for(monkeypatch, tile()), columns(0.8)) == [Path.DENSE]


def test_later_calls_are_decided_by_what_arrived_before(monkeypatch):
    runtime = runtime_for(monkeypatch, tile())
    low, high = columns(0.3), columns(0.8)
    assert paths(runtime, low, high, high, high, low, low, low) == [
        *(Path.TILE, Path.TILE, Path.TILE),  # the second high load was counted, and seen by the call after it
        *(Path.DENSE, Path.DENSE),
        *(Path.TILE, Path.TILE),
    ]


def test_hysteresis(monkeypatch):
    runtime = runtime_for(monkeypatch, tile())
    near = [columns(0.52)] * 6
    assert paths(runtime, columns(0.48), *near) == [Path.TILE] * 7
    runtime = runtime_for(monkeypatch, tile())
    near = [columns(0.48)] * 6
    assert paths(runtime, columns(0.6), *near) == [Path.DENSE] * 7


def test_no_call_after_the_first_waits(monkeypatch):
    runtime = runtime_for(monkeypatch, tile(), event())
    inputs = [columns(share) for share in (0.1, 0.9, 0.1, 0.5, 0.0, 1.0)] * 3
    runtime.run(inputs[0], WEIGHT, None, LINEAR)
    with no_waiting():
        for x in inputs:
            runtime.run(x, WEIGHT, None, LINEAR)
    assert set(runtime.stats.calls) == {Path.TILE, Path.EVENT, Path.DENSE}


def test_steady_calls_are_counted_ever_more_rarely(monkeypatch):
    kernel, measured = tile()
    runtime = runtime_for(monkeypatch, (kernel, measured))
    x = columns(0.3)
    for _ in range(2000):
        runtime.run(x, WEIGHT, None, LINEAR)
    assert kernel.prescans == 2001
    assert kernel.asked <= 9 + 2000 // 256 + 1


def test_looking_while_dense_is_bounded(monkeypatch):
    """One of several kernels at a time, at most as often as the dearest prescan allows."""
    pairs = tile(prescan_ms=0.05), event(prescan_ms=0.1)
    runtime = runtime_for(monkeypatch, *pairs)
    x = torch.ones(20, 50)
    for _ in range(2000):
        runtime.run(x, WEIGHT, None, LINEAR)
    looks = [kernel.prescans - 1 for kernel, _ in pairs]
    assert min(looks) >= 1
    assert sum(looks) <= 6 + 2000 // 256
    assert runtime.stats.calls == {Path.DENSE: 2000}


def test_the_kernel_predicted_fastest_runs(monkeypatch):
    """Clustered spikes leave the tiles empty, scattered ones do not; few of either are events."""
    runtime = runtime_for(monkeypatch, tile(at_zero=0.1), event())
    few, clustered = spikes(0.004), torch.zeros(20, 50)
    clustered[:, :5] = 1.0
    assert paths(runtime, few) == [Path.EVENT]
    assert paths(runtime_for(monkeypatch, tile(at_zero=0.1), event()), clustered) == [Path.TILE]
    assert paths(runtime_for(monkeypatch, tile(at_zero=0.1), event()), spikes(0.3)) == [Path.DENSE]


def test_the_load_of_a_kernel_that_does_not_run_is_looked_at(monkeypatch):
    """Only the tile kernel knows its occupancy: it has to be asked while another one runs."""
    kernel, measured = tile(at_zero=0.1, prescan_ms=0.01)
    runtime = runtime_for(monkeypatch, (kernel, measured), event(at_one=12.0))
    scattered, clustered = spikes(0.05), torch.zeros(20, 50)
    clustered[:, :2] = 1.0
    assert paths(runtime, scattered) == [Path.EVENT]
    taken = paths(runtime, *[clustered] * 40)
    assert taken[0] is Path.EVENT
    assert taken[-1] is Path.TILE


def test_a_capture_runs_what_is_chosen_and_touches_nothing_else(monkeypatch):
    kernel, measured = tile()
    runtime = runtime_for(monkeypatch, (kernel, measured))
    low, high = columns(0.3), columns(0.8)
    runtime.run(low, WEIGHT, None, LINEAR)
    asked, packs, seen = kernel.asked, kernel.packs, runtime.stats.numel
    for module in (sites, runtime_module):
        monkeypatch.setattr(module, "capturing", lambda x: True)
    with no_waiting():
        y = runtime.run(high, WEIGHT, None, LINEAR)
    assert torch.equal(y, high @ WEIGHT.t())
    assert runtime.stats.calls == {Path.TILE: 2}
    assert (kernel.asked, kernel.packs, runtime.stats.numel) == (asked, packs, seen)
    assert runtime.run(low, WEIGHT.clone(), None, LINEAR).shape == (20, 8)
    assert runtime.stats.calls[Path.DENSE] == 1, "a weight that nobody packed runs dense in the graph"


def test_what_a_capture_meets_first_runs_dense_and_is_said_once(monkeypatch, caplog):
    kernel, measured = tile()
    runtime = runtime_for(monkeypatch, (kernel, measured))
    monkeypatch.setattr(runtime_module, "capturing", lambda x: True)
    with caplog.at_level(logging.WARNING, "sparseflow"), no_waiting():
        for rows in (3, 4, 4):
            runtime.run(torch.ones(rows, 50), WEIGHT, None, LINEAR)
    assert kernel.prescans == 0
    assert len(caplog.records) == 1
    assert "before capturing" in caplog.text


def test_a_captured_training_step_runs_dense(monkeypatch, caplog):
    """The optimizer's changes between two replays would not reach the packed copy."""
    runtime = runtime_for(monkeypatch, tile())
    x = columns(0.3)
    runtime.run(x, WEIGHT, None, LINEAR, training=True)
    for module in (sites, runtime_module):
        monkeypatch.setattr(module, "capturing", lambda x: True)
    runtime.run(x, WEIGHT, None, LINEAR, training=True)
    runtime.run(x, WEIGHT, None, LINEAR)
    assert runtime.stats.calls == {Path.TILE: 2, Path.DENSE: 1}
    assert "gradients are recorded" in caplog.text


@pytest.mark.parametrize("compiled", [False, True])
def test_the_layer_says_whether_gradients_are_recorded(monkeypatch, compiled):
    torch._dynamo.reset()
    runtime, seen = runtime_for(monkeypatch, tile()), []
    layer = torch.nn.Linear(50, 8)
    swap(layer, runtime)
    run = LayerRuntime.run
    monkeypatch.setattr(
        LayerRuntime, "run", lambda *args, training=False: seen.append(training) or run(*args, training=training)
    )
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    call(columns(0.3)).sum().backward()
    with torch.no_grad():
        call(columns(0.3))
    assert seen == [True, False]


def test_inside_a_graph_other_times_count(monkeypatch):
    """Launching costs the host, not the device: what loses in eager calls may win in a graph, and is packed for it."""
    kernel, (eager, _) = tile(at_zero=1.5)
    graph = curve("graph", kernel, at_zero=0.0, at_one=2.0)
    runtime = runtime_for(monkeypatch, (kernel, Measured(eager, graph)))
    x = columns(0.3)
    assert paths(runtime, x, x) == [Path.DENSE, Path.DENSE]
    for module in (sites, runtime_module):
        monkeypatch.setattr(module, "capturing", lambda x: True)
    before = kernel.prescans
    assert paths(runtime, x) == [Path.TILE]
    assert kernel.prescans == before + 1


def test_a_capture_runs_no_code_for_the_first_time(monkeypatch, caplog):
    """Loading it is not allowed then: what only a graph would run runs once before, for such an input."""
    kernel, (eager, _) = tile(at_zero=1.5)
    graph = curve("graph", kernel, at_zero=0.0, at_one=2.0)
    runtime = runtime_for(monkeypatch, (kernel, Measured(eager, graph)))
    computed, compute = [], kernel.compute
    kernel.compute = lambda *arguments: computed.append(1) or compute(*arguments)
    x = columns(0.3)
    assert paths(runtime, x, x, x) == [Path.DENSE] * 3
    assert len(computed) == 1
    unaligned = torch.zeros(1 + x.numel())[1:].view_as(x).copy_(x)
    for module in (sites, runtime_module):
        monkeypatch.setattr(module, "capturing", lambda x: True)
    assert paths(runtime, x, unaligned) == [Path.TILE, Path.DENSE]
    assert "its kernel has not run yet" in caplog.text


def test_forced_sparse_runs_the_first_kernel_and_still_counts(monkeypatch):
    pairs = tile(), event()
    install(monkeypatch, *(kernel for kernel, _ in pairs))
    plan = sparseflow.LayerPlan("layer", "linear", Path.DENSE, Reason.NOT_MEASURED, sparseflow.Provenance.BINARY)
    runtime = LayerRuntime(plan, RuntimeConfig(mode="sparse"))
    assert paths(runtime, torch.ones(20, 50), *[columns(0.1)] * 4) == [Path.TILE] * 5
    assert pairs[1][0].prescans == 0
    described = runtime.describe()
    assert (described.path, described.reason, described.occupancy) == (Path.TILE, Reason.FORCED, 0.1)
    assert 0.0 < described.density < 1.0


def test_the_plan_names_what_runs_and_its_load(monkeypatch):
    runtime = runtime_for(monkeypatch, tile())
    assert runtime.describe().reason is Reason.NOT_MEASURED
    runtime.run(columns(0.3), WEIGHT, None, LINEAR)
    plan = runtime.describe()
    assert (plan.path, plan.reason, plan.density, plan.occupancy) == (Path.TILE, Reason.SPARSE_WINS, 0.03, 0.3)
    assert plan.crossover.axis == "occupancy"
    for _ in range(3):
        runtime.run(columns(0.9), WEIGHT, None, LINEAR)
    plan = runtime.describe()
    assert (plan.path, plan.reason, plan.occupancy) == (Path.DENSE, Reason.DENSE_WINS, 0.9)


def test_a_layer_without_memory_to_measure_runs_dense_and_says_so(monkeypatch):
    runtime = runtime_for(monkeypatch, tile())
    monkeypatch.setattr(runtime._crossovers, "of", lambda *_: ())
    assert paths(runtime, columns(0.1)) == [Path.DENSE]
    assert "no memory" in runtime.describe().detail


def test_a_kernel_that_never_wins_is_not_looked_at(monkeypatch):
    hopeless, measured = tile(at_zero=3.0, at_one=4.0)
    runtime = runtime_for(monkeypatch, (hopeless, measured), event())
    for x in [torch.zeros(20, 50), torch.ones(20, 50)] * 300:
        runtime.run(x, WEIGHT, None, LINEAR)
    assert hopeless.prescans == 1
    assert Path.TILE not in runtime.stats.calls


def test_what_never_wins_passes_by(monkeypatch):
    kernel, measured = tile(at_zero=3.0, at_one=4.0)
    runtime = runtime_for(monkeypatch, (kernel, measured))
    x = columns(0.1)
    runtime.run(x, WEIGHT, None, LINEAR)
    assert runtime.goes_dense(x)
    assert not runtime.goes_dense(x.double())
    assert runtime.always_dense(x, WEIGHT, None, LINEAR)


def test_calibration_looks_at_every_kernel_and_is_used(monkeypatch):
    pairs = tile(), event()
    runtime = runtime_for(monkeypatch, *pairs)
    observer = CalibrationObserver()
    runtime.observers.append(observer)
    runtime.run(columns(0.3), WEIGHT, None, LINEAR)
    assert set(observer.crossovers) == {"tile", "event"}
    assert observer.observation().density == 0.03
    assert observer.observation().occupancy == 0.3
    for (_, found), crossover in zip(runtime.last_site.candidates, observer.crossovers.values(), strict=True):
        assert found.eager == found.graph == crossover


def test_retuning_chooses_anew_at_once(monkeypatch):
    kernel, measured = tile()
    runtime = runtime_for(monkeypatch, (kernel, measured))
    x = columns(0.3)
    assert paths(runtime, x) == [Path.TILE]
    runtime.last_site.retune(dataclasses.replace(measured.eager, density=0.1, sparse_ms=(0.7, 3.7)))
    assert paths(runtime, x) == [Path.DENSE]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))], ids=["deepcopy", "pickle"])
def test_copies_start_afresh(monkeypatch, clone):
    runtime = runtime_for(monkeypatch, tile())
    runtime.run(columns(0.3), WEIGHT, None, LINEAR)
    twin = clone(runtime)
    assert twin.stats == runtime.stats
    assert twin.last_site is None
    assert twin._state.resident is not runtime._state.resident
