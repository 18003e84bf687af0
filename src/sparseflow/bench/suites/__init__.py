"""The suites of ``python -m sparseflow bench``, and what a suite is.

A suite is a module with one function, ``run(options: Options) -> Iterator[Case]``. It names its cases in the order in
which they are to be measured, and is cheap: it builds no network and imports no framework, since the runner calls it
to list the cases and once more in the process of each of them. ``case.measure()`` does the work and gives rows, each a
:class:`~sparseflow.bench.records.Point`, ``Layer``, ``Phase``, ``Crossover`` or ``Absent``:

- every case gives at least one point, and its points have the suite's name in ``suite`` and its own in ``case``:
  that is how a later run knows that the case is finished;
- the gate comes first. A point whose gate is red has no figure: ``value=None`` and ``gate.why`` filled;
- ``honest`` is true only where the baseline is the strongest dense path of the same precision in this run;
- what cannot be run is an ``Absent`` with its error. An :class:`ImportError` that ``measure`` raises becomes one, with
  ``"SUITE: CASE"`` as its name, so that a suite imports its framework inside ``measure`` and need not look for it.

The runner (:mod:`sparseflow.bench.runner`) measures every case in a process of its own, forked from one that has
imported PyTorch and nothing more: the state of the allocator, of the compiler and of the engine's weight packs is not
that of the case before, a crash loses one case, and the import is paid once. The threads of the options are set there,
and the generator is seeded. All rows of a case are saved together when it is done.

To add a suite, write the module and name it in :data:`SUITES`.

>>> import torch
>>> from sparseflow.bench.records import Gate, Metric, Scope
>>> def measure():
...     yield Point("mine", "copy", "clone", "copies", Scope.EXACT, {"batch": 1}, None, Metric.LATENCY,
...                 (0.9, 1.0, 1.1), "eager", (1.9, 2.0, 2.1), False, Gate(True, "bit-equal"))
>>> def run(options):
...     yield Case("copy", measure)
>>> [row.speedup for case in run(Options()) for row in case.measure()]
[2.0]
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from sparseflow.bench.records import Absent, Crossover, Layer, Phase, Point

Row = Point | Layer | Phase | Crossover | Absent

SUITES = {
    "layers": "sparseflow.bench.suites.layers",
    "models": "sparseflow.bench.suites.models",
    "scaling": "sparseflow.bench.suites.scaling",
    "memory": "sparseflow.bench.suites.memory",
    "startup": "sparseflow.bench.suites.startup",
    "predecessor": "sparseflow.bench.suites.predecessor",
    "pruned": "sparseflow.bench.suites.pruned",
    "peers": "sparseflow.bench.peers",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run was asked for. ``quick`` asks for a few small cases: all suites together end within a minute.

    ``repeats`` are the alternations behind each figure, ``threads`` those of PyTorch and of the engine. ``compile``
    is whether dense baselines are also run under ``torch.compile``, which takes minutes a network.
    """

    quick: bool = False
    repeats: int = 25
    threads: int = 1
    seed: int = 0
    compile: bool = True


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to measure; ``measure`` gives its rows and may raise :class:`ImportError`, see above."""

    name: str
    measure: Callable[[], Iterable[Row]]


class Suite(Protocol):
    """A module of this protocol."""

    def run(self, options: Options) -> Iterator[Case]:
        """The cases, in order."""
        ...


def load(name: str) -> Suite:
    """The suite of that name.

    Raises:
        KeyError: there is no such suite.
        ImportError: it needs something that is not installed.
    """
    module: Suite = importlib.import_module(SUITES[name])  # pyright: ignore[reportAssignmentType]
    return module
