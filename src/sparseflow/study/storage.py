"""A study as JSON, which reads back as it was, and as two CSV tables: a row a network, and a row a layer."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sparseflow.errors import SparseflowError

from .records import SCHEMA, Choice, Layer, LayerShape, Matched, Net, Neuron, Status, Study, Surrogate

STUDY, NETS, LAYERS = "study.json", "nets.csv", "layers.csv"
Row = dict[str, Any]


class SchemaError(SparseflowError):
    """A file was written by another version."""


def save(study: Study, path: Path) -> None:
    """Write the JSON file whole or not at all.

    Raises:
        ValueError: a figure is infinite or not a number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(dataclasses.asdict(study), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def load(path: Path) -> Study:
    """Read what :func:`save` wrote.

    Raises:
        SchemaError: it has another schema.
        OSError: it cannot be read.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("schema") != SCHEMA:
        raise SchemaError(f"{path} has schema {record.get('schema')}, and this version reads {SCHEMA}")
    return Study(**(record | {"nets": tuple(map(_net, record["nets"]))}))


def _net(record: Row) -> Net:
    converted = {
        "choice": _choice(record["choice"]),
        "status": Status(record["status"]),
        "layers": tuple(map(_layer, record["layers"])),
        "latency": {path: tuple(quantiles) for path, quantiles in record["latency"].items()},
    }
    return Net(**(record | converted))


def _choice(record: Row) -> Choice:
    kinds = {"neuron": Neuron, "surrogate": Surrogate, "matched": Matched}
    return Choice(**(record | {name: kind(record[name]) for name, kind in kinds.items()}))


def _layer(record: Row) -> Layer:
    shape: Row = {name: tuple(v) if isinstance(v, list) else v for name, v in record["shape"].items()}
    values: Row = record | {"shape": LayerShape(**shape)}
    return Layer(**values)


def save_tables(study: Study, folder: Path) -> None:
    """Write ``nets.csv`` and ``layers.csv``; what was not measured is an empty cell, times have three quantiles."""
    _write(folder / NETS, map(_net_row, study.nets))
    _write(folder / LAYERS, _layer_rows(study))


def _write(path: Path, rows: Iterable[Row]) -> None:
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)


def _net_row(net: Net) -> Row:
    fields = ("status", "accuracy", "epochs", "steps", "batch", "spikes", "cycles", "dense", "error")
    times = {
        f"{path} ms {quantile}": value
        for path, quantiles in net.latency.items()
        for quantile, value in zip(("20 %", "50 %", "80 %"), quantiles, strict=True)
    }
    predicted = {f"predicted {path} ms": value for path, value in net.predicted.items()}
    return _choice_row(net) | {name: getattr(net, name) for name in fields} | times | predicted


def _layer_rows(study: Study) -> Iterator[Row]:
    for net in study.nets:
        for layer in net.layers:
            shape = dataclasses.asdict(layer.shape)
            sizes = {name: "x".join(map(str, value)) for name, value in shape.items() if isinstance(value, tuple)}
            figures = {name: getattr(layer, name) for name in ("spikes", "density", "cycles", "predicted_ms")}
            yield _choice_row(net) | {"layer": shape.pop("name")} | shape | sizes | figures


def _choice_row(net: Net) -> Row:
    return {"name": net.choice.name, **dataclasses.asdict(net.choice)}
