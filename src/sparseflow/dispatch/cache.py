"""The on-disk store of measured crossovers, and the portable :class:`Calibration`."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
import threading
from typing import Any

from sparseflow.config import cache_dir
from sparseflow.errors import CalibrationError
from sparseflow.plan import Crossover, crossover_from_dict

from .fingerprint import SCHEMA, digest, fingerprint

logger = logging.getLogger("sparseflow")


def _dump(path: pathlib.Path, crossovers: dict[str, Crossover], extra: dict[str, Any]) -> None:
    payload = {**extra, "crossovers": {k: dataclasses.asdict(c) for k, c in crossovers.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
    scratch.write_text(json.dumps(payload, indent=1))
    os.replace(scratch, path)  # readers see the old file or the new one, never half of one


def _crossovers(payload: dict[str, Any]) -> dict[str, Crossover]:
    return {k: crossover_from_dict(c) for k, c in payload["crossovers"].items()}


_BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError)


class CrossoverCache:
    """Crossovers of this machine and these library versions, shared by every process of the user.

    One file a fingerprint, merged under a lock and replaced atomically. An unusable file or directory costs a new
    measurement and a log line, never an error.
    """

    def __init__(self, directory: pathlib.Path | None = None):
        self._directory = directory
        self._known: dict[str, Crossover] | None = None
        self._writable = True
        self._lock = threading.Lock()

    @property
    def path(self) -> pathlib.Path:
        """The file this machine and these versions use."""
        return (self._directory or cache_dir()) / f"crossovers-{digest(fingerprint())}.json"

    def get(self, key: str) -> Crossover | None:
        """The stored crossover of ``key``."""
        with self._lock:
            return self._read().get(key)

    def put(self, crossover: Crossover) -> None:
        """Store one measurement."""
        import filelock

        with self._lock:
            self._read()[crossover.key] = crossover
            if not self._writable:
                return
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with filelock.FileLock(f"{self.path}.lock", timeout=5):
                    merged = {**self._stored(), **self._read()}
                    _dump(self.path, merged, {"fingerprint": fingerprint()})
            except (OSError, filelock.Timeout) as error:
                self._writable = False
                logger.warning("crossovers are kept in memory only: %s cannot be written (%s)", self.path, error)

    def _read(self) -> dict[str, Crossover]:
        if self._known is None:
            self._known = self._stored()
            if not self._known and any(path != self.path for path in self.path.parent.glob("crossovers-*.json")):
                logger.info("stored crossovers are of another machine or library version; measuring again")
        return self._known

    def _stored(self) -> dict[str, Crossover]:
        try:
            return _crossovers(json.loads(self.path.read_text()))
        except FileNotFoundError:
            return {}
        except _BROKEN as error:
            logger.warning("%s cannot be read (%s); measuring again", self.path, error)
            return {}


@dataclasses.dataclass(frozen=True)
class LayerObservation:
    """What calibration data showed of one layer: density and occupancy in 0..1, over ``numel`` input values."""

    density: float
    occupancy: float
    numel: int


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Crossovers and densities measured on real data, to be shipped beside a model.

    >>> empty = Calibration(crossovers={}, layers={}, fingerprint={})
    >>> empty.layers
    {}
    """

    crossovers: dict[str, Crossover]
    layers: dict[str, LayerObservation]
    fingerprint: dict[str, str | int]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` as JSON."""
        layers = {name: dataclasses.asdict(o) for name, o in self.layers.items()}
        extra = {"schema": SCHEMA, "fingerprint": self.fingerprint, "layers": layers}
        _dump(pathlib.Path(path), self.crossovers, extra)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read :meth:`save` output. Raises :class:`CalibrationError` for an unreadable file or another schema."""
        file = pathlib.Path(path)
        try:
            payload = json.loads(file.read_text())
            schema = payload["schema"]
            if schema == SCHEMA:
                layers = {name: LayerObservation(**o) for name, o in payload["layers"].items()}
                return cls(_crossovers(payload), layers, payload["fingerprint"])
        except _BROKEN as error:
            raise CalibrationError(f"{path} is not a calibration file: {error}") from error
        raise CalibrationError(f"{path} has schema {schema}, this version reads schema {SCHEMA}")

    @property
    def fits(self) -> bool:
        """Whether its times were measured on this machine with these library versions."""
        return self.fingerprint == fingerprint()
