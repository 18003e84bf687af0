"""Hysteresis, probing and the arithmetic of crossovers."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseflow.dispatch.measure import crossing
from sparseflow.dispatch.policy import BackOff, Policy, probe_interval
from sparseflow.plan import Crossover


def crossover(density=0.2, dense_ms=1.0, prescan_ms=0.05):
    return Crossover("k", density, dense_ms, prescan_ms, 0.1, (0.01, 0.5), (0.1, 2.0), "v")


def test_hysteresis_keeps_the_last_choice_near_the_crossover():
    policy = Policy(crossover(0.2))
    assert policy.decide(0.205)  # it started sparse: a little above still is
    assert not policy.decide(0.22)
    assert not policy.decide(0.195)  # it is dense now: a little below still is
    assert policy.decide(0.18)


def test_a_dense_layer_looks_again_at_the_measured_interval():
    policy = Policy(crossover(0.2, dense_ms=1.0, prescan_ms=0.05))
    assert probe_interval(policy.crossover) == 5
    assert not policy.skip_scan()
    policy.decide(0.9)
    assert [policy.skip_scan() for _ in range(5)] == [True] * 4 + [False]
    policy.decide(0.9)  # nothing changed: the next look is twice as far away
    assert [policy.skip_scan() for _ in range(10)] == [True] * 9 + [False]
    policy.decide(0.1)
    assert policy.sparse
    assert not policy.skip_scan()
    for _ in range(20):
        policy.decide(0.9)
    assert sum(policy.skip_scan() for _ in range(256)) == 255


def test_sparse_that_never_wins_is_never_scanned():
    policy = Policy(crossover(0.0))
    assert policy.never
    assert all(policy.skip_scan() for _ in range(1000))


def test_sparse_that_never_wins_does_not_win_on_silence():
    assert not Policy(crossover(0.0)).decide(0.0)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_probing_costs_at_most_one_percent_or_is_at_its_rarest(dense_ms, prescan_ms):
    interval = probe_interval(crossover(0.2, dense_ms, prescan_ms))
    assert prescan_ms / interval <= 0.01 * dense_ms * (1 + 1e-9) or interval == 256


def test_looks_become_rarer_until_something_changes():
    looks, found = BackOff(1), []
    for call in range(600):
        if looks.due():
            found.append(call)
            looks.back_off()
    assert found[:6] == [0, 1, 3, 7, 15, 31]
    assert max(b - a for a, b in itertools.pairwise(found)) == 256
    looks.reset()
    assert looks.due()


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=6), st.floats(0.01, 10))
def test_crossing_lies_where_the_sweep_reaches_dense(times, dense_ms):
    densities = tuple((i + 1) / len(times) for i in range(len(times)))
    found = crossing(dense_ms, densities, times)
    record = dataclasses.replace(crossover(), densities=densities, sparse_ms=tuple(times))
    if times[0] >= dense_ms:
        assert found == 0.0
    elif all(t < dense_ms for t in times):
        assert found == densities[-1]
    else:
        assert record.sparse_ms_at(found) == pytest.approx(dense_ms, rel=1e-6)
        assert all(t < dense_ms for d, t in zip(densities, times, strict=True) if d < found)


def test_sparse_time_is_interpolated_and_held_at_the_ends():
    record = crossover()
    assert record.sparse_ms_at(0.0) == 0.1
    assert record.sparse_ms_at(0.255) == pytest.approx(1.05)
    assert record.sparse_ms_at(0.9) == 2.0
