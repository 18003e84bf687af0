"""The page of a benchmark without a browser: what it says, what it must not load, and what it must not say."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
from collections import Counter

import pytest
from plotly.offline import get_plotlyjs

from sparseflow.bench import page
from sparseflow.bench.records import Absent, Gate, Metric, Results, Scope

from . import invented
from .test_records import point

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
EMPTY = Results({}, 0)


def html_of(results: Results, folder) -> str:
    """The page without plotly.js."""
    text = page.write(results, folder / "report.html").read_text(encoding="utf-8")
    assert get_plotlyjs() in text
    return text.replace(get_plotlyjs(), "")


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script id="results" type="application/json">(.*?)</script>', text, re.DOTALL)[1])


class Loads(html.parser.HTMLParser):
    """Collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
                self.found.append(value)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return html_of(invented.results(), tmp_path_factory.mktemp("page"))


class TestHeader:
    def test_machine_versions_commit_threads_seed_and_number_of_points(self, text):
        results = invented.results()
        for key, value in results.environment.items():
            assert f'<tr><th scope="row">{key}</th><td>{value}</td></tr>' in text
        first = re.search(r"<header>(.*?)</header>", text, re.DOTALL)[1]
        for part in (
            f"{len(results.points)} points",
            "seed 7",
            "2\nthreads",
            "commit\ninvented",
            "3 red gates",
            "1 absent peer",
        ):
            assert part in first

    def test_red_gates_are_listed_with_their_reason_and_without_a_figure(self, text):
        red = [found for found in invented.results().points if not found.gate.green]
        table = re.search(r'<table id="red">(.*?)</table>', text, re.DOTALL)[1]
        assert table.count("<tr>") == len(red) + 1 == 4
        for found in red:
            assert found.case in table
        assert "layer3.0.conv1: 3.1 budgets; 2 spikes outside the band" in table
        assert not re.search(r"\d ?(ms|MB|x)", table)
        assert all(
            row["value"] is row["speedup"] is None for row in data_of(text)["points"] if not row["gate"]["green"]
        )

    def test_absent_peers_are_listed_with_their_error(self, tmp_path):
        found = html_of(Results({}, 0, absent=[Absent("norse", "no distribution for <norse>")]), tmp_path)
        assert "<td>norse</td><td><code>no distribution for &lt;norse&gt;</code></td>" in found

    def test_every_baseline_says_whether_it_is_honest(self, text):
        compared = Counter(found.honest for found in invented.results().points if found.speedup is not None)
        listed = re.findall(r"<li(?: class=\"muted\")?>(.*?)</li>", text, re.DOTALL)
        assert [" ".join(entry.split()) for entry in listed] == [
            f"compiled dense: {compared[True]} speedups, honest",
            f"eager dense: {compared[False]} speedups, not honest, hidden unless asked for",
        ]

    def test_an_empty_section_says_why(self, tmp_path):
        found = html_of(EMPTY, tmp_path)
        for why in (
            "Nothing to judge",
            "None: the results of every case",
            "None: every peer",
            "did not record its env",
        ):
            assert why in found


class TestSummary:
    def test_faster_and_slower_need_ranges_that_do_not_overlap(self):
        row = page.Row.of(
            [
                point(value=(1.0, 2.0, 2.9), baseline_value=(3.0, 4.0, 5.0)),
                point(value=(1.0, 2.0, 3.1), baseline_value=(3.0, 4.0, 5.0)),
                point(value=(6.0, 8.0, 9.0), baseline_value=(3.0, 4.0, 5.0)),
                point(value=(4.9, 5.0, 9.0), baseline_value=(3.0, 4.0, 5.0)),
            ]
        )
        assert (row.faster, row.level, row.slower, row.points) == (1, 2, 1, 4)
        assert (row.worst, row.median, row.best) == pytest.approx((0.5, 1.4, 2.0))

    @pytest.mark.parametrize(
        "left_out",
        [
            {"honest": False},
            {"source": "another lab, table 2"},
            {"scope": Scope.APPROXIMATE},
            {"baseline_value": None},
            {"value": None, "gate": Gate(False, "budget")},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_only_honest_exact_figures_of_this_run_count(self, left_out):
        assert page.summary([point(**left_out)]) == []
        assert [row.points for row in page.summary([point(), point(**left_out)])] == [1]

    @pytest.mark.parametrize(
        "other",
        [
            {"suite": "models"},
            {"scope": Scope.PRUNED},
            {"metric": Metric.MEMORY},
            {"device": "gpu"},
            {"precision": "bf16"},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_what_cannot_be_compared_has_a_row_of_its_own(self, other):
        assert [row.points for row in page.summary([point(), point(**other), point()])] == [2, 1]


class TestData:
    def test_every_point_is_there_with_its_speedup(self, text):
        points, rows = invented.results().points, data_of(text)["points"]
        assert len(rows) == len(points) > 200
        for found, row in zip(points, rows, strict=True):
            assert (row["case"], row["kernel"], row["baseline"]) == (found.case, found.kernel, found.baseline)
            assert (row["speedup"] and row["speedup"][1]) == found.speedup

    @pytest.mark.parametrize("figure", [float("nan"), float("inf")])
    def test_a_figure_that_is_not_finite_is_an_error_that_names_the_point(self, figure, tmp_path):
        with pytest.raises(ValueError, match=r"3x3 64@56, events: a figure is not finite"):
            page.write(Results({}, 0, [point(baseline_value=(1.0, figure, 2.0))]), tmp_path / "report.html")

    def test_the_same_results_give_the_same_bytes(self, text, tmp_path):
        assert html_of(invented.results(), tmp_path) == text


class TestSafety:
    def test_nothing_is_loaded_from_elsewhere(self, text):
        loads = Loads()
        loads.feed(text)
        assert loads.found
        assert all(re.fullmatch(r"#[a-z]+|data:,", address) for address in loads.found)
        assert not re.search(r"@import|url\(|https?://(?!www\.w3\.org/2000/svg\")", text)
        assert "default-src 'none'" in text

    def test_hostile_names_end_no_script_and_make_no_element(self, text, tmp_path):
        hostile = dataclasses.replace(point(), case=HOSTILE, kernel=HOSTILE, baseline=HOSTILE, suite=HOSTILE)
        red = dataclasses.replace(hostile, value=None, gate=Gate(False, HOSTILE, (HOSTILE,)))
        found = html_of(Results({HOSTILE: HOSTILE}, 0, [hostile, red], absent=[Absent(HOSTILE, HOSTILE)]), tmp_path)
        assert found.count("</script") == text.count("</script")
        assert "<img" not in found
        assert data_of(found)["points"][0]["case"] == HOSTILE
