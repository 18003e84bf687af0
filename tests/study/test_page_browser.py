"""The page of a study in a real browser: what is drawn, coloured, filtered and sorted, and that it asks nobody."""

from __future__ import annotations

import dataclasses
import statistics
import time

import numpy as np
import pytest

from sparseflow.study import page
from sparseflow.study.effects import Outcome, pareto
from sparseflow.study.findings import findings
from sparseflow.study.records import Status, Study, Surrogate

from ..bench.test_page import HOSTILE
from ..opened import Page
from . import invented
from .invented import ended, net
from .test_page import EMPTY

pytestmark = pytest.mark.browser
CHARTS = ("findings", "front", "density", "effects", "predicted")
STUDY = invented.everything()
DIGITS = [each for each in STUDY.nets if each.choice.dataset == "digits"]
COMPLETE = [each for each in DIGITS if each.status is Status.COMPLETE]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    page.write(STUDY, path)
    return path


@pytest.fixture
def opened(driver, report):
    """The invented study as it looks at first; what no test has touched is not loaded again."""
    shown = getattr(driver, "shown", None)
    fresh = shown and (shown.path, shown.width, shown.touched) == (report, 1280, False)
    return shown if fresh else Page(driver, report)


def written(study: Study, folder) -> object:
    path = folder / "report.html"
    page.write(study, path)
    return path


def traces(opened: Page, section: str) -> list[dict]:
    return opened.js("return document.querySelector(`#${arguments[0]} .chart`).data", section)


def marks(opened: Page, section: str) -> list[dict]:
    return [trace for trace in traces(opened, section) if trace["mode"] == "markers"]


