"""Runs of suites: taken up again, saved case by case, red where a gate is, in processes of their own."""

from __future__ import annotations

import io
import sys
import types

import pytest
import torch
from rich.console import Console

from sparseflow.bench import process, runner, suites, summary
from sparseflow.bench.records import Absent, Crossover, Gate, Layer, Metric, Point, Results, Scope
from sparseflow.bench.suites import Case, Options

GREEN, RED = Gate(True, "bit-equal"), Gate(False, "bit-equal", ("the sum is off by 1",))
OPTIONS = Options(quick=True, repeats=2, threads=1)


def point(case, gate=GREEN, **changes):
    value = (1.0, 2.0, 3.0) if gate.green else None
    fields = {
        "suite": "mine", "case": case, "kernel": "k", "family": "f", "scope": Scope.EXACT, "config": {"batch": 1},
        "rho": 0.1, "metric": Metric.LATENCY, "value": value, "baseline": "eager", "baseline_value": (2.0, 4.0, 5.0),
        "honest": False, "gate": gate,
    }  # fmt: skip
    return Point(**(fields | changes))


class Measured:
    """Counts what is measured; ``rows`` are those of a case."""

    def __init__(self, **rows):
        self.rows, self.calls = rows, []

    def __call__(self, suite, case):
        self.calls.append(case)
        rows = self.rows[case]
        if isinstance(rows, BaseException):
            raise rows
        return process.Outcome(rows)


@pytest.fixture
def mine(monkeypatch):
    """A suite of cases ``a``, ``b`` and ``c``."""
    module = types.ModuleType("suite_of_this_test")
    module.run = lambda options: iter([Case(name, lambda name=name: [point(name)]) for name in "abc"])
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(suites.SUITES, "mine", module.__name__)
    return module


@pytest.fixture
def run(mine, tmp_path):
    def start(measure, **options):
        console = Console(file=io.StringIO())
        started = runner.Run(tmp_path, OPTIONS, console=console, **options)
        started.measure = measure
        return started

    before = torch.get_num_threads()
    yield start
    torch.set_num_threads(before)


def all_green():
    return Measured(a=[point("a")], b=[point("b")], c=[point("c")])


