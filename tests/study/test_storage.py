"""Studies written and read: every record comes back as it was; tables have what the records have."""

from __future__ import annotations

import csv
import json

import pytest

from sparseflow.study import storage
from sparseflow.study.records import Choice, Layer, LayerShape, Matched, Net, Neuron, Status, Study, Surrogate

CHOICE = Choice(
    "digits", "snntorch", Neuron.LAPICQUE, Surrogate.SIGMOID, 1 / 3, 0.1 + 0.2, 5.0, Matched.TIME_CONSTANT, 3
)
OTHER = Choice("digits-events", "spikingjelly", Neuron.PLIF, Surrogate.ARCTAN, 0.9, 1.0, None, Matched.BETA, 0)
CONV = LayerShape("conv1", 2, 16, (3, 3), (1, 1), (1, 1), 1, (16, 16), (16, 16))
LAYERS = (Layer(CONV, 12.5, 0.024, 1234.5, 0.07), Layer(LayerShape("fc", 512, 10), 40.0, 0.078))
COMPLETE = Net(
    CHOICE,
    Status.COMPLETE,
    accuracy=0.971,
    epochs=9,
    steps=10,
    spikes=812.25,
    layers=LAYERS,
    latency={"dense": (1.0, 1.1, 1.3), "accelerated": (0.4, 0.5, 0.6)},
    predicted={"dense": 1.2, "H200": 0.01},
    cycles=54321.0,
    dense="eager, loop over time",
)
STUDY = Study(
    {"cpu": "a processor", "threads": 2},
    (COMPLETE, Net(OTHER, Status.FAILED, error='line "1"\nline 2'), Net(OTHER, Status.PRUNED, 0.3, epochs=2)),
    {"training": {"epochs": 9}},
)


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_everything_reads_back(tmp_path):
    storage.save(STUDY, tmp_path / "deep" / "study.json")
    found = storage.load(tmp_path / "deep" / "study.json")
    assert found == STUDY
    assert isinstance(found.nets[0].choice.neuron, Neuron)
    assert isinstance(found.nets[0].layers[0].shape.kernel, tuple)
    assert hash(found.nets[0].choice) == hash(CHOICE)


def test_no_unfinished_file_is_left(tmp_path):
    storage.save(STUDY, tmp_path / "study.json")
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]


def test_another_schema_is_refused(tmp_path):
    path = tmp_path / "study.json"
    storage.save(STUDY, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    with pytest.raises(storage.SchemaError, match="schema 99"):
        storage.load(path)


def test_figures_that_are_no_numbers_are_refused(tmp_path):
    broken = Study({}, (Net(CHOICE, Status.COMPLETE, accuracy=float("nan")),))
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.save(broken, tmp_path / "study.json")


def test_a_row_a_network(tmp_path):
    storage.save_tables(STUDY, tmp_path)
    found = rows(tmp_path / "nets.csv")
    assert [row["status"] for row in found] == ["complete", "failed", "pruned"]
    first = found[0]
    assert first["name"] == CHOICE.name
    assert (first["neuron"], first["surrogate"], first["matched"]) == ("Lapicque", "sigmoid", "time constant")
    assert (float(first["beta"]), float(first["threshold"]), float(first["slope"])) == (1 / 3, 0.1 + 0.2, 5.0)
    assert [float(first[f"accelerated ms {quantile} %"]) for quantile in (20, 50, 80)] == [0.4, 0.5, 0.6]
    assert float(first["predicted H200 ms"]) == 0.01
    assert found[1]["error"] == 'line "1"\nline 2'
    assert found[1]["accuracy"] == found[1]["dense ms 50 %"] == found[1]["slope"] == ""


def test_a_row_a_layer(tmp_path):
    storage.save_tables(STUDY, tmp_path)
    found = rows(tmp_path / "layers.csv")
    assert [row["layer"] for row in found] == ["conv1", "fc"]
    assert (found[0]["kernel"], found[0]["in_size"], found[0]["out_channels"]) == ("3x3", "16x16", "16")
    assert float(found[0]["cycles"]) == 1234.5
    assert float(found[1]["density"]) == 0.078
    assert found[1]["cycles"] == found[1]["predicted_ms"] == ""


def test_a_study_without_networks_has_empty_tables(tmp_path):
    storage.save_tables(Study({}, ()), tmp_path)
    assert rows(tmp_path / "nets.csv") == rows(tmp_path / "layers.csv") == []
