"""The tables in the documentation are those of the committed results."""

from __future__ import annotations

import pathlib
import subprocess
import sys

from sparseflow.bench.records import Results
from sparseflow.bench.suites.shapes import DENSITIES, SHAPES

ROOT = pathlib.Path(__file__).parents[1]


def test_tables_are_those_of_the_results():
    check = [sys.executable, "-m", "benchmarks.tables", "--check"]
    run = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_committed_results_are_complete_and_green():
    layers = Results.load(ROOT / "benchmarks/results/layers.json")
    found = {(point.case, point.config["density set"]) for point in layers.points if point.suite == "layers"}
    assert found == {(shape.name, density) for shape in SHAPES for density in DENSITIES}
    models, networks = (Results.load(ROOT / f"benchmarks/results/{name}.json") for name in ("models", "networks"))
    assert {point.suite for point in models.points} == {"models"}
    assert {point.suite for point in networks.points} == {"scaling", "memory", "startup", "peers"}
    assert all(point.gate.green for point in (*layers.points, *models.points, *networks.points))
