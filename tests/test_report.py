"""Records and their text, JSON and HTML forms."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseflow.plan import Crossover, LayerPlan, Path, Provenance, Reason
from sparseflow.report import (
    WIDTH,
    BenchResult,
    LayerProfile,
    LayerReport,
    ProfileResult,
    Report,
    milliseconds,
    percent,
    render,
)

CROSSOVER = Crossover("key", 0.3, 2.0, 0.1, 0.0, (0.0, 0.1, 1.0), (0.2, 0.4, 8.0), "rows")


def layer(name: str = "layer1.0.conv1", path: str = "event", **fields) -> LayerReport:
    reason = Reason.SPARSE_WINS.value if path == "event" else Reason.DENSE_WINS.value
    return LayerReport(
        **({"name": name, "kind": "Conv2d", "provenance": "binary", "path": path, "reason": reason} | fields)
    )


def report(*layers: LayerReport, **fields) -> Report:
    return Report(**({"model": "Net", "backend": "cpu", "method": "fx", "layers": layers, "environment": {}} | fields))


def html_of(found: Report, folder: pathlib.Path) -> str:
    return found.to_html(folder / "report.html").read_text(encoding="utf-8")


class TestLayer:
    def test_from_plan_reads_the_sparse_time_at_the_observed_density(self):
        plan = LayerPlan(
            "conv", "Conv2d", Path.EVENT, Reason.SPARSE_WINS, Provenance.BINARY, density=0.05, crossover=CROSSOVER
        )
        found = LayerReport.from_plan(plan, {"event": 3})
        assert found.sparse_ms == pytest.approx(0.3)
        assert (found.dense_ms, found.crossover, found.density) == (2.0, 0.3, 0.05)
        assert (found.path, found.reason, found.provenance) == ("event", Reason.SPARSE_WINS.value, "binary")
        assert found.sparse
        assert found.calls == {"event": 3}

    def test_a_crossover_in_occupancy_is_read_at_the_occupancy_and_marked(self):
        crossover = dataclasses.replace(CROSSOVER, axis="occupancy")
        plan = LayerPlan(
            *("conv", "Conv2d", Path.TILE, Reason.SPARSE_WINS, Provenance.BINARY),
            density=0.4,
            occupancy=0.05,
            crossover=crossover,
        )
        found = LayerReport.from_plan(plan, {})
        assert found.sparse_ms == pytest.approx(0.3)
        assert found.load == 0.05
        assert "30.0 % occ." in str(report(found))

    @pytest.mark.parametrize("missing", ["density", "crossover"])
    def test_nothing_is_invented_for_what_was_not_measured(self, missing):
        fields = {"density": 0.05, "crossover": CROSSOVER} | {missing: None}
        plan = LayerPlan("conv", "Conv2d", Path.DENSE, Reason.NOT_MEASURED, Provenance.BINARY, **fields)
        assert LayerReport.from_plan(plan, {}).sparse_ms is None

    def test_explanation_joins_reason_and_detail(self):
        assert layer(reason="padding", detail="circular").explanation == "padding (circular)"
        assert layer(reason="padding").explanation == "padding"


class TestReport:
    def test_summary_counts_layers_and_reasons(self):
        stem = layer("stem", "dense", reason="input is not a spike tensor")
        found = report(stem, layer("a"), layer("b", "dense", reason="slow"), layer("c", "dense", reason="slow"))
        assert found.accelerated == 1
        assert found.summary == "1 of 4 layers run sparse; dense: 2 (slow), 1 (input is not a spike tensor)"

    def test_summary_without_dense_layers(self):
        assert report(layer()).summary == "1 of 1 layers run sparse"

    def test_text_shows_every_layer_with_its_figures_and_its_reason(self):
        measured = layer(
            "layer1.0.conv1", density=0.0431, occupancy=0.5, dense_ms=1.234, sparse_ms=0.4321, crossover=0.3
        )
        refused = layer("layer4.1.conv2", "dense", reason=Reason.PADDING_MODE.value, detail="circular")
        text = str(report(measured, refused, notes=("measured in 0.2 s",)))
        rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
        for figure in ("4.3 %", "50.0 %", "30.0 %", "1.23", "0.432", "event", "[1]"):
            assert figure in rows["layer1.0.conv1"]
        assert "circular" in rows["layer4.1.conv2"]
        assert f"[2] {Reason.PADDING_MODE.value} (1 layer)" in text
        assert "note: measured in 0.2 s" in text

    def test_text_fits_the_page_and_keeps_long_names_whole(self):
        names = [f"features.block{i}.residual_function.conv" for i in range(3)]
        text = str(
            report(*(layer(name, density=1.0, occupancy=1.0, dense_ms=123.4, sparse_ms=0.0123) for name in names))
        )
        assert max(map(len, text.splitlines())) <= WIDTH
        assert all(name in text for name in names)

    def test_calls_are_shown_where_more_than_one_path_served(self):
        assert "event 9x" not in str(report(layer(calls={"event": 9, "dense": 0})))
        text = str(report(layer(calls={"event": 9, "dense": 2})))
        assert "event 9x" in text
        assert "dense 2x" in text

    def test_brackets_are_not_taken_for_markup(self):
        text = str(report(layer("blocks[bold]", detail="[red]")))
        assert "blocks[bold]" in text
        assert "[red]" in text

    def test_a_console_gets_the_same_content(self):
        found = report(layer(), notes=("a note",))
        assert render(found) == str(found)

    def test_json_reads_back_with_every_field(self):
        found = report(layer(calls={"event": 2}), environment={"torch": "2.15"})
        data = json.loads(found.to_json())
        assert data == found.to_dict() | {"layers": [dataclasses.asdict(x) for x in found.layers], "notes": []}
        assert data["summary"] == found.summary

    def test_empty_report_renders(self):
        assert "0 of 0 layers" in str(report())


class TestHtml:
    def test_page_is_self_contained_and_has_what_the_text_has(self, tmp_path):
        found = report(
            layer(density=0.0431, dense_ms=1.5, sparse_ms=0.5, crossover=0.3),
            layer("fc", "dense", detail="too dense"),
            environment={"cpu": "Some CPU"},
            notes=("a note",),
        )
        text = html_of(found, tmp_path)
        for part in (found.summary, "layer1.0.conv1", "4.3 %", "too dense", "Some CPU", "a note"):
            assert part in text
        assert not re.search(r"<(script|img|iframe)[^>]+src=|<link|@import", text)
        assert "Plotly.newPlot" in text

    def test_figures_hold_the_data(self, tmp_path):
        text = (
            report(layer("only", density=0.0625, crossover=0.5, dense_ms=3.25)).to_html(tmp_path / "r.html").read_text()
        )
        plots = text[text.rindex("Plotly.newPlot(", 0, text.rindex("Plotly.newPlot(")) :]
        for value in ("6.25", "50.0", "3.25"):
            assert value in plots

    def test_names_are_escaped(self, tmp_path):
        text = html_of(report(layer("<script>alert(1)</script>"), model="<b>"), tmp_path)
        assert "<script>alert(1)" not in text
        assert "<h1>&lt;b&gt;</h1>" in text

    def test_unwritable_path_raises(self, tmp_path):
        with pytest.raises(OSError, match="missing"):
            report(layer()).to_html(tmp_path / "missing" / "r.html")


class TestProfile:
    RESULT = ProfileResult(
        (
            LayerProfile("conv1", "conv", 3.0, 2, 0.05, {"event": 2}),
            LayerProfile("sn1", "neuron", 4.0, 2),
            LayerProfile("conv2", "conv", 2.0, 2, 0.5, {"dense": 2}),
        ),
        10.0,
    )

    def test_kinds_are_summed_and_the_rest_is_between_modules(self):
        assert list(self.RESULT.by_kind.items()) == [("conv", 5.0), ("neuron", 4.0), ("between modules", 1.0)]

    def test_text(self):
        rows = {line.split()[0]: line for line in str(self.RESULT).splitlines() if line.strip()}
        assert rows["conv1"].split() == ["conv1", "conv", "3.00", "30.0", "%", "2", "5.0", "%", "event", "2x"]
        assert rows["neuron"].split() == ["neuron", "4.00", "40.0", "%"]

    def test_nothing_ran(self):
        assert "0.00 ms" in str(ProfileResult((), 0.0))

    @given(st.lists(st.floats(0, 1e3), max_size=8), st.floats(0, 1e4))
    def test_kinds_never_add_up_to_less_than_the_whole(self, times, total):
        layers = tuple(LayerProfile(str(i), "ab"[i % 2], t, 1) for i, t in enumerate(times))
        by_kind = ProfileResult(layers, total).by_kind
        assert sum(by_kind.values()) == pytest.approx(max(total, sum(times)))
        assert min(by_kind.values()) >= 0


class TestBench:
    GREEN = BenchResult((9.0, 10.0, 12.0), (4.0, 5.0, 6.0), 1e-7, True, "the gate", repeats=20)
    RED = dataclasses.replace(GREEN, matches=False, max_error=0.5)

    def test_speedup_is_the_ratio_of_the_medians(self):
        assert self.GREEN.speedup == 2.0
        assert "speedup 2.00x" in str(self.GREEN)
        assert "10.0 ms (p20 9.00, p80 12.0)" in str(self.GREEN)

    def test_a_red_gate_shows_no_time(self):
        assert self.RED.speedup is None
        assert "ms" not in str(self.RED)
        assert "0.5 (the gate)" in str(self.RED)
        assert not {"dense_ms", "sparse_ms"} & self.RED.to_dict().keys()

    def test_dictionary_of_a_green_result(self):
        data = json.loads(json.dumps(self.GREEN.to_dict()))
        assert data["speedup"] == 2.0
        assert data["dense_ms"] == [9.0, 10.0, 12.0]


@given(st.floats(1e-4, 1e5))
def test_milliseconds_keep_three_digits(value):
    assert float(milliseconds(value)) == pytest.approx(value, rel=5.1e-3)


@given(st.floats(0, 1))
def test_percent_is_within_half_a_unit_of_the_last_place(share):
    number, sign = percent(share).split()
    assert sign == "%"
    assert abs(float(number) - 100 * share) <= 0.05 + 1e-9
