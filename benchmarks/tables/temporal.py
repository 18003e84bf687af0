"""Tables of temporal aggregation."""

from __future__ import annotations

import json

from .records import NOT_MEASURED, ROOT, table


def _temporal(part: str) -> list[dict]:
    """Rows of a part of the benchmark of temporal aggregation; none where it has not run."""
    path = ROOT / "benchmarks" / "results" / "temporal.json"
    return json.loads(path.read_text()).get(part, []) if path.exists() else []


def temporal_speed() -> str:
    """A training step and an inference call, over both baselines."""
    rows = {row["method"]: row for row in _temporal("speed")}
    if not rows:
        return NOT_MEASURED
    head = [
        "method, K",
        "training step, ms",
        "over T calls",
        "over one call",
        "inference, ms",
        "over T calls",
        "over one call",
    ]
    return table(
        head,
        [[name, *_speeds(row, rows, "training ms"), *_speeds(row, rows, "inference ms")] for name, row in rows.items()],
    )


def _speeds(row: dict, rows: dict[str, dict], key: str) -> list[str]:
    if row[key] is None:
        return ["", "", ""]
    baselines = (rows["T calls"][key][1], rows["one batched call"][key][1])
    return [f"{row[key][1]:.1f}", *(f"{ms / row[key][1]:.2f}x" for ms in baselines)]


def temporal_accuracy() -> str:
    """Test accuracy of networks trained with every method and K, mean over seeds and the extremes."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for part in ("rate", "events", "motion"):
        for row in _temporal(part):
            cell = found.setdefault((row["method"], row["K"]), {}).setdefault(row["data"], [])
            cell.append(row["accuracy"])
    return _by_data(found, ["trained as", "K"]) if found else NOT_MEASURED


def temporal_conversions() -> str:
    """Test accuracy of exact networks that were aggregated after training."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in _temporal("converted"):
        if row["asked"] != "auto":
            size = max(layer["K"] for layer in row["layers"])
            found.setdefault((row["asked"], size), {}).setdefault(row["data"], []).append(row["accuracy"])
    return _by_data(found, ["converted", "K"]) if found else NOT_MEASURED


def _by_data(found: dict[tuple[str, int], dict[str, list[float]]], keys: list[str]) -> str:
    data = list(dict.fromkeys(name for cells in found.values() for name in cells))
    rows = [[*map(str, key), *(_spread(cells.get(name, [])) for name in data)] for key, cells in found.items()]
    return table([*keys, *data], rows)


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1%} - {max(values):.1%})"


def temporal_auto() -> str:
    """What mode="auto" did with every trained network."""
    rows = [row for row in _temporal("converted") if row["asked"] == "auto"]
    if not rows:
        return NOT_MEASURED
    head = ["data, seed", "in time", "shuffling costs", "mode", "K by layer", "exact", "aggregated", "spikes", "speed"]
    return table(head, [_auto_row(row) for row in rows])


def _auto_row(row: dict) -> list[str]:
    layers = [layer for layer in row["layers"] if layer["layer"]]
    drift = ", ".join("" if layer["drift"] is None else f"{layer['drift']:.2f}x" for layer in layers)
    shares = [f"{row[key]:.0%}" for key in ("time share", "order drop")]
    accuracies = [f"{row[key]:.1%}" for key in ("exact accuracy", "accuracy")]
    sizes = ", ".join(str(layer["K"]) for layer in layers)
    return [
        f"{row['data']}, {row['seed']}",
        *shares,
        row["mode"],
        sizes,
        *accuracies,
        drift,
        f"{row['ms'][0] / row['ms'][1]:.2f}x",
    ]


def temporal_decisions() -> str:
    """What mode="auto" decides by the frames of variants that nothing was tuned on."""
    rows = _temporal("decisions")
    if not rows:
        return NOT_MEASURED
    body = [
        [row["data"], f"{row['time share']:.0%}", row["mode"], "" if row["mode"] == row["right"] else "wrong"]
        for row in rows
    ]
    return table(["data", "in time", "mode", ""], body)


TABLES = {
    table.__name__: table
    for table in (
        temporal_speed,
        temporal_accuracy,
        temporal_conversions,
        temporal_auto,
        temporal_decisions,
    )
}
