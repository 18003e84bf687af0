"""Where the time of a call is said to go."""

from __future__ import annotations

import dataclasses

import pytest

import sparseflow
from sparseflow.bench.suites import phases
from sparseflow.kernels.cpu import engine
from sparseflow.kernels.cpu.chain import NativeChain

from .small import narrow, one_thread

__all__ = ["one_thread"]


@dataclasses.dataclass
class Hands:
    """A clock that stands still until it is moved."""

    now: int = 0

    def perf_counter_ns(self) -> int:
        return self.now


@pytest.mark.skipif(not engine.available(), reason=engine.reason())
def test_a_chain_of_blocks_computes(monkeypatch):
    hands, run = Hands(), NativeChain.run

    def slow(chain, first, n):
        hands.now += 2_000_000
        return run(chain, first, n)

    monkeypatch.setattr(phases, "time", hands)
    monkeypatch.setattr(NativeChain, "run", slow)
    workload = narrow()
    net = sparseflow.accelerate(workload.build(), workload.inputs[0], mode="sparse")
    found = {row.phase: row.ms for row in phases.phases_of(workload, "level 2", net, repeats=3)}
    assert found["compute"] >= 2.0
    assert found["rest"] == found["neuron"] == 0.0


def test_a_call_inside_another_of_its_phase_counts_once(monkeypatch):
    hands = Hands()
    monkeypatch.setattr(phases, "time", hands)
    clock = phases.Clock()

    def inner():
        hands.now += 3_000_000

    clock.wrap("blocks", clock.wrap("blocks", inner))()
    assert clock.ms["blocks"] == 3.0
