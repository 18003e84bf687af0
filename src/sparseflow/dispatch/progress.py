"""Keeps first-use measurement inside its budget and shows a progress bar when it takes long."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
import time
from collections.abc import Iterator

from sparseflow.config import MeasureBudget

logger = logging.getLogger("sparseflow")
_active: contextvars.ContextVar[MeasureProgress | None] = contextvars.ContextVar("measuring", default=None)


class CompileBudget:
    """Seconds that compiling kernels may take, and has taken."""

    def __init__(self, limit_s: float):
        self.limit_s, self.spent_s = limit_s, 0.0

    @property
    def spent(self) -> bool:
        """Whether to compile no more than is needed."""
        return self.spent_s >= self.limit_s

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        """Count the time inside."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.spent_s += time.perf_counter() - started


class MeasureProgress:
    """Counts measured layers of one model and what they took."""

    def __init__(self, total: int, budget: MeasureBudget):
        self.total, self.budget = total, budget
        self.compiling = CompileBudget(budget.compile_s)
        self.done, self.spent_ms = 0, 0.0
        self.disturbed: dict[str, None] = {}
        self._bar = None

    def layer_budget(self) -> MeasureBudget:
        """The budget of the next layer: a fifth once the model's share is spent."""
        if self.spent_ms < self.budget.model_ms:
            return self.budget
        return dataclasses.replace(self.budget, layer_ms=self.budget.layer_ms / 5)

    def advance(self, elapsed_ms: float) -> None:
        """Count one measured layer; ``elapsed_ms`` without the time for compiling."""
        self.done += 1
        self.spent_ms += elapsed_ms
        predicted = (self.spent_ms + self.compiling.spent_s * 1e3) / self.done * self.total
        if self._bar is None and predicted > self.budget.model_ms:
            self._bar = _start_bar(self.total)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done)

    def close(self) -> None:
        """Take the progress bar down, and say once what could not be measured properly."""
        if self._bar is not None:
            self._bar.stop()
        if self.disturbed:
            _warn_disturbed(f"{len(self.disturbed)} layers (first: {next(iter(self.disturbed))})")


def note_disturbed(layer: str) -> None:
    """Record that other work on the machine disturbed the measurement of ``layer``."""
    progress = _active.get()
    if progress is None:
        _warn_disturbed(layer)
    else:
        progress.disturbed[layer] = None


def _warn_disturbed(what: str) -> None:
    logger.warning(
        "%s: measured while other work took the processors away. The choice between dense and sparse may be wrong and "
        "is kept for this process only; accelerate again on a quiet machine, or use fewer threads.",
        what,
    )


def _start_bar(total: int):
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    bar.add_task("sparseflow: measuring layers", total=total)
    bar.start()
    return bar


@contextlib.contextmanager
def measuring(total: int, budget: MeasureBudget) -> Iterator[None]:
    """Measurements inside belong to one model of ``total`` layers."""
    progress = MeasureProgress(total, budget)
    token = _active.set(progress)
    try:
        yield
    finally:
        _active.reset(token)
        progress.close()


@contextlib.contextmanager
def layer_budget(default: MeasureBudget) -> Iterator[MeasureBudget]:
    """The budget of the measurement inside, whose time is counted."""
    progress = _active.get()
    if progress is None:
        yield default
        return
    started, compiled_s = time.perf_counter(), progress.compiling.spent_s
    yield progress.layer_budget()
    measured_s = time.perf_counter() - started - (progress.compiling.spent_s - compiled_s)
    progress.advance(measured_s * 1e3)


def compile_budget(default: MeasureBudget) -> CompileBudget:
    """The budget of the model that is being measured, or a new one for a layer on its own."""
    progress = _active.get()
    return CompileBudget(default.compile_s) if progress is None else progress.compiling
