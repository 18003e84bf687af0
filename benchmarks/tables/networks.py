"""Tables of whole networks."""

from __future__ import annotations

import math
import re
import statistics

from .records import NOT_MEASURED, by_case, environment, load, median, speedup, table

_DENSE = ("eager", "eager channels_last", "compiled fp32", "compiled bf16")
_JUDGED = ("dense", "level 2")


def networks() -> str:
    """Whole networks: medians of every variant, and level 2 over the strongest dense fp32 of the run."""
    head = [
        "network; ms a call",
        "activity",
        "density",
        *_DENSE,
        "level 1",
        "level 2",
        "over eager",
        "over compiled fp32",
    ]
    cases = {name: found for (name,), found in by_case("models.json", "models").items()}
    return table(head, [_network(name, cases[name]) for name in sorted(cases, key=_natural)])


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts numbers in names by their size."""
    parts = re.split(r"(\d+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _network(name: str, found: dict[str, dict]) -> list[str]:
    point = found["level 2 over eager"]
    dense = [median(found.get(f"level 2 over {baseline}"), "baseline_value") for baseline in _DENSE]
    ours = [median(found[f"{level} over eager"]) for level in ("level 1", "level 2")]
    eager = [found[key] for key in ("level 2 over eager", "level 2 over eager channels_last") if key in found]
    over = min(map(speedup, eager), key=lambda text: float(text.rstrip("x")) if text[0].isdigit() else 0.0)
    compiled = speedup(found.get("level 2 over compiled fp32"))
    return [name, point["config"]["activity"], f"{point['rho']:.1%}", *dense, *ours, over, compiled]


def memory() -> str:
    """Resident memory of networks with their packed weights and of a call, in MB."""
    head = ["network; MB", "eager", "level 1", "level 2", "level 2 over eager"]
    body = []
    for (name,), found in by_case("networks.json", "memory").items():
        point = found.get("level 2 over eager")
        if point and point["value"]:
            share = f"{point['value'][1] / point['baseline_value'][1]:.2f}x"
            values = [median(point, "baseline_value"), median(found.get("level 1 over eager")), median(point)]
            body.append([name, *values, share])
    return table(head, body)


def growth() -> str:
    """Level 2 over the fastest dense fp32 variant as one size grows, and by which power of it either time does."""
    axes: dict[str, dict[float, list[dict]]] = {}
    for point in load("networks.json")["points"]:
        if point["suite"] == "scaling" and point["value"]:
            axis, size = point["case"].rsplit(" ", 1)
            axes.setdefault(axis, {}).setdefault(float(size), []).append(point)
    head = [
        "network, size that grows",
        "dense",
        "size: level 2 / dense ms = times as fast",
        "level 2 grows as",
        "dense as",
    ]
    return table(head, [_growth(axis, sizes) for axis, sizes in axes.items() if len(sizes) > 1])


def _growth(axis: str, sizes: dict[float, list[dict]]) -> list[str]:
    compiled = all(any(point["honest"] for point in points) for points in sizes.values())
    sized = [(size, _fastest_dense(sizes[size], compiled)) for size in sorted(sizes)]
    cells = [f"{size:.0f}: {median(p)} / {median(p, 'baseline_value')} = {speedup(p)}" for size, p in sized]
    times = ([point[key][1] for _, point in sized] for key in ("value", "baseline_value"))
    powers = [f"size^{_power([size for size, _ in sized], ms):.2f}" for ms in times]
    return [axis, "compiled or eager" if compiled else "eager", "; ".join(cells), *powers]


def _fastest_dense(points: list[dict], compiled: bool) -> dict:
    """Where some sizes were not compiled, none is: otherwise the baseline would change along the line."""
    dense = [point for point in points if compiled or not point["baseline"].startswith("compiled")]
    return min(dense, key=lambda point: point["baseline_value"][1])


def _power(sizes: list[float], times: list[float]) -> float:
    """Slope of the times over the sizes, both as logarithms."""
    return statistics.linear_regression(list(map(math.log, sizes)), list(map(math.log, times))).slope


def startup() -> str:
    """What has to be waited for before the first answer."""
    body = []
    for (name,), found in by_case("networks.json", "startup").items():
        for key, point in found.items():
            what, baseline = key.split(" over ", 1)
            body.append([name, what, median(point, digits=0), baseline, median(point, "baseline_value", 0)])
    head = ["network", "what", "ms", "against", "ms"]
    return table(head, body) if body else NOT_MEASURED


def fused_flips() -> str:
    """Spikes that differ from the float64 network, and how far its membrane was from the threshold there."""
    rows = [row for row in load("fused.json")["rows"] if row["green"]]
    decades = list(rows[0]["gate"]["level 2"]["distances"])
    shown = [decade for decade in decades if any(_flips(row, name)[decade] for row in rows for name in _JUDGED)]
    head = ["network", "run", "spikes compared", "flips", *shown]
    return table(head, [_flip_row(row, name, shown) for row in rows for name in _JUDGED])


def _flips(row: dict, name: str) -> dict[str, int]:
    return row["gate"][name]["distances"]


def _flip_row(row: dict, name: str, decades: list[str]) -> list[str]:
    gate = row["gate"][name]
    counts = [str(gate["distances"][decade] or "") for decade in decades]
    outputs, flips = sum(gate["outputs"].values()), sum(gate["flips"].values())
    return [row["case"], name, f"{outputs:,}", f"{flips:,}", *counts]


def fused_machine() -> str:
    """Where the fused networks were measured."""
    return environment("fused.json")


def machine() -> str:
    """What the networks were measured on."""
    return environment("models.json")


def pruned_networks() -> str:
    """Networks pruned in blocks: accuracy on the way, and what skipping blocks brings."""
    stages = {"accuracy": "before", "accuracy_pruned": "pruned", "accuracy_fine_tuned": "fine-tuned"}
    over = ("eager", "compiled fp32", "level 2 before pruning")
    head = ["network", *(f"accuracy {name}" for name in stages.values()), *(f"over {name}" for name in over)]
    body = []
    for (name,), found in by_case("pruned.json", "pruned").items():
        point = next(iter(found.values()))
        if "accuracy" in point["config"]:
            accuracies = [f"{point['config'][key]:.1%}" for key in stages]
            body.append([name, *accuracies, *(speedup(found.get(f"level 2, pruned over {base}")) for base in over)])
    return table(head, body)


TABLES = {
    table.__name__: table
    for table in (
        networks,
        memory,
        growth,
        startup,
        fused_flips,
        fused_machine,
        machine,
        pruned_networks,
    )
}
