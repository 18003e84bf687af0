"""Cells, the time they may take, and the order in which they run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence

from .records import Journal, Row, to_json


@dataclasses.dataclass(frozen=True)
class Cell:
    """One thing to measure: its name, how it matters (0 first), about what it takes in seconds, and how."""

    name: str
    priority: int
    seconds: float
    run: Callable[[], Iterable[Row]]


class Budget:
    """Seconds left of a total, by ``clock`` (seconds that only grow)."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.clock, self.ends = clock, clock() + seconds

    @property
    def left(self) -> float:
        """Seconds left; negative when overdrawn."""
        return self.ends - self.clock()


def ordered(cells: Sequence[Cell]) -> list[Cell]:
    """The most important first; among equals, as given."""
    return sorted(cells, key=lambda cell: cell.priority)


def run_cells(
    cells: Sequence[Cell], journal: Journal, budget: Budget, run: str, say: Callable[[str], None] = print
) -> bool:
    """Run what is not done yet and fits the budget; returns whether the device is still usable.

    A cell that fails is recorded with its error and does not stop the others, unless the error has left the device
    in a state in which nothing works: then the caller has to go on in another process.
    """
    skip = journal.done() | journal.attempted(run)
    for cell in ordered(cells):
        if cell.name in skip:
            continue
        if budget.left < cell.seconds:
            say(f"no time left for {cell.name} ({cell.seconds:.0f} s)")
            continue
        journal.write("started", cell.name, run=run, limit_s=limit(cell))
        began = budget.clock()
        try:
            rows = [to_json(row) for row in cell.run()]
        except Exception as error:  # whatever it is, the other cells matter
            journal.write("failed", cell.name, error=f"{type(error).__name__}: {error}"[:2000])
            say(f"FAILED {cell.name}: {type(error).__name__}: {str(error)[:300]}")
            if is_fatal(error):
                return False
            continue
        seconds = budget.clock() - began
        journal.write("finished", cell.name, rows=rows, seconds=round(seconds, 2))
        say(f"{cell.name}: {len(rows)} rows in {seconds:.1f} s, {budget.left:.0f} s left")
    return True


def limit(cell: Cell) -> float:
    """Seconds after which a cell is taken for hung."""
    return 30.0 + 4.0 * cell.seconds


def is_fatal(error: BaseException) -> bool:
    """Whether an error leaves the CUDA context unusable; running out of memory does not."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return False
    signs = (
        "illegal memory access",
        "unspecified launch failure",
        "device-side assert",
        "misaligned address",
        "CUDA error",
    )
    return any(sign in text for sign in signs)
