"""The per-call choice between dense and sparse, with hysteresis, and how often a dense layer looks again."""

from __future__ import annotations

import math

from sparseflow.plan import Crossover

_HYSTERESIS = 0.05
_PROBE_SHARE = 0.01
_MAX_INTERVAL = 256


class Policy:
    """Chooses for one layer shape.

    While dense is ahead, the prescan itself would be the cost. It then waits ``interval`` calls, so that looking costs
    at most 1 % of the dense time, and twice as many after every look that changed nothing.
    """

    def __init__(self, crossover: Crossover):
        self.crossover = crossover
        self.sparse = crossover.density > 0.0
        self.interval = self._interval(crossover)
        self._wait = self._countdown = 0

    @staticmethod
    def _interval(crossover: Crossover) -> int:
        if crossover.dense_ms <= 0.0:
            return _MAX_INTERVAL
        return max(1, min(_MAX_INTERVAL, math.ceil(crossover.prescan_ms / (_PROBE_SHARE * crossover.dense_ms))))

    @property
    def never(self) -> bool:
        """Sparse loses at every density that was measured."""
        return self.crossover.density <= 0.0

    def skip_scan(self) -> bool:
        """Whether this call goes straight to dense."""
        if self.never:
            return True
        if self.sparse or self._countdown == 0:
            return False
        self._countdown -= 1
        return True

    def decide(self, density: float) -> bool:
        """Whether sparse runs, given the density the prescan found; remembers the answer."""
        limit = self.crossover.density * (1 + _HYSTERESIS if self.sparse else 1 - _HYSTERESIS)
        self.sparse = density <= min(limit, 1.0)
        self._wait = 0 if self.sparse else min(_MAX_INTERVAL, max(self.interval, 2 * self._wait))
        self._countdown = max(0, self._wait - 1)
        return self.sparse
