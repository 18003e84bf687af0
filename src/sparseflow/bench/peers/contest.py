"""One case: all peers in processes of their own, checked against float64, then timed in turns.

A peer that cannot be installed, fails, dies or takes too long is an ``Absent`` with its error, and the rest goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import sparseflow
from sparseflow.bench.compare import quantiles
from sparseflow.bench.records import Absent, Gate, Metric, Point, Quantiles
from sparseflow.bench.suites import Row

from .catalogue import PROGRAMS, Peer
from .environments import InstallError, python_of
from .problems import Problem, Reference, read_raw, spikes, write_raw
from .remote import PeerError, Worker

_UNCHECKED = Gate(False, "not checked yet")
_INPUTS = 4
_LARGE = 1 << 24  # elements of an input, above which two are kept instead of four
_LONG_MS = 50.0  # calls beyond this find the caches as cold after a call of their own as after another's
_CALLS = 3
_BUDGET_S = 60.0  # of one density's timed turns, after the fewest
_FEWEST = 3
_SETTLE_S = 0.02  # in which the threads of the worker before stop spinning
_LIMIT_S = {"prepare": 300.0, "load": 600.0, "check": 300.0, "time": 600.0}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a case is measured; ``install`` says whether environments may be made."""

    repeats: int = 25
    threads: int = 1
    seed: int = 0
    compile: bool = True
    install: bool = True


@dataclasses.dataclass
class Entrant:
    """A peer that runs: its process, and what is known of it at the present density."""

    peer: Peer
    worker: Worker
    versions: dict[str, str]
    note: str = ""
    gate: Gate = _UNCHECKED
    call_ms: float = 0.0
    ms: list[float] = dataclasses.field(default_factory=list)

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """The reply to a request, its note kept."""
        reply = self.worker.request(op, limit_s=_LIMIT_S[op], **fields)
        self.note = reply.get("note") or self.note
        return reply

    @property
    def value(self) -> Quantiles | None:
        """Its times; nothing behind a red gate."""
        return quantiles(self.ms) if self.ms and self.gate.green else None


Launch = Callable[[Peer, Settings], Worker]


def launch(peer: Peer, settings: Settings) -> Worker:
    """The peer's process, its thread pools of the size that is asked for.

    Raises:
        InstallError: it has no environment.
    """
    python = python_of(peer.group, install=settings.install)
    source = str(Path(sparseflow.__file__).parents[1])
    environment = {**_threads(settings.threads), **dict(peer.environment)}
    if peer.group.on_torch:
        environment["PYTHONPATH"] = source
    return Worker([str(python), str(PROGRAMS / peer.program), peer.variant], environment)


