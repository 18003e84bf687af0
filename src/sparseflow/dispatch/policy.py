"""The choice between dense and sparse, with hysteresis, and how often a layer looks again."""

from __future__ import annotations

import math

from sparseflow.plan import Crossover

HYSTERESIS = 0.05
_PROBE_SHARE = 0.01
_MAX_INTERVAL = 256


class BackOff:
    """Which calls look again: the next one, then after ``interval`` calls, then after twice as many each time."""

    def __init__(self, interval: int):
        self.interval = interval
        self._wait = self._countdown = 0

    def due(self) -> bool:
        """Count a call; whether it is one that looks."""
        if self._countdown == 0:
            return True
        self._countdown -= 1
        return False

    def back_off(self) -> None:
        """A call looked, and nothing has changed so far: the next look is twice as far away."""
        self._wait = min(_MAX_INTERVAL, max(self.interval, 2 * self._wait))
        self._countdown = self._wait - 1

    def reset(self) -> None:
        """Something changed: the next call looks."""
        self._wait = self._countdown = 0


def probe_interval(crossover: Crossover) -> int:
    """Calls between two looks at a layer that runs dense, so that looking costs at most 1 % of the dense time."""
    if crossover.dense_ms <= 0.0:
        return _MAX_INTERVAL
    return max(1, min(_MAX_INTERVAL, math.ceil(crossover.prescan_ms / (_PROBE_SHARE * crossover.dense_ms))))


class Policy:
    """Chooses between dense and one kernel for one layer shape.

    While dense is ahead, the prescan itself would be the cost; a :class:`BackOff` says which calls look.
    """

    def __init__(self, crossover: Crossover):
        self.crossover = crossover
        self.sparse = crossover.density > 0.0
        self._looks = BackOff(probe_interval(crossover))

    @property
    def never(self) -> bool:
        """Sparse loses at every load that was measured."""
        return self.crossover.density <= 0.0

    def skip_scan(self) -> bool:
        """Whether this call goes straight to dense."""
        return self.never or not (self.sparse or self._looks.due())

    def decide(self, load: float) -> bool:
        """Whether sparse runs, given the load (on the crossover's axis) of its input; remembers the answer."""
        self.sparse = load <= self._limit() and not self.never
        if self.sparse:
            self._looks.reset()
        else:
            self._looks.back_off()
        return self.sparse

    def most(self, numel: int) -> int:
        """How many of ``numel`` values may be nonzero for sparse to go on running; -1 while dense runs."""
        return math.floor(self._limit() * numel) if self.sparse and not self.never else -1

    def _limit(self) -> float:
        return min(1.0, self.crossover.density * (1 + HYSTERESIS if self.sparse else 1 - HYSTERESIS))

    def relative_time(self, load: float) -> float:
        """Predicted sparse time at ``load`` as a share of the dense time; 0 where nothing was measured."""
        crossover = self.crossover
        return crossover.sparse_ms_at(load) / crossover.dense_ms if crossover.dense_ms else 0.0

    def gain_ms(self, load: float) -> float:
        """Predicted milliseconds that sparse saves at ``load``."""
        return self.crossover.dense_ms - self.crossover.sparse_ms_at(load)
