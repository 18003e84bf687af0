"""The goals of the project beside what was measured, and the file that the documentation reads."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

from .records import SCHEMA, Journal
from .spikes import CLUSTERED, PERSISTENT

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Goal:
    """What the project wants to reach, over the strongest dense way, prescan included, and which rows tell."""

    text: str
    at_least: float
    matches: Callable[[dict[str, Any]], bool]


def _honest(row: dict[str, Any]) -> bool:
    """A kernel over the strongest dense way, prescan included, with a full weight."""
    fair = row["kind"] == "layer" and row["baseline"].startswith("dense") and row["includes_prescan"]
    return fair and row["path"] != "dispatched" and row["stage"] != "pruned"


def _layer(pattern: str, density: float, dtype: str = "float16") -> Callable[[dict[str, Any]], bool]:
    def matches(row: dict[str, Any]) -> bool:
        return _honest(row) and (row["pattern"], row["target"], row["dtype"]) == (pattern, density, dtype)

    return matches


def _big_linear(row: dict[str, Any]) -> bool:
    named = row.get("layer") == "linear 25088->4096" and row["steps_times_batch"] == 1
    return _honest(row) and named and row["target"] == 0.05


GOALS = (
    Goal("silent layers, float16", 10.0, _layer(CLUSTERED, 0.0)),
    Goal("98.5 % sparsity, clustered spikes, float16", 3.0, _layer(CLUSTERED, 0.015)),
    Goal("95 % sparsity, half the neurons silent over all T, float16", 1.2, _layer(PERSISTENT, 0.05)),
    Goal("linear 25088->4096, T*N = 1, 5 %", 5.0, _big_linear),
    Goal("float32 over PyTorch's float32 without TF32", 3.0, lambda row: _honest(row) and row["dtype"] == "float32"),
    Goal("layers as dispatched, never below", 0.98, lambda row: row.get("path") == "dispatched"),
    Goal(
        "whole networks, never below",
        0.98,
        lambda row: row["kind"] == "model" and row["baseline"].startswith("dense"),
    ),
)


_CASE = ("stage", "layer", "model", "dtype", "steps_times_batch", "batch", "pattern", "target", "baseline")


def best_by_case(rows: Rows) -> Rows:
    """Of every layer, batch, dtype and point (or model and batch) the fastest way: what a dispatcher could choose."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in _CASE)
        if key not in best or row["ms"][1] < best[key]["ms"][1]:
            best[key] = row
    return list(best.values())


def goals(rows: Rows) -> list[tuple[str, float, str]]:
    """Text, wanted ratio and what was measured, for each goal."""
    found = []
    for goal in GOALS:
        ratios = sorted(row["speedup"] for row in best_by_case([row for row in rows if goal.matches(row)]))
        found.append((goal.text, goal.at_least, _verdict(goal, ratios)))
    return found


def _verdict(goal: Goal, ratios: list[float]) -> str:
    if not ratios:
        return "not measured"
    reached = sum(ratio >= goal.at_least for ratio in ratios)
    middle = ratios[len(ratios) // 2]
    return f"{ratios[0]:.2f}x to {ratios[-1]:.2f}x, middle {middle:.2f}x; reached in {reached} of {len(ratios)}"


def collect(journal: Journal, out: pathlib.Path) -> dict[str, Any]:
    """Write all finished rows of this identity to ``out``; returns what was written."""
    record = {
        "schema": SCHEMA,
        "identity": journal.identity,
        "rows": journal.rows(),
        "failures": journal.failures(),
        "goals": [{"goal": text, "at_least": wanted, "measured": told} for text, wanted, told in goals(journal.rows())],
    }
    out.write_text(json.dumps(record, indent=1) + "\n")
    return record


def tell(record: dict[str, Any]) -> str:
    """A short text for the end of a run."""
    lines = [f"{len(record['rows'])} rows, {len(record['failures'])} cells failed"]
    for row in record["rows"]:
        if row["kind"] == "figure":
            lines.append(f"  {row['stage']}: {row['name']} {row['value']:.4g} {row['unit']}")
        if row["kind"] == "skipped":
            lines.append(f"  not measured: {row['name']}: {row['reason'][:200]}")
    best = best_by_case([row for row in record["rows"] if row["kind"] in ("layer", "model") and _shown(row)])
    lines += [_line(row) for row in best]
    lines += [f"  FAILED {cell}: {error[:200]}" for cell, error in record["failures"].items()]
    lines += [f"  goal {goal['at_least']:g}x {goal['goal']}: {goal['measured']}" for goal in record["goals"]]
    return "\n".join(lines)


def _shown(row: dict[str, Any]) -> bool:
    return row["stage"] in {"headline", "full occupancy", "linear", "models"} and row["baseline"].startswith("dense")


def _line(row: dict[str, Any]) -> str:
    what = row.get("layer") or f"{row['model']} batch {row['batch']}"
    where = f"{row['pattern']} {row['density']:.2%} T*N {row['steps_times_batch']}" if "layer" in row else row["run"]
    return (
        f"  {row['stage']}: {what}, {where}: {row['ms'][1]:.4f} ms, {row['speedup']:.2f}x over {row['baseline']}"
        f" {row.get('variant', '')}"
    )
