"""The page of a study without a browser: what it says, what it must not load, and what it must not say."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics

import pytest
from plotly.offline import get_plotlyjs

from sparseflow.study import page
from sparseflow.study.effects import Outcome, pareto
from sparseflow.study.findings import Verdict, findings
from sparseflow.study.records import Status, Study

from ..bench.test_page import HOSTILE, Loads
from . import invented
from .invented import ended, net

EMPTY = Study({}, ())


def html_of(study: Study, folder) -> str:
    """The page without plotly.js."""
    path = folder / "report.html"
    page.write(study, path)
    text = path.read_text(encoding="utf-8")
    assert get_plotlyjs() in text
    return text.replace(get_plotlyjs(), "")


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script id="results" type="application/json">(.*?)</script>', text, re.DOTALL)[1])


def rows_of(text: str, table: str) -> list[list[str]]:
    """Cells of a table's rows without their tags."""
    body = re.search(rf'<table id="{table}">.*?<tbody>(.*?)</tbody>', text, re.DOTALL)[1]
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in body.split("</tr>")[:-1]]
    return [[" ".join(re.sub(r"<[^>]*>", " ", cell).split()) for cell in row] for row in cells]


@pytest.fixture(scope="module")
def study():
    return invented.everything()


@pytest.fixture(scope="module")
def text(study, tmp_path_factory):
    return html_of(study, tmp_path_factory.mktemp("page"))


class TestHeader:
    def test_every_network_and_verdict_is_counted(self, study, text):
        first = " ".join(re.search(r"<header>(.*?)</header>", text, re.DOTALL)[1].split())
        count = {status: sum(each.status is status for each in study.nets) for status in Status}
        assert f"{len(study.nets)} networks: {count[Status.COMPLETE]} trained to the end" in first
        assert f"{count[Status.PRUNED]} pruned, {count[Status.FAILED]} failed; commit invented" in first
        judged = findings(study)
        for verdict in Verdict:
            assert f"{verdict} {sum(finding.verdict is verdict for finding in judged)}" in first

    def test_choices_settings_and_environment_are_listed(self, study, text):
        choices = dict(rows_of(text, "choices"))
        assert choices["dataset"] == "digits, saccades"
        assert choices["framework"] == "snntorch, spikingjelly"
        assert choices["slope"] == "default"
        assert choices["seed"] == "0, 1"
        assert choices["training"] == "epochs: 12, batch: 64"
        assert choices["samples"] == "None"
        assert dict(rows_of(text, "environment")) == {key: str(value) for key, value in study.environment.items()}


class TestFindings:
    def test_every_finding_has_its_verdict_figures_and_reason(self, study, text):
        judged = findings(study)
        rows = rows_of(text, "verdicts")
        assert len(rows) == len(judged) > 20
        for finding, (name, verdict, here, published, sentence) in zip(judged, rows, strict=True):
            assert name == f"{finding.name} {finding.dataset}"
            assert (verdict, published, sentence) == (finding.verdict, finding.published, finding.sentence)
            digits = 2 if finding.unit == "rank correlation" else 1
            assert here.startswith(f"{finding.estimate:+.{digits}f}")
            if finding.interval is not None:
                assert here.endswith(f"{finding.interval[0]:+.{digits}f} to {finding.interval[1]:+.{digits}f}")

    def test_a_finding_without_figures_has_none(self, tmp_path):
        found = html_of(Study({}, (ended(Status.FAILED, "out of memory"),)), tmp_path)
        rows = rows_of(found, "verdicts")
        assert {row[1] for row in rows} == {Verdict.UNDECIDED}
        assert {row[2] for row in rows} == {"-"}


class TestPredictions:
    def test_errors_are_shares_of_what_was_measured(self, tmp_path):
        nets = [net(ms=ms, beta=0.1 * i) for i, ms in enumerate((1.0, 2.0, 4.0), start=1)]
        nets = [dataclasses.replace(each, predicted={"accelerated": 2.0, "H200": 9.0}) for each in nets]
        (found,) = page.predictions(Study({}, tuple(nets)))
        assert (found.path, found.error.points) == ("accelerated", 3)
        assert found.error.median == pytest.approx(0.5)  # of 1, 0 and 1/2
        (row,) = rows_of(html_of(Study({}, tuple(nets)), tmp_path), "errors")
        assert row[:4] == ["digits", "accelerated", "3", "50.0 %"]

    def test_calibration_is_judged_by_what_it_was_not_fitted_to(self, tmp_path):
        """Networks of the same shape and densities, one of them twice as slow: the others predict half its time."""
        nets = [net(ms=ms, beta=0.1 * i) for i, ms in enumerate((2.0, 4.0), start=1)]
        (dense, accelerated) = page.predictions(Study({}, tuple(nets)))
        assert dense.calibrated.median == pytest.approx(0.0, abs=1e-3)
        assert accelerated.calibrated.median == pytest.approx((1.0 + 0.5) / 2, abs=1e-3)
        assert rows_of(html_of(Study({}, tuple(nets)), tmp_path), "errors")[1][-1] == "75.0 %"

    def test_every_dataset_by_itself(self, study, text):
        rows = rows_of(text, "errors")
        assert [row[:2] for row in rows] == [[d, p] for d in ("digits", "saccades") for p in ("dense", "accelerated")]
        complete = [each for each in study.nets if each.status is Status.COMPLETE and each.choice.dataset == "digits"]
        errors = [abs(each.predicted["dense"] / each.latency["dense"][1] - 1) for each in complete]
        assert rows[0][2:4] == [str(len(complete)), f"{100 * round(statistics.median(errors), 4):.1f} %"]

    def test_one_network_cannot_be_held_out(self, tmp_path):
        rows = rows_of(html_of(Study({}, (net(),)), tmp_path), "errors")
        assert [row[-1] for row in rows] == ["-", "-"]

    def test_nothing_predicted_is_said(self, tmp_path):
        found = html_of(Study({}, (dataclasses.replace(net(), predicted={}),)), tmp_path)
        assert "No latency was both predicted and measured." in found


