"""What a benchmark run leaves behind: ``results.json``, the one thing that suites write and the report reads.

A speedup is a baseline's time (or memory) over ours, so that above 1 is a gain. Times are milliseconds and memory is
megabytes, each with its 20 %, 50 % and 80 % quantile; densities are shares in 0..1; ``None`` means not measured.
"""

from __future__ import annotations

import dataclasses
import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Any

SCHEMA = 1
Quantiles = tuple[float, float, float]


class Scope(StrEnum):
    """What a kernel asks of the network. Approximate methods never share a column with exact ones."""

    EXACT = "exact"  # any trained network, the same results
    PRUNED = "pruned"  # exact for a network whose weights were pruned in blocks before
    APPROXIMATE = "approximate"  # other results, said so
    PEER = "peer"  # somebody else's software


class Metric(StrEnum):
    """What was measured, and its unit."""

    LATENCY = "latency"  # ms
    MEMORY = "memory"  # MB
    STARTUP = "startup"  # ms

    @property
    def unit(self) -> str:
        """``ms`` or ``MB``."""
        return "MB" if self is Metric.MEMORY else "ms"


@dataclasses.dataclass(frozen=True)
class Gate:
    """Whether the results were right, and what was compared. A point with a red gate has no figure."""

    green: bool
    what: str
    why: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Point:
    """One figure: what ran, on what, and against what.

    ``case`` and ``kernel`` with ``baseline`` name a point in every run alike. ``config`` holds the scale parameters
    (``width``, ``resolution``, ``batch``, ``T``, ``depth``) and whatever else tells two cases apart. ``honest`` says
    that the baseline is the strongest dense path of the same precision: compiled, batch norm folded, all steps in one
    call. ``source`` is ``"measured"``, or where a published figure comes from.

    >>> Point("layers", "3x3 64@56", "events", "event-driven", Scope.EXACT, {"batch": 1}, 0.05, Metric.LATENCY,
    ...       (1.0, 2.0, 3.0), "best dense fp32", (3.0, 4.0, 5.0), True, Gate(True, "float64 budget")).speedup
    2.0
    """

    suite: str
    case: str
    kernel: str
    family: str
    scope: Scope
    config: dict[str, Any]
    rho: float | None
    metric: Metric
    value: Quantiles | None
    baseline: str
    baseline_value: Quantiles | None
    honest: bool
    gate: Gate
    precision: str = "fp32"
    device: str = "cpu"
    source: str = "measured"
    densities: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.gate.green and self.value is not None:
            raise ValueError(f"{self.case}, {self.kernel}: a figure behind a red gate: {'; '.join(self.gate.why)}")

    @property
    def speedup(self) -> float | None:
        """Median of the baseline over ours; ``None`` where one of them is missing."""
        if self.value is None or self.baseline_value is None:
            return None
        return self.baseline_value[1] / self.value[1]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a measured network, as its report has it."""

    case: str
    name: str
    kind: str
    density: float | None
    occupancy: float | None
    path: str
    dense_ms: float | None
    sparse_ms: float | None
    reason: str


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of one forward call: ``pack``, ``prescan``, ``compute``, ``neuron`` or ``rest``."""

    case: str
    kernel: str
    phase: str
    ms: float


@dataclasses.dataclass(frozen=True)
class Crossover:
    """The density above which dense is faster: what this sweep found, and what the dispatcher uses."""

    case: str
    kernel: str
    measured: float | None
    used: float | None


@dataclasses.dataclass(frozen=True)
class Absent:
    """A peer that could not be run, with the error that said so."""

    name: str
    error: str


@dataclasses.dataclass
class Results:
    """Everything of one run, and what it has to be read with."""

    environment: dict[str, Any]
    seed: int
    points: list[Point] = dataclasses.field(default_factory=list)
    layers: list[Layer] = dataclasses.field(default_factory=list)
    phases: list[Phase] = dataclasses.field(default_factory=list)
    crossovers: list[Crossover] = dataclasses.field(default_factory=list)
    absent: list[Absent] = dataclasses.field(default_factory=list)

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=1) + "\n")
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a file of this schema. Raises :class:`ValueError` for another one."""
        record = json.loads(Path(path).read_text())
        if record.get("schema") != SCHEMA:
            raise ValueError(f"{path} has schema {record.get('schema')}, and this version reads {SCHEMA}")
        return cls(
            record["environment"],
            record["seed"],
            [_point(point) for point in record["points"]],
            [Layer(**layer) for layer in record["layers"]],
            [Phase(**phase) for phase in record["phases"]],
            [Crossover(**crossover) for crossover in record["crossovers"]],
            [Absent(**absent) for absent in record["absent"]],
        )


def _point(record: dict[str, Any]) -> Point:
    gate = record["gate"]
    converted = {
        "scope": Scope(record["scope"]),
        "metric": Metric(record["metric"]),
        "gate": Gate(gate["green"], gate["what"], tuple(gate["why"])),
        "value": _quantiles(record["value"]),
        "baseline_value": _quantiles(record["baseline_value"]),
    }
    return Point(**(record | converted))


def _quantiles(values: list[float] | None) -> Quantiles | None:
    return None if values is None else (values[0], values[1], values[2])
