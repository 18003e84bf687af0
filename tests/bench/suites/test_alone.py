"""Memory and startup: measured in interpreters of their own, with a gate in each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sparseflow
from sparseflow.bench.records import Absent, Metric
from sparseflow.bench.suites import Options, alone, memory, nets, startup
from sparseflow.bench.suites.baselines import Call

from .small import one_thread

__all__ = ["one_thread"]
OPTIONS = Options(quick=True, repeats=2, threads=1)
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the resident set's peak is Linux's")


def small():
    return nets.fully_connected(32, recurrent=False, batch=1, steps=2, density=0.1, count=2)


def in_process(**changes):
    """Stands for the measured processes."""
    rows = {"resident": 10.0, "call": 2.0, "accelerate": 5.0, "why": "", "config": {"width": 8}}

    def run(*arguments, **_):
        wrong = {"why": changes["why"]} if "why" in changes and "eager" not in arguments else {}
        return rows | {"ms": 3.0} | wrong

    return run


def test_another_interpreter_answers_in_json():
    assert alone.run("-c", "print('noise'); print('{\"ms\": 1.5}')") == {"ms": 1.5}


def test_another_interpreters_error_is_told():
    with pytest.raises(RuntimeError, match=r"exit code 1: ValueError: no"):
        alone.run("-c", "raise ValueError('no')")


def test_a_wrong_answer_in_the_measured_process_is_red():
    workload = small()
    net = sparseflow.accelerate(workload.build(), workload.inputs[0], mode="sparse", fuse=False)
    assert alone.checked(net, Call(net, workload)) == ""

    def mismatch(*_):
        raise sparseflow.MismatchError("0: 3 budgets")

    net.register_forward_pre_hook(mismatch)
    gate = alone.gate(["", alone.checked(net, Call(net, workload))])
    assert (gate.green, gate.why) == (False, ("0: 3 budgets",))


class TestMemory:
    @LINUX
    def test_of_a_variant(self):
        found = memory.memory_of(small(), "eager")
        assert set(found) == {"resident", "call", "why", "config"}
        assert found["call"] < 100
        assert isinstance(memory._variant(small(), "level 2"), nn.Module)

    @LINUX
    def test_points_against_every_dense_variant(self, monkeypatch):
        monkeypatch.setattr(alone, "run", in_process())
        points = list(memory.measure("feed-forward, width 512", Options(threads=1)))
        assert {(p.kernel, p.baseline) for p in points} == {
            (kernel, baseline) for kernel in ("level 1", "level 2") for baseline in memory.DENSE
        }
        assert {p.value for p in points} == {(12.0, 12.0, 12.0)}
        assert {p.metric for p in points} == {Metric.MEMORY}
        assert [p.baseline for p in points if p.honest] == ["eager", "eager"]

    @LINUX
    def test_no_figure_behind_a_red_gate(self, monkeypatch):
        monkeypatch.setattr(alone, "run", in_process(why="0: 3 budgets"))
        (point,) = memory.measure("feed-forward, width 512", OPTIONS)
        assert (point.value, point.gate.why) == (None, ("0: 3 budgets",))

    def test_elsewhere_than_on_linux_it_is_absent(self, monkeypatch, tmp_path):
        monkeypatch.setattr(memory, "_FORGET_PEAK", tmp_path / "none")
        (row,) = memory.measure("feed-forward, width 512", OPTIONS)
        assert isinstance(row, Absent)


class TestStartup:
    def test_the_import_is_measured_in_alternation(self, monkeypatch):
        monkeypatch.setattr(alone, "run", in_process())
        (point,) = startup._imports(2)
        assert (point.case, point.value, point.baseline) == ("import", (3.0, 3.0, 3.0), "import torch")

    def test_points_of_every_cache_and_baseline(self, monkeypatch):
        monkeypatch.setattr(alone, "run", in_process())
        points = list(startup.measure("any", Options(threads=1), processes=2))
        kernels = (*startup.CACHES, startup.FIRST)
        dense = ("eager, first call", "compiled fp32, first call")
        assert [(p.kernel, p.baseline) for p in points] == [(kernel, name) for kernel in kernels for name in dense]
        assert [(p.kernel, p.baseline) for p in points if p.honest] == [(kernel, dense[0]) for kernel in startup.CACHES]
        assert {p.kernel: p.value[1] for p in points} == dict.fromkeys(startup.CACHES, 7.0) | {startup.FIRST: 2.0}

    def test_no_figure_behind_a_red_gate(self, monkeypatch):
        monkeypatch.setattr(alone, "run", in_process(why="0: 3 budgets"))
        points = list(startup.measure("any", OPTIONS, processes=1))
        assert {(p.value, p.gate.green) for p in points} == {(None, False)}

    def test_of_this_process(self, monkeypatch):
        monkeypatch.setattr(memory, "workloads", lambda: {"small": small})
        found = startup.startup_of("small", "accelerated")
        assert found["accelerate"] > 0
        assert found["call"] > 0
        assert found["why"] == ""
        assert startup.startup_of("small", "eager")["accelerate"] == 0.0

    def test_networks_are_among_the_workloads(self):
        assert set(startup.NETWORKS) <= set(memory.workloads())
        assert torch.get_num_threads() == 1
