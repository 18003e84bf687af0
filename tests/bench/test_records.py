"""The results file: what is written is what is read, and no figure hides behind a red gate."""

import json

import pytest

from sparseflow.bench.records import Absent, Crossover, Gate, Layer, Metric, Phase, Point, Results, Scope

GREEN = Gate(True, "float64 error budget")


def point(**changes):
    fields = {
        "suite": "layers",
        "case": "3x3 64@56",
        "kernel": "events",
        "family": "event-driven",
        "scope": Scope.EXACT,
        "config": {"batch": 1, "T": 4},
        "rho": 0.05,
        "metric": Metric.LATENCY,
        "value": (1.0, 2.0, 3.0),
        "baseline": "best dense fp32",
        "baseline_value": (3.0, 5.0, 6.0),
        "honest": True,
        "gate": GREEN,
    }
    return Point(**(fields | changes))


def everything():
    return Results(
        {"torch": "2.15.0", "threads": 2},
        seed=7,
        points=[point(), point(value=None, gate=Gate(False, "budget", ("conv1: 3.1 budgets",)))],
        layers=[Layer("net", "conv1", "conv2d", 0.1, None, "fused", 1.0, 0.5, "spikes")],
        phases=[Phase("net", "level 2", "compute", 1.5)],
        crossovers=[Crossover("3x3 64@56", "events", 0.5, 0.6)],
        absent=[Absent("norse", "No matching distribution")],
    )


def test_what_is_saved_is_what_is_loaded(tmp_path):
    results = everything()
    results.save(tmp_path / "deep" / "results.json")
    assert Results.load(tmp_path / "deep" / "results.json") == results
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["results.json"]


def test_the_file_says_its_schema_and_no_other_one_is_read(tmp_path):
    path = tmp_path / "results.json"
    everything().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    with pytest.raises(ValueError, match="schema 99"):
        Results.load(path)


def test_a_red_gate_refuses_a_figure():
    with pytest.raises(ValueError, match=r"red gate: conv1: 3\.1 budgets"):
        point(gate=Gate(False, "budget", ("conv1: 3.1 budgets",)))


def test_a_speedup_needs_both_figures():
    assert point().speedup == 2.5
    assert point(baseline_value=None).speedup is None
    assert point(value=None).speedup is None
