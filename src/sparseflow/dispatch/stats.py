"""What a layer did and saw since it was accelerated."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from sparseflow.plan import Path


@dataclasses.dataclass
class LayerStats:
    """Counts since the layer was accelerated. ``nonzero`` of ``numel`` inputs and ``occupied`` of ``words`` blocks
    were seen by the prescans; calls without a prescan add nothing to them, nor do those on a GPU whose counts were not
    asked for."""

    calls: collections.Counter[Path] = dataclasses.field(default_factory=collections.Counter)
    nonzero: int = 0
    numel: int = 0
    occupied: int = 0
    words: int = 0

    def add(self, seen: Any) -> None:
        """Add the counts of one prescan (:class:`~sparseflow.kernels.base.Counts` or a scan that has them)."""
        self.nonzero += seen.nonzero
        self.numel += seen.numel
        self.occupied += seen.occupied
        self.words += seen.words

    def paths(self) -> dict[str, int]:
        """Calls per path, by name."""
        return {str(path): count for path, count in self.calls.items()}

    @property
    def density(self) -> float | None:
        """Observed nonzero / numel in 0..1, ``None`` before the first prescan."""
        return self.nonzero / self.numel if self.numel else None

    @property
    def occupancy(self) -> float | None:
        """Observed share of blocks with at least one nonzero value."""
        return self.occupied / self.words if self.words else None