class TestAlone:
    def test_the_page_asks_for_nothing_and_nothing_goes_wrong(self, opened, report):
        for name, value in (("dataset", "saccades"), ("colour", "neuron"), ("cost", "spikes"), ("outcome", "cycles"),
                            ("effect", "change"), ("path", "dense"), ("status", "failed")):  # fmt: skip
            opened.choose(name, value)
        opened.search("lapicque")
        time.sleep(0.5)
        requests = opened.requests()
        assert requests[0] == report.as_uri()
        assert [address for address in requests[1:] if not address.startswith(("data:", "blob:"))] == []
        assert opened.js("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
        assert opened.console() == []

    @pytest.mark.parametrize("width", [390, 1280])
    def test_the_page_never_scrolls_sideways(self, driver, report, width):
        narrow = Page(driver, report, width)
        assert narrow.js("return [document.documentElement.scrollWidth, innerWidth]") == [width, width]
        for section in CHARTS:
            box = narrow.js(
                "return document.querySelector(`#${arguments[0]} .chart svg`).getBoundingClientRect()", section
            )
            assert 0 <= box["left"] < box["right"] <= width
        # What is wider scrolls in its own box.
        assert narrow.js(
            "return [...document.querySelectorAll('table')].every(table => table.closest('.scroll').scrollWidth >="
            "table.offsetWidth && table.closest('.scroll').getBoundingClientRect().right <= innerWidth)"
        )

    @pytest.mark.parametrize("width", [390, 1280])
    def test_text_is_large_enough_to_read_and_inside_its_chart(self, driver, report, width):
        narrow = Page(driver, report, width)
        texts = "[...document.querySelectorAll('p, td, th, label, .chart text')]"
        sizes = f"{texts}.map(text => parseFloat(getComputedStyle(text).fontSize))"
        assert narrow.js(f"return Math.min(...{sizes})") >= 10.5
        outside = narrow.js(
            "return [...document.querySelectorAll('.chart text')].filter(text => text.textContent.trim())"
            ".filter(text => { const box = text.getBoundingClientRect(), chart = text.closest('.chart')"
            ".getBoundingClientRect();"
            " return box.width > 0 && (box.left < chart.left - 1 || box.right > chart.right + 1); })"
            ".map(text => text.textContent)"
        )
        assert outside == []


class TestCharts:
    def test_all_are_drawn_and_say_in_words_what_they_show(self, opened):
        for section in CHARTS:
            assert opened.drawn(section) > 0, section
            chart = opened.driver.find_element("css selector", f"#{section} .chart")
            assert chart.get_attribute("role") == "img"
            assert chart.get_attribute("aria-label") == opened.caption(section) != ""

    def test_findings_stand_beside_what_was_published(self, opened):
        effects = [f for f in findings(STUDY) if f.dataset == "digits" and f.published_value is not None]
        *here, published = marks(opened, "findings")
        assert [trace["x"] for trace in here] == [[pytest.approx(finding.estimate)] for finding in effects]
        for trace, finding in zip(here, effects, strict=True):
            assert trace["error_x"]["array"] == [pytest.approx(finding.interval[1] - finding.estimate)]
            assert trace["error_x"]["arrayminus"] == [pytest.approx(finding.estimate - finding.interval[0])]
        assert published["x"] == [finding.published_value for finding in effects]

    @pytest.mark.parametrize("cost", [Outcome.ACCELERATED, Outcome.DENSE, Outcome.CYCLES, Outcome.SPIKES])
    def test_the_front_is_drawn_over_the_chosen_cost(self, opened, cost):
        opened.choose("cost", cost)
        points = [point for trace in marks(opened, "front") for point in zip(trace["x"], trace["y"], strict=True)]
        expected = [(cost.of(each), 100 * each.accuracy) for each in COMPLETE]
        assert np.array(sorted(points)) == pytest.approx(np.array(sorted(expected)))
        best = pareto(DIGITS, cost)
        (line,) = [trace for trace in traces(opened, "front") if trace["mode"] == "lines"]
        assert line["x"] == pytest.approx([cost.of(each) for each in best])
        assert line["y"] == pytest.approx([100 * each.accuracy for each in best])
        assert f"{len(COMPLETE)} networks, {len(best)} on the front" in opened.caption("front")
        pruned = sum(each.status is Status.PRUNED for each in DIGITS)
        assert f"{pruned} pruned" in opened.caption("front")

    def test_colours_are_those_of_the_chosen_parameter(self, opened):
        assert opened.text("#front .legend").split("\n")[:5] == list(
            dict.fromkeys(each.choice.surrogate for each in COMPLETE)
        )
        opened.choose("colour", "framework")
        assert opened.text("#front .legend").split("\n")[:2] == ["snntorch", "spikingjelly"]
        assert len({trace["marker"]["color"] for trace in marks(opened, "front")}) == 2

    def test_densities_are_those_of_every_layer(self, opened):
        thin = [trace for trace in traces(opened, "density") if trace["mode"] == "lines"]
        assert len(thin) == len(COMPLETE)
        assert thin[0]["y"] == pytest.approx([100 * layer.density for layer in COMPLETE[0].layers])
        thick = [trace for trace in traces(opened, "density") if trace["mode"] == "lines+markers"]
        of_escape = [each for each in COMPLETE if each.choice.surrogate is Surrogate.FAST_SIGMOID]
        means = [100 * statistics.mean(each.layers[i].density for each in of_escape) for i in range(3)]
        assert any(trace["y"] == pytest.approx(means) for trace in thick)

    @pytest.mark.parametrize("effect", ["mean", "change"])
    def test_effects_are_drawn_as_the_table_has_them(self, opened, effect):
        opened.choose("outcome", "cycles")
        opened.choose("effect", effect)
        rows = opened.rows("effects")
        assert {row[0] for row in rows} == {"framework", "neuron", "surrogate", "beta", "threshold", "matched"}
        drawn = sum(len(trace["x"]) for trace in marks(opened, "effects"))
        column = 2 if effect == "mean" else 3
        assert drawn == sum(row[column].strip() != "-" for row in rows)
        ticks = opened.js("return document.querySelector('#effects .chart').layout.yaxis.ticktext")
        assert ticks == [row[1] for row in rows if row[column].strip() != "-"]

    def test_predictions_stand_over_measurements(self, opened):
        points = [point for trace in marks(opened, "predicted") for point in zip(trace["x"], trace["y"], strict=True)]
        expected = [(each.latency["accelerated"][1], each.predicted["accelerated"]) for each in COMPLETE]
        assert np.array(sorted(points)) == pytest.approx(np.array(sorted(expected)))
        errors = [abs(predicted / measured - 1) for measured, predicted in expected]
        assert f"{sum(error <= 0.15 for error in errors)} within 15 %" in opened.caption("predicted")


class TestTable:
    def test_every_network_is_listed_pruned_and_failed_ones_marked(self, opened):
        assert len(opened.rows("nets")) == len(DIGITS)
        statuses = opened.column("status", "nets")
        for status in Status:
            assert statuses.count(status) == sum(each.status is status for each in DIGITS) > 0
            muted = opened.js("return document.querySelectorAll(`#nets tr.${arguments[0]}`).length", str(status))
            assert muted == statuses.count(status)
        errors = [error for error in opened.column("error", "nets") if error != "-"]
        assert len(errors) == statuses.count(Status.FAILED)

    def test_the_status_and_the_search_filter(self, opened):
        opened.choose("status", "pruned")
        assert set(opened.column("status", "nets")) == {"pruned"}
        opened.choose("status", "any")
        opened.search("lapicque escape 0.5")
        found = opened.column("network", "nets")
        assert set(found) == {"Lapicque, spike rate escape"}

    def test_figures_sort_as_figures_and_what_is_missing_comes_last(self, opened):
        accuracy = lambda: [float(cell[:-2]) for cell in opened.column("accuracy", "nets") if cell != "-"]  # noqa: E731
        assert opened.sort_by("accuracy", "nets") == "ascending"
        assert accuracy() == sorted(accuracy())
        assert opened.sort_by("accuracy", "nets") == "descending"
        assert accuracy() == sorted(accuracy(), reverse=True)
        assert opened.column("accuracy", "nets")[-1] == "-"

    def test_the_dataset_filters_everything(self, opened):
        opened.choose("dataset", "saccades")
        assert set(opened.column("dataset", "nets")) == {"saccades"}
        assert all("saccades" in opened.caption(section) for section in ("findings", "effects"))


class TestSmall:
    def test_nothing_to_draw_is_said(self, driver, tmp_path):
        for study in (EMPTY, Study({}, (ended(Status.FAILED, "out of memory"), ended(Status.PRUNED, seed=1)))):
            found = Page(driver, written(study, tmp_path))
            assert all(opened_caption != "" for opened_caption in map(found.caption, CHARTS))
            assert [found.drawn(section) for section in CHARTS] == [0] * len(CHARTS)
            assert found.console() == []
            assert len(found.rows("nets")) == len(study.nets)

    def test_one_network_without_latency(self, driver, tmp_path):
        found = Page(driver, written(Study({}, (net(ms=None),)), tmp_path))
        assert found.drawn("front") == 1
        assert found.js("return [...document.querySelector('[name=cost]').options].map(option => option.text)") == [
            "cycles",
            "spikes",
        ]
        assert found.console() == []

    def test_silent_networks_have_a_place(self, driver, tmp_path):
        nets = tuple(
            dataclasses.replace(net(seed=seed), spikes=spikes) for seed, spikes in enumerate((0.0, 10.0, 500.0))
        )
        found = Page(driver, written(Study({}, nets), tmp_path))
        found.choose("cost", "spikes")
        assert found.drawn("front") == 3
        assert found.console() == []

    def test_names_are_text_wherever_they_come_from(self, driver, tmp_path):
        nets = [net(dataset=HOSTILE, framework=name, seed=i) for i, name in enumerate((HOSTILE, "b"))]
        found = Page(
            driver,
            written(Study({HOSTILE: HOSTILE}, (*nets, ended(Status.FAILED, HOSTILE, dataset=HOSTILE))), tmp_path),
        )
        assert HOSTILE in found.text("#front .legend")
        assert HOSTILE in found.column("error", "nets")
        assert found.js("return document.querySelectorAll('img').length") == 0
        assert found.console() == []
