"""The tables in the documentation are those of the committed results."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

from sparseflow.bench.suites.shapes import DENSITIES, SHAPES

ROOT = pathlib.Path(__file__).parents[1]


def test_tables_are_those_of_the_results():
    check = [sys.executable, "-m", "benchmarks.tables", "--check"]
    run = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_committed_sweep_is_complete_and_correct():
    rows = json.loads((ROOT / "benchmarks/results/density_sweep.json").read_text())["rows"]
    assert {(row["shape"], row["density"]) for row in rows} == {(s.name, d) for s in SHAPES for d in DENSITIES}
    assert all(row["correct"] for row in rows)