class TestData:
    def test_every_network_is_there_with_its_figures(self, study, text):
        rows = data_of(text)["nets"]
        assert len(rows) == len(study.nets)
        for each, row in zip(study.nets, rows, strict=True):
            assert (row["status"], row["error"], row["seed"]) == (each.status, each.error, each.choice.seed)
            assert (row["accuracy"], row["spikes"], row["cycles"]) == (each.accuracy, each.spikes, each.cycles)
            assert row["accelerated latency"] == (each.latency["accelerated"][1] if each.latency else None)
            assert [layer["density"] for layer in row["layers"]] == [layer.density for layer in each.layers]
            assert (row["neuron"], row["slope"], row["beta"]) == (each.choice.neuron, "default", str(each.choice.beta))

    def test_pruned_and_failed_networks_are_marked(self, text):
        rows = data_of(text)["nets"]
        assert {row["status"] for row in rows} == set(Status)
        assert all("DivergedError" in row["error"] for row in rows if row["status"] == Status.FAILED)

    @pytest.mark.parametrize("cost", [Outcome.ACCELERATED, Outcome.DENSE, Outcome.CYCLES, Outcome.SPIKES])
    def test_fronts_are_those_of_every_dataset(self, study, text, cost):
        best = [
            each.choice.name
            for dataset in ("digits", "saccades")
            for each in pareto([one for one in study.nets if one.choice.dataset == dataset], cost)
        ]
        marked = [
            each.choice.name
            for each, row in zip(study.nets, data_of(text)["nets"], strict=True)
            if cost in row["fronts"]
        ]
        assert sorted(marked) == sorted(best)
        assert len(best) > 2

    def test_effects_and_findings_are_those_that_were_computed(self, study, text):
        data = data_of(text)
        assert [row["sentence"] for row in data["findings"]] == [finding.sentence for finding in findings(study)]
        assert {row["parameter"] for row in data["effects"]} == {
            "framework", "neuron", "surrogate", "beta", "threshold", "matched",
        }  # fmt: skip

    @pytest.mark.parametrize("figure", [float("nan"), float("inf")])
    def test_a_figure_that_is_not_finite_is_an_error_that_names_the_network(self, figure, tmp_path):
        wrong = net(cycles=figure)
        with pytest.raises(ValueError, match=f"{wrong.choice.name}: a figure is not finite"):
            page.write(Study({}, (wrong,)), tmp_path / "report.html")

    def test_the_same_study_gives_the_same_bytes(self, study, text, tmp_path):
        assert html_of(study, tmp_path) == text


class TestSmall:
    def test_an_empty_study(self, tmp_path):
        found = html_of(EMPTY, tmp_path)
        assert "0 networks: 0 trained to the end" in found
        for why in ("Nothing to judge", "No latency was both predicted and measured", "did not record its environment"):
            assert why in found
        assert data_of(found)["nets"] == data_of(found)["effects"] == []

    def test_one_network(self, tmp_path):
        found = html_of(Study({}, (net(),)), tmp_path)
        assert "1 network: 1 trained" in found
        (row,) = data_of(found)["nets"]
        assert set(row["fronts"]) == {"accelerated latency", "dense latency", "cycles", "spikes"}

    def test_networks_without_latency(self, tmp_path):
        (row,) = data_of(html_of(Study({}, (net(ms=None),)), tmp_path))["nets"]
        assert row["accelerated latency"] is row["dense latency"] is None
        assert set(row["fronts"]) == {"cycles", "spikes"}


class TestSafety:
    def test_nothing_is_loaded_from_elsewhere(self, text):
        loads = Loads()
        loads.feed(text)
        assert loads.found
        assert all(re.fullmatch(r"#[a-z]+|data:,", address) for address in loads.found)
        assert not re.search(r"@import|url\(|https?://(?!www\.w3\.org/2000/svg\")", text)
        assert "default-src 'none'" in text

    def test_hostile_names_end_no_script_and_make_no_element(self, text, tmp_path):
        nets = (net(dataset=HOSTILE, framework=HOSTILE), ended(Status.FAILED, HOSTILE))
        found = html_of(Study({HOSTILE: HOSTILE}, nets, settings={HOSTILE: HOSTILE}), tmp_path)
        assert found.count("</script") == text.count("</script")
        assert "<img" not in found
        assert data_of(found)["nets"][0]["dataset"] == HOSTILE
