"""The page of a benchmark in a real browser: what is drawn, hidden, filtered and sorted, and that it asks nobody."""

from __future__ import annotations

import dataclasses
import re
import time

import pytest

from sparseflow.bench import page
from sparseflow.bench.records import Gate, Layer, Metric, Results, Scope

from ..opened import Page
from . import invented
from .test_page import EMPTY, HOSTILE
from .test_records import point

pytestmark = pytest.mark.browser
CHARTS = ("scale", "sizes", "density", "memory", "phases", "approximate")
RESULTS = invented.results()


def dishonest(found) -> bool:
    return not found.honest and found.speedup is not None


EXACT = [found for found in RESULTS.points if found.scope is not Scope.APPROXIMATE]
HONEST = [found for found in EXACT if not dishonest(found)]
DEFAULT = [found for found in HONEST if found.metric is Metric.LATENCY]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return page.write(RESULTS, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def opened(driver, report):
    """The invented results as they look at first; what no test has touched is not loaded again."""
    shown = getattr(driver, "shown", None)
    return (
        shown if shown and (shown.path, shown.width, shown.touched) == (report, 1280, False) else Page(driver, report)
    )


def sized(points, scale: str = "width"):
    return [found for found in points if scale in found.config and found.speedup is not None]


class TestAlone:
    def test_the_page_asks_for_nothing_and_nothing_goes_wrong(self, opened, report):
        opened.choose("metric", "any")
        opened.choose("metric", "memory")
        opened.click("input[name=dishonest]")
        time.sleep(0.5)
        requests = opened.requests()
        assert requests[0] == report.as_uri()
        assert [address for address in requests[1:] if not address.startswith(("data:", "blob:"))] == []
        assert opened.js("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
        assert opened.console() == []

    def test_an_attempt_to_ask_is_refused_and_seen(self, opened):
        """The checks above can fail: a request is refused by the page's policy, and leaves a trace in the console."""
        opened.touched = True
        opened.js("fetch('http://127.0.0.1:9/x').catch(() => {})")
        time.sleep(0.5)
        assert any("Content Security Policy" in message for message in opened.console())

    @pytest.mark.parametrize("width", [390, 1280])
    def test_the_page_never_scrolls_sideways(self, driver, report, width):
        narrow = Page(driver, report, width)
        narrow.click("#kernel-box summary")
        narrow.click("input[name=dishonest]")
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
    def test_text_is_large_enough_to_read(self, driver, report, width):
        narrow = Page(driver, report, width)
        texts = "[...document.querySelectorAll('p, td, th, label, .chart text')]"
        sizes = f"{texts}.map(text => parseFloat(getComputedStyle(text).fontSize))"
        assert narrow.js(f"return Math.min(...{sizes})") >= 10.5


class TestHonesty:
    def test_only_honest_baselines_are_shown_at_first(self, opened):
        assert not opened.driver.find_element("name", "dishonest").is_selected()
        assert len(opened.rows()) == len(DEFAULT)
        assert set(opened.column("baseline")) == {found.baseline for found in DEFAULT}
        assert opened.js("return document.querySelectorAll('tr.dishonest').length") == 0
        assert opened.drawn("scale") == len(sized(DEFAULT))
        assert invented.EAGER not in "".join(map(opened.caption, CHARTS))
        hidden = sum(map(dishonest, RESULTS.points))
        assert f"{hidden} hidden because their baseline is not honest" in opened.text("#shown")

    def test_others_are_muted_and_tagged_when_asked_for(self, opened):
        opened.click("input[name=dishonest]")
        every = [found for found in EXACT if found.metric is Metric.LATENCY]
        assert len(opened.rows()) == len(every)
        eager = [row for row in opened.column("baseline") if row != invented.HONEST]
        assert set(eager) == {f"{invented.EAGER} not honest", invented.EAGER}  # a red gate compares nothing
        tagged = opened.js("return document.querySelectorAll('#points tr.dishonest .tag').length")
        assert tagged == sum(map(dishonest, every)) > 0
        assert opened.drawn("scale") == len(sized(every))
        assert opened.drawn("scale", 0.35) == len(sized(filter(dishonest, every))) > 0
        assert f"faded: baseline not honest ({invented.EAGER})" in opened.text("#scale .legend")

    def test_losing_cells_are_shown(self, opened):
        losses = [found.speedup for found in DEFAULT if found.speedup is not None and found.speedup < 1]
        assert len(losses) > 20
        marked = opened.js("return document.querySelectorAll('#points td .loss').length")
        assert marked == len(losses)
        assert f"{len([f for f in sized(DEFAULT) if f.speedup <= 1])} not" in opened.caption("scale")

    def test_a_red_gate_is_shown_without_a_figure(self, opened):
        red = [row for row in opened.rows() if any("red gate" in cell for cell in row)]
        assert len(red) == sum(not found.gate.green for found in DEFAULT) == 3
        assert all(not re.search(r"\d ms|\dx", " ".join(row)) for row in red)

    def test_every_speedup_has_its_baseline_and_every_value_its_unit_and_spread(self, opened):
        titles = opened.titles()
        for row in opened.rows():
            cells = dict(zip(titles, row, strict=True))
            if cells["speedup (range)"] == "-":
                continue
            assert re.fullmatch(r"[\d.]+x\n\([\d.]+-[\d.]+\)", cells["speedup (range)"])
            assert re.fullmatch(r"[\d.]+ ms\n\([\d.]+-[\d.]+\)", cells["value (p20-p80)"])
            assert re.fullmatch(rf"{invented.HONEST}\n[\d.]+ ms \([\d.]+-[\d.]+\)", cells["baseline"])

    def test_approximate_methods_are_apart(self, opened):
        approximate = [found for found in RESULTS.points if found.scope is Scope.APPROXIMATE]
        assert set(opened.column("scope")) == {"exact", "pruned", "peer"}
        assert opened.column("scope", "approximate") == ["approximate"] * len(approximate)
        assert opened.drawn("approximate") == len(approximate)
        names = {found.kernel for found in approximate}
        assert not names & set(opened.text("#scale .legend").split("\n"))

    def test_published_figures_are_marked_and_join_no_line(self, opened):
        assert [source for source in opened.column("source") if source != "measured"] == [
            "published another lab, table 2"
        ]
        assert "published elsewhere" in opened.text("#scale .legend")
        assert "published elsewhere" not in opened.text("#sizes .legend")


class TestCharts:
    def test_all_are_drawn_and_say_in_words_what_they_show(self, opened):
        for section in CHARTS:
            assert opened.drawn(section) > 0, section
            chart = opened.driver.find_element("css selector", f"#{section} .chart")
            assert chart.get_attribute("role") == "img"
            assert chart.get_attribute("aria-label") == opened.caption(section) != ""

    def test_break_even_and_the_winning_side_are_drawn(self, opened):
        for section in ("scale", "sizes", "density", "memory", "approximate"):
            assert (
                opened.js("return document.querySelectorAll(`#${arguments[0]} .shapelayer path`).length", section) == 2
            )

    @pytest.mark.parametrize("scale", ["width", "resolution", "batch", "T", "depth"])
    def test_the_scale_parameter_chooses_the_points(self, opened, scale):
        opened.choose("scale", scale)
        assert opened.drawn("scale") == len(sized(DEFAULT, scale)) > 0
        assert opened.text("#scale .chart .xtitle") == scale

    def test_error_bars_are_the_range_of_the_speedup(self, driver, tmp_path):
        found = Page(driver, page.write(Results({}, 0, [point(config={"width": 4})]), tmp_path / "report.html"))
        (trace,) = found.js("return document.querySelector('#scale .chart').data")
        low, middle, high = page.speedup_range(point())
        assert (trace["y"], trace["error_y"]["array"], trace["error_y"]["arrayminus"]) == (
            [middle],
            [pytest.approx(high - middle)],
            [pytest.approx(middle - low)],
        )

    @pytest.mark.parametrize(
        ("exponent", "trend", "factor"), [(0.5, "rising", "1.41x"), (0, "flat", "1.00x"), (-1, "falling", "0.500x")]
    )
    def test_a_line_rises_or_falls_as_its_points_do(self, driver, tmp_path, exponent, trend, factor):
        # Two cases at levels a hundredfold apart; the higher one has one size more, and must not bend the line.
        points = []
        for case, level, widths in (("a", 1, (16, 32, 64)), ("b", 1, (16, 32, 64)), ("c", 100, (64, 128))):
            for width in widths:
                gain, config = level * width**exponent, {"width": width, "batch": 1}
                figures = {"baseline_value": (gain, gain, gain), "value": (1, 1, 1)}
                points.append(point(case=f"{case}, width {width}", config=config, **figures))
        found = Page(driver, page.write(Results({}, 0, points), tmp_path / "report.html"))
        (row,) = found.rows("sizes")
        assert row[2] == "2 of 3"
        assert row[-2:] == [factor, trend]

    def test_points_that_differ_in_more_than_the_scale_make_no_line(self, driver, tmp_path):
        points = [
            point(case="a, width 16", config={"width": 16, "batch": 1}),
            point(case="a, width 32", config={"width": 32, "batch": 8}),
            point(case="b, width 64", config={"width": 64, "batch": 1}),
            point(case="a, width 128", config={"width": 128, "batch": 1}, rho=0.4),
        ]
        found = Page(driver, page.write(Results({}, 0, points), tmp_path / "report.html"))
        assert found.caption("sizes") == "No kernel has two runs that differ in nothing but width."
        assert found.drawn("scale") == 4

    def test_a_sweep_has_the_crossovers_of_its_case(self, opened):
        opened.touched = True
        titles = opened.js("return [...document.querySelector('[name=sweep]').options].map(option => option.text)")
        assert [title.split(" (")[0] for title in titles] == list(invented.SHAPES)
        for index, shape in ((1, invented.SHAPES[1]), (4, invented.SHAPES[4])):
            opened.js("const s = document.querySelector('[name=sweep]'); s.selectedIndex = arguments[0];"
                      "s.dispatchEvent(new Event('input', {bubbles: true}))", index)  # fmt: skip
            crossovers = [found for found in RESULTS.crossovers if found.case == shape]
            expected = [share for found in crossovers for share in (found.measured, found.used) if share is not None]
            traces = opened.js(
                "return document.querySelector('#density .chart').data.filter(trace => trace.name && trace.y[0] === 1)"
            )
            assert [trace["x"][0] for trace in traces] == pytest.approx([100 * share for share in expected])
            assert opened.caption("density").startswith(shape)
        assert len(opened.rows("density")) == len(RESULTS.crossovers)

    def test_memory_is_a_fraction_of_the_dense_run(self, opened):
        traces = opened.js(
            "return document.querySelector('#memory .chart').data.filter(trace => trace.mode === 'markers')"
        )
        fractions = [value for trace in traces for value in trace["y"]]
        points = [found for found in RESULTS.points if found.metric is Metric.MEMORY]
        assert sorted(fractions) == pytest.approx(sorted(found.value[1] / found.baseline_value[1] for found in points))

    def test_phases_add_up_to_the_whole_call(self, opened):
        traces = opened.js("return document.querySelector('#phases .chart').data")
        assert [trace["name"] for trace in traces] == ["pack", "prescan", "compute", "neuron", "rest"]
        for shares in zip(*(trace["x"] for trace in traces), strict=True):
            assert sum(shares) == pytest.approx(100)
        labels = opened.js(
            "return [...document.querySelectorAll('#phases .annotation')].map(label => label.textContent)"
        )
        assert "spiking_resnet18 @64, batch 1, level 1: 20.1 ms" in labels

    def test_an_empty_chart_says_why(self, driver, tmp_path):
        found = Page(driver, page.write(EMPTY, tmp_path / "report.html"))
        for section in CHARTS:
            assert found.drawn(section) == 0
            assert found.caption(section).startswith(("No ", "None ", "This run ", "Choose "))
        for section in ("layers", "points", "approximate", "density"):
            assert found.text(f"#{section} .table .empty").startswith(("No ", "This run "))
        assert found.console() == []

    def test_where_all_baselines_are_dishonest_the_page_says_so(self, driver, tmp_path):
        found = Page(driver, page.write(Results({}, 0, [point(honest=False)]), tmp_path / "report.html"))
        assert (
            found.caption("scale") == "No point passes the filters above. 1 point would if their baseline were honest."
        )


class TestTables:
    @pytest.mark.parametrize(
        ("name", "value", "keep"),
        [
            ("suite", "peers", lambda found: found.suite == "peers"),
            ("scope", "pruned", lambda found: found.scope is Scope.PRUNED),
            ("device", "gpu", lambda found: found.device == "gpu"),
            ("precision", "bf16", lambda found: found.precision == "bf16"),
        ],
    )
    def test_filters(self, opened, name, value, keep):
        opened.choose(name, value)
        kept = list(filter(keep, DEFAULT))
        assert 0 < len(kept) < len(DEFAULT)
        assert opened.column("config") == [found.case for found in kept]
        assert opened.drawn("scale") == len(sized(kept))
        opened.choose(name, "any")
        assert len(opened.rows()) == len(DEFAULT)

    @pytest.mark.parametrize("metric", ["memory", "startup", "any"])
    def test_metric(self, opened, metric):
        opened.choose("metric", metric)
        kept = [found for found in HONEST if metric in (found.metric, "any")]
        assert opened.column("metric") == [found.metric for found in kept]
        assert (opened.drawn("scale") > 0) == (metric != "any")
        assert opened.caption("scale").startswith("Choose one metric") == (metric == "any")

    def test_kernels(self, opened):
        opened.click("#kernel-box summary")
        opened.click("#no-kernels")
        assert opened.rows() == []
        assert opened.text("#points .empty") == "No point passes the filters."
        assert opened.drawn("phases") == opened.drawn("scale") == 0
        opened.click("#kernels input[value='rows']")
        assert opened.column("kernel") == ["rows" for found in DEFAULT if found.kernel == "rows"]
        opened.click("#all-kernels")
        assert len(opened.rows()) == len(DEFAULT)

    def test_search(self, opened):
        opened.search("RESNET18 @64 level")
        kept = [found for found in DEFAULT if "resnet18 @64" in found.case and "level" in found.kernel]
        assert opened.column("config") == [found.case for found in kept]
        assert len(kept) > 3

    def test_sorting_by_figures(self, opened):
        speedups = [found.speedup for found in DEFAULT if found.speedup is not None]
        for direction, expected in (("ascending", sorted(speedups)), ("descending", sorted(speedups, reverse=True))):
            assert opened.sort_by("speedup (range)") == direction
            shown = opened.column("speedup (range)")
            figures = [float(text.removesuffix("x")) for text in shown if text != "-"]
            assert figures == pytest.approx(expected, rel=6e-3)
            assert shown[len(figures) :] == ["-"] * (len(DEFAULT) - len(speedups)), "what is missing comes last"

    def test_sorting_by_names_and_by_another_column_next(self, opened):
        assert opened.sort_by("kernel") == "ascending"
        assert opened.column("kernel") == sorted((found.kernel for found in DEFAULT), key=str.lower)
        assert opened.sort_by("metric") == "ascending"
        assert opened.js("return document.querySelectorAll('#points th[aria-sort]').length") == 1

    def test_sorting_with_the_keyboard(self, opened):
        opened.touched = True
        heading = opened.driver.find_element("css selector", "#points th:nth-child(2) button")
        heading.send_keys("\ue007")  # Enter
        assert (
            opened.driver.find_element("css selector", "#points th:nth-child(2)").get_attribute("aria-sort")
            == "ascending"
        )

    def test_layers_of_the_chosen_network(self, opened):
        opened.choose("network", "sew_resnet18")
        expected = [layer for layer in RESULTS.layers if layer.case == "sew_resnet18"]
        assert opened.column("layer", "layers") == [layer.name for layer in expected]
        assert opened.column("reason", "layers") == [layer.reason for layer in expected]
        assert {"dense", "fused"} == set(opened.column("path", "layers"))

    def test_names_are_text_wherever_they_come_from(self, driver, tmp_path):
        hostile = dataclasses.replace(
            point(), case=HOSTILE, kernel=HOSTILE, baseline=HOSTILE, config={"width": 4, HOSTILE: HOSTILE}
        )
        sweep = [dataclasses.replace(hostile, rho=rho) for rho in (0.1, 0.2, 0.4)]
        red = dataclasses.replace(hostile, value=None, gate=Gate(False, HOSTILE, (HOSTILE,)))
        layers = [Layer(HOSTILE, HOSTILE, HOSTILE, None, None, HOSTILE, None, None, HOSTILE)]
        path = page.write(Results({HOSTILE: HOSTILE}, 0, [*sweep, red], layers), tmp_path / "report.html")
        found = Page(driver, path)
        assert found.column("kernel") == [HOSTILE] * 4
        assert found.column("layer", "layers") == [HOSTILE]
        assert HOSTILE in found.text("#scale .legend")
        assert found.js("return document.querySelectorAll('img').length") == 0
        assert found.console() == []
