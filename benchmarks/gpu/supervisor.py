"""Keep the benchmark going: a kernel that crashes or hangs takes its process with it, not the rest of the lease."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence

from .records import Journal
from .runner import Budget

_POLL_S = 0.5
_MOST_RESTARTS = 12
_GRACE_S = 15.0


def supervise(
    command: Sequence[str],
    journal: Journal,
    budget: Budget,
    run: str,
    start: Callable[[Sequence[str]], subprocess.Popen[bytes]] = subprocess.Popen,
) -> int:
    """Run ``command`` (a worker; ``--budget-s`` is appended) until it ends by itself; returns how often it started.

    The worker skips what was attempted before in the run called ``run``, so that a cell that killed one worker does
    not meet the next.
    """
    for attempt in range(1, _MOST_RESTARTS + 1):
        process = start([*command, "--budget-s", f"{max(budget.left, 0.0):.0f}"])
        code = _wait(process, journal, budget, run)
        cell = in_flight(journal, run)
        if cell is not None:
            journal.write("failed", cell, error=f"the worker ended with exit code {code} in this cell")
        if code == 0 or budget.left <= 0:
            return attempt
    return _MOST_RESTARTS


def _wait(process: subprocess.Popen[bytes], journal: Journal, budget: Budget, run: str) -> int:
    """Exit code of the worker, which is killed when a cell outlasts its limit or the whole budget."""
    since, before = time.monotonic(), None
    while (code := process.poll()) is None:
        time.sleep(_POLL_S)
        cell = in_flight(journal, run)
        if cell != before:
            since, before = time.monotonic(), cell
        hung = cell is not None and time.monotonic() - since > limit_of(journal, cell, run)
        if hung or budget.left < -_GRACE_S:
            process.kill()
            process.wait()
            return -9
    return code


def in_flight(journal: Journal, run: str) -> str | None:
    """The cell that was started last in this run and has not come to an end."""
    started = None
    for event in journal.events():
        if event["event"] == "started" and event["run"] == run:
            started = event["cell"]
        elif event["cell"] == started:
            started = None
    return started


def limit_of(journal: Journal, cell: str, run: str) -> float:
    """Seconds the cell may take, as the worker wrote it."""
    return max(
        e["limit_s"] for e in journal.events() if e["event"] == "started" and e["cell"] == cell and e["run"] == run
    )
