"""The crossover cache and calibration files: shared, atomic, and harmless when broken."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading

import pytest

import sparseflow
from sparseflow.dispatch.cache import Calibration, CrossoverCache, LayerObservation
from sparseflow.dispatch.fingerprint import fingerprint
from sparseflow.plan import Crossover


def crossover(key):
    return Crossover(key, 0.2, 1.0, 0.05, 0.1, (0.01, 0.5), (0.1, 2.0), "v")


def test_a_second_process_reads_what_the_first_measured(tmp_path):
    CrossoverCache(tmp_path).put(crossover("a"))
    CrossoverCache(tmp_path).put(crossover("b"))
    assert CrossoverCache(tmp_path).get("a") == crossover("a")
    assert CrossoverCache(tmp_path).get("b") == crossover("b")
    assert CrossoverCache(tmp_path).get("c") is None


def test_concurrent_writers_lose_nothing(tmp_path):
    caches = [CrossoverCache(tmp_path) for _ in range(4)]
    threads = [
        threading.Thread(target=lambda c=c, i=i: [c.put(crossover(f"{i}.{j}")) for j in range(10)])
        for i, c in enumerate(caches)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fresh = CrossoverCache(tmp_path)
    assert all(fresh.get(f"{i}.{j}") for i in range(4) for j in range(10))


def _with(**figures):
    return json.dumps({"crossovers": {"a": {**dataclasses.asdict(crossover("a")), **figures}}})


IMPOSSIBLE = [
    _with(density="x"),
    _with(dense_ms=float("nan")),
    _with(prescan_ms=None),
    _with(pack_ms=-1.0),
    _with(densities=[], sparse_ms=[]),
    _with(densities=[0.1]),
]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"crossovers": 3}', '{"crossovers": {"a": {"key": "a"}}}', *IMPOSSIBLE]
)
def test_a_broken_file_is_measured_again_and_said(tmp_path, content, caplog):
    cache = CrossoverCache(tmp_path)
    cache.path.write_text(content)
    with caplog.at_level(logging.WARNING, "sparseflow"):
        assert cache.get("a") is None
    assert "measuring again" in caplog.text
    cache.put(crossover("a"))
    assert CrossoverCache(tmp_path).get("a") == crossover("a")


def test_another_machines_file_is_not_used_and_said(tmp_path, caplog):
    (tmp_path / "crossovers-0123.json").write_text("{}")
    with caplog.at_level(logging.INFO, "sparseflow"):
        assert CrossoverCache(tmp_path).get("a") is None
    assert "another machine" in caplog.text


def test_an_unwritable_directory_keeps_crossovers_in_memory(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    cache = CrossoverCache(blocked)
    with caplog.at_level(logging.WARNING, "sparseflow"):
        cache.put(crossover("a"))
        cache.put(crossover("b"))
    assert cache.get("a") == crossover("a")
    assert cache.get("b") == crossover("b")
    assert caplog.text.count("in memory only") == 1


def test_calibration_round_trip(tmp_path):
    calibration = Calibration({"a": crossover("a")}, {"conv": LayerObservation(0.1, 0.2, 300)}, fingerprint())
    calibration.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == calibration
    assert calibration.fits


def test_calibration_files_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(sparseflow.CalibrationError, match="not a calibration file"):
        Calibration.load(tmp_path / "absent.json")
    path = tmp_path / "old.json"
    Calibration({}, {}, fingerprint()).save(path)
    newer = {**json.loads(path.read_text()), "schema": 99, "crossovers": {"a": {"key": "a", "unheard": "of"}}}
    path.write_text(json.dumps(newer))
    with pytest.raises(sparseflow.CalibrationError, match="schema 99"):
        Calibration.load(path)
