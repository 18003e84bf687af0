"""What is written: one JSON line an event, so that a run that ended early goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

SCHEMA = 1
Quantiles = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Gate:
    """Whether results were right: the worst error in units of its float64 budget, and what was compared."""

    worst: float
    checked: str

    @property
    def green(self) -> bool:
        """Inside the budget; ``NaN`` is not."""
        return self.worst <= 1.0


class RedGate(ArithmeticError):
    """A result is wrong, so that its time means nothing."""


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One way to run one layer at one density, beside a dense way. Times are ms a call: 20, 50 and 80 % quantiles.

    ``density`` was counted, ``target`` was asked for; ``load`` is what the kernel's time follows: density, or the share
    of occupied (tile, channel) pairs (``axis``). ``prescan_ms`` is contained in ``ms`` where ``includes_prescan`` says
    so, and unknown of a layer that was dispatched. ``speedup`` is the ratio of medians, ``baseline`` over this.
    ``cold`` says that the inputs in rotation exceed the last-level cache.
    """

    stage: str
    layer: str
    dtype: str
    steps_times_batch: int
    pattern: str
    target: float
    density: float
    path: str
    variant: str
    axis: str
    load: float
    ms: Quantiles
    prescan_ms: float | None
    includes_prescan: bool
    baseline: str
    baseline_ms: Quantiles
    speedup: float
    cold: bool
    gate: Gate
    kind: str = "layer"


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """A way to run a whole model. ``speedup`` is over ``baseline``; ``agreement`` the share of equal top-1 classes."""

    stage: str
    model: str
    weights: str
    dtype: str
    steps: int
    batch: int
    run: str
    ms: Quantiles
    baseline: str
    baseline_ms: Quantiles
    speedup: float
    agreement: float
    gate: Gate
    kind: str = "model"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A single number about the machine or the suite, with its unit."""

    stage: str
    name: str
    value: float
    unit: str
    note: str = ""
    kind: str = "figure"


@dataclasses.dataclass(frozen=True)
class Skipped:
    """What was not measured, and why."""

    stage: str
    name: str
    reason: str
    kind: str = "skipped"


Row = LayerRow | ModelRow | Figure | Skipped


def to_json(row: Row) -> dict[str, Any]:
    """A row as plain data.

    Raises:
        RedGate: its gate is not green.
        ValueError: one of its numbers is not finite.
    """
    gate = getattr(row, "gate", None)
    if gate is not None and not gate.green:
        raise RedGate(f"{row}: outside its error budget")
    data = dataclasses.asdict(row)
    for name, value in data.items():
        numbers = value if isinstance(value, tuple | list) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise ValueError(f"{name} of {row} is not finite")
    return data


class Journal:
    """The lines of one output directory.

    Events are ``started``, ``finished`` (with its rows) and ``failed`` (with the error) of a cell. A cell counts as
    done only for the same ``identity``: commit, kernels, GPU and versions.
    """

    def __init__(self, path: pathlib.Path, identity: dict[str, Any]):
        self.path, self.identity = path, identity
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, event: str, cell: str, **data: Any) -> None:
        """Append one event; it is on the disk when this returns."""
        line = json.dumps({"schema": SCHEMA, "event": event, "cell": cell, "identity": self.identity, **data})
        with self.path.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def events(self) -> Iterator[dict[str, Any]]:
        """The events of this identity; a line that was cut off is passed over."""
        if not self.path.exists():
            return
        for line in self.path.read_text().splitlines():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            if event.get("schema") == SCHEMA and event.get("identity") == self.identity:
                yield event

    def done(self) -> set[str]:
        """Cells that finished."""
        return {event["cell"] for event in self.events() if event["event"] == "finished"}

    def attempted(self, run: str) -> set[str]:
        """Cells that were started in the run called ``run``, whether or not they came to an end."""
        return {event["cell"] for event in self.events() if event["event"] == "started" and event["run"] == run}

    def rows(self) -> list[dict[str, Any]]:
        """The rows of all finished cells; of a cell that finished twice, the later ones."""
        latest = {event["cell"]: event["rows"] for event in self.events() if event["event"] == "finished"}
        return [row for rows in latest.values() for row in rows]

    def failures(self) -> dict[str, str]:
        """What went wrong in cells that have not finished."""
        failed = {event["cell"]: event["error"] for event in self.events() if event["event"] == "failed"}
        done = self.done()
        return {cell: error for cell, error in failed.items() if cell not in done}
