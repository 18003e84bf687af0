"""The tests that need a GPU, as the first thing a figure has to be read with."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

from .records import Figure, Skipped
from .runner import Cell

_ROOT = pathlib.Path(__file__).parents[2]
_COMMAND = (sys.executable, "-m", "pytest", "-m", "gpu", "tests", "-q", "--no-header", "-p", "no:cacheprovider")
_SECONDS = 75.0


def outcomes(summary: str) -> dict[str, int]:
    """Counts in the last line of pytest's output.

    >>> outcomes("..F\\n1 failed, 12 passed, 300 deselected in 4.20s")
    {'failed': 1, 'passed': 12, 'deselected': 300}
    """
    lines = [line for line in summary.splitlines() if re.search(r" in [\d.]+s", line)]
    found = re.findall(r"(\d+) (passed|failed|errors?|skipped|deselected|xfailed)", lines[-1]) if lines else []
    return {name: int(count) for count, name in found}


def run(command: tuple[str, ...] = _COMMAND, seconds: float = _SECONDS) -> Iterator[Figure | Skipped]:
    """Run the tests in a process of their own, and not in Triton's interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    try:
        done = subprocess.run(
            command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        yield Skipped("tests", "pytest -m gpu", f"did not end within {seconds:.0f} s")
        return
    found = outcomes(done.stdout)
    tail = "\n".join(line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR")))[-1500:]
    for name in ("passed", "failed", "errors", "skipped"):
        yield Figure("tests", name, found.get(name, 0), "tests", tail if name == "failed" else "")
    if not found:
        yield Skipped("tests", "pytest -m gpu", f"no summary, exit code {done.returncode}: {done.stderr[-500:]}")


def cells() -> Iterator[Cell]:
    """The suite as one cell."""
    yield Cell("tests: pytest -m gpu", 0, _SECONDS / 2, run)
