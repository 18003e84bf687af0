"""The comparison of two engines: figures only where they compute the same."""

from __future__ import annotations

import subprocess

import pytest

from benchmarks import engines
from sparseflow.kernels.cpu import build, engine

pytestmark = pytest.mark.skipif(not engine.available(), reason="no native engine on this machine")
BLOCK = engines.Block(16, 3, 1, 0.1)


def test_figures_of_an_engine_against_itself():
    library = engine.library()
    row = engines.block_row(BLOCK, {"base": library, "this": library}, 3)
    assert row is not None
    assert (row["channels"], row["side"], row["batch"], row["density"], row["steps"]) == (16, 3, 1, 0.1, 4)
    assert row["base_ms"][0] <= row["base_ms"][1] <= row["base_ms"][2]
    assert row["speedup"] > 0


def test_no_figures_where_spikes_differ(monkeypatch):
    original, made = engines.Block.runs, []

    def runs(self):
        made.append(self)
        return original(self if len(made) == 1 else engines.Block(16, 3, 1, 0.9))

    monkeypatch.setattr(engines.Block, "runs", runs)
    library = engine.library()
    assert engines.block_row(BLOCK, {"base": library, "this": library}, 3) is None


def test_sources_of_a_commit(tmp_path):
    try:
        folder = engines.sources_of("HEAD", tmp_path)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    assert {path.name for path in folder.iterdir()} >= {"abi.h", "engine.cpp", "kernels.cpp"}
    assert folder != build.SOURCE_DIR
