"""The worker's side of the protocol: one JSON request a line on stdin, one JSON reply a line on the real stdout.

The programs of this folder run with the Python of a peer's environment, by path: they import nothing of sparseflow but
where sparseflow is what they measure, and a peer only inside the function that needs it. Requests:

``{"op": "prepare", "problem": {...}, "packages": [...]}``
    Build and compile; gives ``{"versions": {package: version}, "note": what was chosen}``.
``{"op": "load", "inputs": [file, ...]}``
    Take other spikes, and choose and warm up with them; gives ``{"note": ...}``.
``{"op": "check", "input": i, "out": file}``
    The results for one input, as raw float32; gives ``{"shape": [...], "ms": wall time}``.
``{"op": "time", "calls": n, "warm": bool}``
    Calls on the inputs in turn, after one that does not count if ``warm``; gives ``{"ms": [...]}``.

An exception is the reply ``{"error": "Type: message"}``. Tensors travel as files of raw little-endian values, so that
neither side needs the other's library.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Contender(Protocol):
    """One peer on one problem."""

    note: str

    def load(self, files: Sequence[str]) -> None:
        """Take these inputs, ready for calls in the library's own memory."""
        ...

    def call(self, index: int) -> Any:
        """The results for one input; everything has been computed when it returns."""
        ...

    def save(self, output: Any, file: str) -> list[int]:
        """Write results as raw float32, and give their shape."""
        ...


Build = Callable[[str, dict[str, Any]], Contender]


class Session:
    """Answers requests with one contender, which ``prepare`` makes.

    >>> class Halver:
    ...     note = ""
    ...     def load(self, files): self.inputs = [float(file) for file in files]
    ...     def call(self, index): return self.inputs[index] / 2
    ...     def save(self, output, file): return [1]
    >>> session = Session(lambda variant, problem: Halver(), "half")
    >>> session.answer({"op": "prepare", "problem": {}, "packages": []})
    {'versions': {}, 'note': ''}
    >>> session.answer({"op": "load", "inputs": ["1", "2"]})
    {'note': ''}
    >>> len(session.answer({"op": "time", "calls": 3, "warm": True})["ms"])
    3
    """

    def __init__(self, build: Build, variant: str):
        self.build, self.variant = build, variant
        self.contender: Any = None
        self.count = self.turn = 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request. Raises what the library raises."""
        return getattr(self, f"_{request.pop('op')}")(**request)

    def _prepare(self, problem: dict[str, Any], packages: list[str]) -> dict[str, Any]:
        if problem.get("processors") and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, problem["processors"])  # some thread pools obey nothing else
        self.contender = self.build(self.variant, problem)
        return {"versions": versions(packages), "note": self.contender.note}

    def _load(self, inputs: list[str]) -> dict[str, Any]:
        self.contender.load(inputs)
        self.count = len(inputs)
        return {"note": self.contender.note}

    def _check(self, input: int, out: str) -> dict[str, Any]:
        ms, output = self._timed(input)
        return {"shape": self.contender.save(output, out), "ms": ms}

    def _time(self, calls: int, warm: bool) -> dict[str, Any]:
        if warm:
            self._timed(self._next())
        return {"ms": [self._timed(self._next())[0] for _ in range(calls)]}

    def _next(self) -> int:
        self.turn = (self.turn + 1) % self.count
        return self.turn

    def _timed(self, index: int) -> tuple[float, Any]:
        start = time.perf_counter_ns()
        output = self.contender.call(index)
        return (time.perf_counter_ns() - start) / 1e6, output


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions; a package that is not there is left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def serve(build: Build) -> None:
    """Answer until stdin ends. The variant to build is the program's first argument."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not land among the replies
    session = Session(build, sys.argv[1])
    for line in sys.stdin:
        try:
            reply = session.answer(json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)
