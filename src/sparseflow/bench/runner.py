"""Runs suites: every case once, saved as soon as it is done, so that a run may be stopped and taken up again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sparseflow.env import environment
from sparseflow.errors import SparseflowError

from . import process, summary
from .records import Absent, Crossover, Layer, Phase, Point, Results
from .suites import Options, Row, load

RESULTS, LOG = "results.json", "cases.log"
_Record = TypeVar("_Record", Layer, Phase, Crossover)


class OtherRunError(SparseflowError):
    """The results in the folder were made by other code, another machine or with other settings."""


class Run:
    """One run of suites into a folder; ``results`` is what it has so far, with what an earlier run left there.

    ``only`` is a part of the names of the cases to run.

    Raises:
        OtherRunError: the folder holds results that these cannot be added to, and ``fresh`` is false.
    """

    def __init__(
        self,
        out: Path,
        options: Options,
        *,
        fresh: bool = False,
        only: str = "",
        console: Console | None = None,
    ):
        self.out, self.options, self.only = out, options, only
        self.console = console if console is not None else summary.console()
        self.failed: list[str] = []
        torch.set_num_threads(options.threads)
        self.results = self._start(fresh)

    @property
    def path(self) -> Path:
        """The results file."""
        return self.out / RESULTS

    def _start(self, fresh: bool) -> Results:
        about = environment() | {"quick": self.options.quick, "repeats": self.options.repeats}
        if fresh or not self.path.exists():
            return Results(about, self.options.seed)
        found = Results.load(self.path)
        changed = different(found, about, self.options.seed)
        if changed:
            raise OtherRunError(
                f"{self.path} is from another run ({', '.join(changed)}). Name another folder with --out, or start "
                "over with --fresh."
            )
        return found

    def run(self, names: Sequence[str]) -> bool:
        """Measure what is not finished of the suites and show it. Whether all gates are green and nothing failed."""
        cases = [(suite, case) for suite in names for case in self._cases(suite)]
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self.out.mkdir(parents=True, exist_ok=True)
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("", total=len(cases))
            done = finished(self.results)
            for suite, case in cases:
                if (suite, case) not in done:
                    progress.update(task, description=f"{suite}: {case}")
                    self._take(suite, case, self.measure(suite, case))
                progress.advance(task)
        self.results.save(self.path)
        for suite in names:
            self.console.print(summary.table(suite, self.results))
        return not self.failed and all(point.gate.green for point in self.results.points)

    def measure(self, suite: str, case: str) -> process.Outcome:
        """Run a case, in a process of its own."""
        return process.measure(suite, case, self.options, self.out / LOG)

    def _cases(self, suite: str) -> list[str]:
        try:
            return [case.name for case in load(suite).run(self.options) if self.only in case.name]
        except ImportError as error:
            add(self.results, suite, "", [Absent(suite, f"{type(error).__name__}: {error}")])
            return []

    def _take(self, suite: str, case: str, outcome: process.Outcome) -> None:
        add(self.results, suite, case, outcome.rows)
        if outcome.failed:
            self.failed.append(f"{suite}: {case}")
        self.results.save(self.path)
        for line in summary.lines(outcome.rows):
            self.console.print(line)


def different(results: Results, about: dict[str, Any], seed: int) -> list[str]:
    """What distinguishes the run that made ``results`` from one of this environment and seed, in words.

    >>> different(Results({"torch": "2.1", "threads": 2}, 0), {"torch": "2.2", "threads": 2}, 0)
    ['torch 2.1, now 2.2']
    """
    before, now = results.environment | {"seed": results.seed}, about | {"seed": seed}
    keys = dict.fromkeys((*before, *now))
    return [f"{key} {before.get(key)}, now {now.get(key)}" for key in keys if before.get(key) != now.get(key)]


def finished(results: Results) -> set[tuple[str, str]]:
    """Suite and case of what need not be measured again: it has points, none of them behind a red gate."""
    red = {(point.suite, point.case) for point in results.points if not point.gate.green}
    return {(point.suite, point.case) for point in results.points} - red


def add(results: Results, suite: str, case: str, rows: Iterable[Row]) -> None:
    """Put the rows of a case in the place of what there was of it."""
    rows = list(rows)
    results.points = [point for point in results.points if (point.suite, point.case) != (suite, case)]
    results.points += [row for row in rows if isinstance(row, Point)]
    results.layers = _replaced(results.layers, [row for row in rows if isinstance(row, Layer)])
    results.phases = _replaced(results.phases, [row for row in rows if isinstance(row, Phase)])
    results.crossovers = _replaced(results.crossovers, [row for row in rows if isinstance(row, Crossover)])
    absent = [row for row in rows if isinstance(row, Absent)]
    gone = {f"{suite}: {case}", *(row.name for row in absent)}
    results.absent = [row for row in results.absent if row.name not in gone] + absent


def _replaced(before: list[_Record], rows: list[_Record]) -> list[_Record]:
    """``before`` without the cases of ``rows``, and ``rows``."""
    cases = {row.case for row in rows}
    return [row for row in before if row.case not in cases] + rows