class TestResuming:
    def test_finished_cases_are_not_measured_again(self, run):
        assert run(all_green()).run(["mine"])
        again = all_green()
        found = run(again)
        assert found.run(["mine"])
        assert again.calls == []
        assert len(found.results.points) == 3

    def test_an_interrupted_run_leaves_what_was_finished_and_is_taken_up(self, run):
        first = run(Measured(a=[point("a")], b=KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            first.run(["mine"])
        assert [p.case for p in Results.load(first.path).points] == ["a"]
        second = all_green()
        run(second).run(["mine"])
        assert second.calls == ["b", "c"]

    def test_red_and_absent_cases_are_tried_again_and_replaced(self, run):
        rows = {"a": [point("a", RED)], "b": [Absent("mine: b", "no snntorch")], "c": [point("c")]}
        assert not run(Measured(**rows)).run(["mine"])
        again = all_green()
        found = run(again)
        assert found.run(["mine"])
        assert again.calls == ["a", "b"]
        assert [p.gate.green for p in found.results.points] == [True] * 3
        assert found.results.absent == []

    def test_other_settings_are_refused_unless_fresh(self, run, tmp_path):
        run(all_green()).run(["mine"])
        other = Options(quick=True, repeats=9, threads=1)
        with pytest.raises(runner.OtherRunError, match=r"repeats 2, now 9\).*--fresh"):
            runner.Run(tmp_path, other)
        assert runner.Run(tmp_path, other, fresh=True).results.points == []

    def test_the_environment_is_in_the_results(self, run):
        found = run(all_green())
        found.run(["mine"])
        about = Results.load(found.path).environment
        assert about["torch"] == torch.__version__
        assert (about["threads"], about["quick"], about["repeats"]) == (1, True, 2)

    def test_only_chooses_cases(self, run):
        measured = all_green()
        run(measured, only="b").run(["mine"])
        assert measured.calls == ["b"]


class TestGates:
    def test_a_red_gate_is_told(self, run):
        found = run(Measured(a=[point("a", RED)], b=[point("b")], c=[point("c")]))
        assert not found.run(["mine"])
        assert Results.load(found.path).points[0].value is None

    def test_a_failed_case_is_told_and_the_others_run(self, run):
        def measure(suite, case):
            failed = process.Outcome([Absent("mine: a", "exit code -11")], failed=True)
            return failed if case == "a" else process.Outcome([point(case)])

        found = run(measure)
        assert not found.run(["mine"])
        assert found.failed == ["mine: a"]
        assert [p.case for p in found.results.points] == ["b", "c"]

    def test_a_missing_framework_is_no_failure(self, run):
        absent = [Absent("mine: a", "ModuleNotFoundError: snntorch")]
        assert run(Measured(a=absent, b=[point("b")], c=[point("c")])).run(["mine"])

    def test_a_suite_that_cannot_be_imported_is_absent(self, run, monkeypatch):
        monkeypatch.setitem(suites.SUITES, "mine", "no_such_module")
        found = run(all_green())
        assert found.run(["mine"])
        assert [row.name for row in found.results.absent] == ["mine"]


def test_rows_of_another_suite_stay():
    results = Results(
        {}, 0, points=[point("a", suite="other")], layers=[Layer("a", "conv", "c", None, None, "", None, None, "")]
    )
    runner.add(results, "mine", "a", [point("a"), Crossover("a", "k", 0.1, 0.2)])
    runner.add(results, "mine", "a", [point("a"), Crossover("a", "k", 0.3, 0.2)])
    assert [p.suite for p in results.points] == ["other", "mine"]
    assert len(results.layers) == 1
    assert [c.measured for c in results.crossovers] == [0.3]


class TestProcess:
    """Cases of a real suite, since another process has to find them."""

    def test_a_case_runs_elsewhere_and_its_rows_come_back(self, tmp_path):
        outcome = process.measure("predecessor", "layer2.1.conv2", OPTIONS, tmp_path / "log")
        assert not outcome.failed
        assert {row.case for row in outcome.rows} == {"layer2.1.conv2"}
        assert "predecessor" in (tmp_path / "log").read_text()

    def test_a_case_that_does_not_exist_fails(self, tmp_path):
        outcome = process.measure("layers", "no such shape", OPTIONS, tmp_path / "log")
        assert outcome.failed
        assert outcome.rows[0].name == "layers: no such shape"

    def test_an_import_error_is_an_absence_and_another_error_a_failure(self, mine):
        def missing():
            raise ModuleNotFoundError("No module named 'snntorch'")

        def broken():
            raise RuntimeError("out of memory")

        mine.run = lambda options: iter([Case("a", missing), Case("b", broken)])
        before = torch.get_num_threads()
        absent, failed = (process.measure_here("mine", case, OPTIONS) for case in "ab")
        torch.set_num_threads(before)
        assert (absent.failed, failed.failed) == (False, True)
        assert absent.rows == [Absent("mine: a", "ModuleNotFoundError: No module named 'snntorch'")]
        assert failed.rows == [Absent("mine: b", "RuntimeError: out of memory")]


class TestSummary:
    def text(self, *points):
        console = Console(width=130, record=True, file=io.StringIO())
        console.print(summary.table("mine", Results({}, 0, points=list(points))))
        return console.export_text()

    def test_honest_baseline_is_shown_and_losing_cells_are(self):
        honest = point("a", baseline="compiled fp32", baseline_value=(0.5, 1.0, 2.0), honest=True)
        text = self.text(point("a"), honest)
        assert "compiled fp32" in text
        assert "0.50x" in text
        assert "eager" not in text

    def test_without_one_the_least_gain_is_shown_with_a_tag(self):
        text = self.text(point("a"), point("a", baseline="eager channels_last", baseline_value=(1.0, 3.0, 4.0)))
        assert "1.50x" in text
        assert "2.00x" not in text
        assert "not honest" in text

    def test_a_red_gate_has_its_reason_and_no_figure(self):
        text = self.text(point("a", RED))
        assert "red gate: the sum is off by 1" in text
        assert "2.00x" not in text

    def test_approximate_methods_come_last(self):
        text = self.text(point("first", scope=Scope.APPROXIMATE), point("second"))
        assert text.index("second") < text.index("first")
