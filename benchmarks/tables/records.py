"""Committed results as rows, and rows as Markdown tables."""

from __future__ import annotations

import json
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
BEST = "best dense fp32"
NOT_MEASURED = "Not measured yet on a quiet machine.\n"
Cases = dict[tuple, dict[str, dict]]


def load(name: str) -> dict:
    """A committed results file."""
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown: the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def by_case(file: str, suite: str, *keys: str) -> Cases:
    """Points of a suite by case (and ``keys`` of their configuration), each by kernel and baseline."""
    cases: Cases = {}
    for point in load(file)["points"]:
        if point["suite"] == suite:
            case = (point["case"], *(point["config"][key] for key in keys))
            cases.setdefault(case, {})[f"{point['kernel']} over {point['baseline']}"] = point
    return cases


def median(point: dict | None, field: str = "value", digits: int = 1) -> str:
    """The middle of ``(low, median, high)``; empty where there is none."""
    return f"{point[field][1]:.{digits}f}" if point and point[field] else ""


def speedup(point: dict | None, digits: int = 2) -> str:
    """A point over its baseline, unless its results were wrong."""
    if point is None:
        return ""
    if not point["gate"]["green"]:
        return "red gate"
    return f"{point['baseline_value'][1] / point['value'][1]:.{digits}f}x"


def environment(results: str) -> str:
    """Where a file's results were measured."""
    env = load(results)["environment"]
    names = ("cpu", "cores", "threads", "engine", "torch", "spikingjelly", "snntorch", "python", "sparseflow", "commit")
    return table(["", "value"], [[name, str(env.get(name, ""))] for name in names])
