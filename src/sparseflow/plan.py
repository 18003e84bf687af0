"""The plan: pure data that says, for every layer, what runs and why.

A :class:`Plan` holds :class:`BlockPlan` records (convolution or linear + normalisation + neuron), and each block
holds the :class:`LayerPlan` of its convolution or linear layers. Nothing here imports a kernel or touches a module.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
import math
from typing import Any

SCHEMA = 2


class Provenance(enum.IntEnum):
    """What is known about the zeros of a tensor; ordered, so that ``min`` joins two of them.

    ``BINARY`` (neuron output, {0, 1}) > ``INTEGER`` (sum of spikes) > ``SPARSE`` (zeros preserved, any values) >
    ``DENSE`` (anything else).
    """

    DENSE = 0
    SPARSE = 1
    INTEGER = 2
    BINARY = 3


class Path(enum.StrEnum):
    """The implementation a layer runs."""

    DENSE = "dense"
    EVENT = "event"
    GATHER = "gather"
    TILE = "tile"
    PRUNED = "pruned"
    FUSED = "fused"


class Reason(enum.StrEnum):
    """Why a layer runs what it runs. Every refusal has one."""

    SPARSE_WINS = "sparse measured faster at the observed density"
    DENSE_WINS = "dense measured faster at the observed density"
    NOT_MEASURED = "not measured yet; the first call measures it"
    NOT_SPIKE_FED = "input is not a spike tensor"
    NEVER_RUN = "layer did not run on the example input"
    REPLACED = "the planned layer was replaced or restored; accelerate again"
    EXCLUDED = "excluded by include= or exclude="
    CUSTOM_FORWARD = "the class overrides forward in a way the sparse path cannot follow"
    PARAMETRIZED = "weight is recomputed at every call (parametrization or weight standardisation)"
    PADDING_MODE = "padding_mode other than 'zeros' is not supported by the sparse path"
    TRANSPOSED = "transposed convolution is not supported by the sparse path"
    DTYPE = "dtype is not supported by the sparse path"
    DEVICE = "device has no sparse backend"
    NO_ENGINE = "no sparse kernel of the backend covers this layer"
    FORCED = "mode='sparse' asked for it"
    MODE = "mode='dense' asked for it"
    FUSED = "one kernel with its neuron, on packed spikes"
    NOT_TRACED = "the forward cannot be traced"
    NO_BLOCKS = "no neuron can be fused"
    FUSED_LOSES = "the fused plan was measured slower than the layers on their own"
    GRADIENTS = "gradients are recorded; fused blocks run under torch.no_grad()"
    GLOBAL_HOOKS = "a hook on all modules of the process wants to see every call"
    AUTOCAST = "autocast is on; fused blocks are float32"
    FUSED_DENSE = "dense measured faster at the observed density; its neuron is fused"


@dataclasses.dataclass(frozen=True)
class Crossover:
    """Measured times of one layer shape, and the load above which dense is faster.

    ``axis`` says what the load is, and so what ``density`` (the crossover) and ``densities`` (the measured points) are
    shares of: ``"density"`` (nonzero / numel of the input) or ``"occupancy"`` (blocks with a spike / blocks, as the
    kernel counts them). Times are milliseconds; ``densities`` and ``sparse_ms`` are parallel; prescan time is part of
    ``sparse_ms``. ``quiet`` is false where other work on the machine disturbed every run of some measured point.
    """

    key: str
    density: float
    dense_ms: float
    prescan_ms: float
    pack_ms: float
    densities: tuple[float, ...]
    sparse_ms: tuple[float, ...]
    variant: str
    quiet: bool = True
    axis: str = "density"

    def sparse_ms_at(self, density: float) -> float:
        """Sparse time at this load, by linear interpolation between the measured points."""
        points = list(zip(self.densities, self.sparse_ms, strict=True))
        if density <= points[0][0]:
            return points[0][1]
        for (d0, t0), (d1, t1) in itertools.pairwise(points):
            if density <= d1:
                return t0 + (t1 - t0) * (density - d0) / (d1 - d0)
        return points[-1][1]


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What one convolution or linear layer runs, and why.

    ``density`` is nonzero / numel of the layer's input in 0..1, ``occupancy`` the share of blocks with at least one
    spike (words of 64 channels on the CPU, channels of a tile on a GPU); both are ``None`` until real data was seen.
    """

    name: str
    kind: str
    path: Path
    reason: Reason
    provenance: Provenance
    detail: str = ""
    density: float | None = None
    occupancy: float | None = None
    crossover: Crossover | None = None


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """A run of modules ``conv/linear -> normalisation -> neuron`` that a fused kernel could take as one.

    ``norm`` and ``neuron`` are qualified module names, or ``None`` where the block has no such part. ``fused``: the
    parts run as one, over all time steps.
    """

    layers: tuple[LayerPlan, ...]
    norm: str | None = None
    neuron: str | None = None
    fused: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """The whole model's plan. ``method`` says how spikes were followed: ``"fx"`` or ``"dynamic"``."""

    blocks: tuple[BlockPlan, ...]
    method: str
    backend: str
    fallback_detail: str = ""
    schema: int = SCHEMA

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """Every layer of every block, in order of execution."""
        return tuple(layer for block in self.blocks for layer in block.layers)

    def __getitem__(self, name: str) -> LayerPlan:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers; :meth:`from_dict` reads them back."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """JSON text of :meth:`to_dict`."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Rebuild a plan from :meth:`to_dict` output. Raises ``ValueError`` for another schema version."""
        if data["schema"] != SCHEMA:
            raise ValueError(f"plan schema {data['schema']} cannot be read by this version (schema {SCHEMA})")
        blocks = tuple(
            BlockPlan(tuple(_layer_from_dict(layer) for layer in b["layers"]), b["norm"], b["neuron"], b["fused"])
            for b in data["blocks"]
        )
        return cls(blocks, data["method"], data["backend"], data["fallback_detail"])

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Rebuild a plan from :meth:`to_json` text."""
        return cls.from_dict(json.loads(text))


def crossover_from_dict(data: dict[str, Any]) -> Crossover:
    """Rebuild a :class:`Crossover` from ``dataclasses.asdict`` output. Raises ``ValueError`` for impossible figures."""
    found = Crossover(**{**data, "densities": tuple(data["densities"]), "sparse_ms": tuple(data["sparse_ms"])})
    figures = (found.density, found.dense_ms, found.prescan_ms, found.pack_ms, *found.densities, *found.sparse_ms)
    possible = all(isinstance(value, (int, float)) and 0 <= value < math.inf for value in figures)
    if not possible or not found.densities or len(found.densities) != len(found.sparse_ms):
        raise ValueError(f"the crossover of {found.key} holds figures that nobody measured")
    return found


def _layer_from_dict(data: dict[str, Any]) -> LayerPlan:
    fields = dict(data)
    fields["path"] = Path(fields["path"])
    fields["reason"] = Reason(fields["reason"])
    fields["provenance"] = Provenance(fields["provenance"])
    if fields["crossover"] is not None:
        fields["crossover"] = crossover_from_dict(fields["crossover"])
    return LayerPlan(**fields)
