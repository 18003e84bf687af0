"""``bench`` without a model: what it runs, what it refuses, its exit codes and files."""

from __future__ import annotations

import json
import types

import pytest
import torch

from sparseflow import cli
from sparseflow.bench import cli as suites
from sparseflow.bench import process
from sparseflow.bench.records import Absent, Gate, Metric, Point, Results, Scope


@pytest.fixture(autouse=True)
def threads_kept():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def point(suite, case, gate):
    value = (1.0, 2.0, 3.0) if gate.green else None
    fields = (suite, case, "level 2", "fused blocks", Scope.EXACT, {"batch": 1}, 0.1, Metric.LATENCY, value)
    return Point(*fields, "eager", (2.0, 4.0, 5.0), False, gate)


@pytest.fixture
def measured(monkeypatch):
    """Cases that were asked for; they are green unless their suite is among ``red``."""
    calls, red = [], set()

    def measure(self, suite, case):
        calls.append((suite, case))
        gate = Gate(False, "budget", ("3 budgets",)) if suite in red else Gate(True, "budget")
        return process.Outcome([point(suite, case, gate)])

    monkeypatch.setattr(suites.Run, "measure", measure)
    return types.SimpleNamespace(calls=calls, red=red)


def test_quick_runs_every_suite_but_peers(measured, tmp_path):
    assert cli.main(["bench", "--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    assert {suite for suite, _ in measured.calls} == set(suites.SUITES) - {"peers"}
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.html"}


def test_suites_and_cases_can_be_chosen(measured, tmp_path):
    arguments = ["bench", "--quick", "--suite", "predecessor", "--only", "layer2", "--out", str(tmp_path)]
    assert cli.main([*arguments, "--threads", "1"]) == 0
    assert measured.calls == [("predecessor", "layer2.1.conv2")]


def test_a_red_gate_is_exit_code_1_and_has_no_figure(measured, tmp_path, capsys):
    measured.red.add("predecessor")
    assert cli.main(["bench", "--quick", "--suite", "predecessor", "--out", str(tmp_path)]) == 1
    assert all(point.value is None for point in Results.load(tmp_path / "results.json").points)
    assert "red gate: 3 budgets" in capsys.readouterr().err


def test_json_is_what_the_file_holds(measured, tmp_path, capsys):
    cli.main(["bench", "--quick", "--suite", "predecessor", "--out", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "results.json").read_text())


def test_an_interrupt_keeps_what_was_finished(monkeypatch, tmp_path, capsys):
    def measure(self, suite, case):
        if case == "layer2.1.conv2":
            raise KeyboardInterrupt
        return process.Outcome([point(suite, case, Gate(True, "budget")), Absent("norse", "not installed")])

    monkeypatch.setattr(suites.Run, "measure", measure)
    assert cli.main(["bench", "--quick", "--suite", "predecessor", "--out", str(tmp_path)]) == 130
    assert [point.case for point in Results.load(tmp_path / "results.json").points] == ["layer1.0.conv2"]
    assert "goes on from there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.py:build", "--quick"], "--quick is for the suites"),
        (["model.py:build", "--suite", "layers", "--out", "x"], "--out, --suite is for the suites"),
        (["--backend", "cpu"], "--backend is for a model"),
        (["--device", "cpu", "--quick"], "--device is for a model"),
        (["--compare", "HEAD", "--out", "x"], "--out does nothing with --compare"),
        (["--compare", "HEAD", "--suite", "memory"], "--compare runs layers and models, not memory"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_unknown_suite():
    with pytest.raises(SystemExit):
        cli.main(["bench", "--suite", "layer"])