def _threads(count: int) -> dict[str, str]:
    pools = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "NUMBA")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen={str(count > 1).lower()}"
    sizes = {f"{pool}_NUM_THREADS": str(count) for pool in pools}
    return sizes | {"XLA_FLAGS": flags.strip(), "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def _processors(count: int) -> list[int]:
    """The first ``count`` that this process may use; none where the system does not say."""
    return sorted(os.sched_getaffinity(0))[:count] if hasattr(os, "sched_getaffinity") else []


def measure(problem: Problem, peers: Sequence[Peer], settings: Settings, launch: Launch = launch) -> Iterator[Row]:
    """All rows of a case.

    Args:
        problem: with its densities, each of which gives a point per peer and one of ours against each.
        peers: of the problem's kind and device; those that compile only take part where ``settings`` say so.
        settings: threads, repeats.
        launch: starts a peer's process.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        entrants: list[Entrant] = []
        for peer in peers:
            if settings.compile or not peer.compiles:
                yield from _enter(entrants, peer, settings, launch, stack)
        files = _Files(problem, settings, Path(folder))
        yield from _leavers(entrants, lambda entrant: _prepare(entrant, files))
        for density in problem.densities:
            reference = files.renew(density)
            yield from _leavers(entrants, lambda entrant, oracle=reference: _check(entrant, files, oracle))
            yield from _take_turns(entrants, settings)
            yield from points(problem, density, reference.densities, entrants)


def _enter(
    entrants: list[Entrant], peer: Peer, settings: Settings, launch: Launch, stack: contextlib.ExitStack
) -> Iterator[Row]:
    try:
        entrants.append(Entrant(peer, stack.enter_context(launch(peer, settings)), {}))
    except (InstallError, OSError) as error:
        yield Absent(peer.name, str(error))


class _Files:
    """What the workers read: weights, and inputs that change with the density."""

    def __init__(self, problem: Problem, settings: Settings, folder: Path):
        self._problem, self._seed, self._folder = problem, settings.seed, folder
        self._weight = problem.weight(torch.Generator().manual_seed(settings.seed))
        self.output, self.inputs = folder / "output", list[str]()
        self.description = {
            "x": problem.x,
            "w": problem.w,
            "weight": write_raw(self._weight, folder / "weight"),
            "threads": settings.threads,
            "processors": _processors(settings.threads),
            "device": problem.device,
        }

    def renew(self, density: float) -> Reference:
        """Draw other inputs, and give the reference for the first of them."""
        generator = torch.Generator().manual_seed(self._seed + round(density * 1e6))
        count = 2 if torch.Size(self._problem.x).numel() > _LARGE else _INPUTS
        inputs = [spikes(self._problem, density, generator) for _ in range(count)]
        self.inputs = [write_raw(x, self._folder / f"input{index}") for index, x in enumerate(inputs)]
        return self._problem.reference(inputs[0], self._weight)


def _prepare(entrant: Entrant, files: _Files) -> None:
    packages = [*entrant.peer.group.packages, *(["sparseflow"] if entrant.peer.ours else [])]
    entrant.versions = entrant.ask("prepare", problem=files.description, packages=packages)["versions"]


def _check(entrant: Entrant, files: _Files, reference: Reference) -> None:
    entrant.gate, entrant.ms = _UNCHECKED, []
    entrant.ask("load", inputs=files.inputs)
    files.output.unlink(missing_ok=True)
    reply = entrant.ask("check", input=0, out=str(files.output))
    entrant.gate = reference.judge(read_raw(files.output, reply["shape"]), entrant.peer.precision)
    entrant.call_ms = reply["ms"]


def _leavers(entrants: list[Entrant], step: Callable[[Entrant], None]) -> Iterator[Absent]:
    """Do a step with every entrant; those that fail leave."""
    for entrant in list(entrants):
        try:
            step(entrant)
        except PeerError as error:
            entrants.remove(entrant)
            yield Absent(entrant.peer.name, str(error))


def _take_turns(entrants: list[Entrant], settings: Settings) -> Iterator[Absent]:
    """Time those with a green gate A B A B, in another order every round, within the budget; each keeps its times."""
    order = [entrant for entrant in entrants if entrant.gate.green]
    shuffle, start = random.Random(settings.seed).shuffle, time.perf_counter()
    for turn in range(settings.repeats):
        if turn >= _FEWEST and time.perf_counter() - start > _BUDGET_S:
            break
        shuffle(order)
        for absent in _leavers(order, _turn):
            entrants[:] = [entrant for entrant in entrants if entrant.peer.name != absent.name]
            yield absent


def _turn(entrant: Entrant) -> None:
    time.sleep(_SETTLE_S)
    short = entrant.call_ms < _LONG_MS
    entrant.ms += entrant.ask("time", calls=_CALLS if short else 1, warm=short)["ms"]


def points(
    problem: Problem, density: float, densities: dict[str, float], entrants: Iterable[Entrant]
) -> Iterator[Point]:
    """Each entrant against the strongest dense path of its precision; ours against every peer of it as well.

    That path is an honest baseline only if compiled dense paths took part.
    """
    entrants = list(entrants)
    for precision in sorted({entrant.peer.precision for entrant in entrants}):
        equals = [entrant for entrant in entrants if entrant.peer.precision == precision]
        strongest = strongest_dense(equals)
        honest = any(entrant.peer.dense and entrant.peer.compiles and entrant.value for entrant in equals)
        for entrant in equals:
            yield _point(problem, density, densities, entrant, strongest, honest)
        ours = [entrant for entrant in equals if entrant.peer.ours]
        others = [entrant for entrant in equals if not entrant.peer.ours and entrant is not strongest]
        for entrant, other in itertools.product(ours, others):
            yield _point(problem, density, densities, entrant, other, False)


def strongest_dense(entrants: Iterable[Entrant]) -> Entrant | None:
    """The dense path with the least median, of those whose gate is green."""
    fit = [entrant for entrant in entrants if entrant.peer.dense and entrant.value is not None]
    return min(fit, key=lambda entrant: statistics.median(entrant.ms), default=None)


def _point(
    problem: Problem,
    density: float,
    densities: dict[str, float],
    entrant: Entrant,
    baseline: Entrant | None,
    honest: bool,
) -> Point:
    peer = entrant.peer
    return Point(
        "peers",
        problem.name,
        peer.name,
        peer.family,
        peer.scope,
        problem.config | {"versions": _text(entrant.versions), "how": entrant.note},
        density,
        Metric.LATENCY,
        entrant.value,
        "none" if baseline is None else baseline.peer.name,
        None if baseline is None else baseline.value,
        honest,
        entrant.gate,
        peer.precision,
        problem.device,
        densities=densities,
    )


def _text(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())
