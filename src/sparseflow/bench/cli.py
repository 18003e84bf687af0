"""``python -m sparseflow bench`` without a model: the suites, and the comparison of two commits."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from sparseflow.errors import SparseflowError

from . import commits, page
from .runner import RESULTS, Run
from .suites import SUITES, Options

OUT = Path("out/bench")
PAGE = "report.html"
_REPEATS, _QUICK_REPEATS = 25, 3
_NOT_QUICK = "peers"  # installs other libraries in environments of their own
_INTERRUPTED = 130
_OF_SUITES = ("out", "suite", "quick", "fresh", "only", "no_compile", "seed", "compare", "peers_env")
_OF_MODELS = ("device", "backend")


class UsageError(SparseflowError):
    """Arguments that do not go together."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Those of the suites. Their defaults are ``None``, so that :func:`check` can see which were given."""
    group = command.add_argument_group("suites", "without a model; all but peers with --quick")
    group.add_argument("--suite", action="append", choices=list(SUITES), metavar="NAME", help=", ".join(SUITES))
    group.add_argument("--quick", action="store_true", default=None, help="a few small cases, within a minute")
    group.add_argument("--out", type=Path, metavar="DIR", help=f"folder of {RESULTS} and {PAGE} (default: {OUT})")
    group.add_argument("--only", metavar="TEXT", help="only the cases with this in their names")
    group.add_argument("--fresh", action="store_true", default=None, help="start over instead of taking up the run")
    no_compile = "leave torch.compile out (minutes a network); no model then has its strongest baseline"
    group.add_argument("--no-compile", action="store_true", default=None, help=no_compile)
    peers_env = "folder for the environments of peers (default: below the user's cache)"
    group.add_argument("--peers-env", type=Path, metavar="DIR", help=peers_env)
    group.add_argument("--seed", type=int, help="of the generators (default: 0)")
    compare = "run quick cases of another commit and of this one in alternation, and print the ratios of their times"
    group.add_argument("--compare", metavar="BASE", help=compare)


def check(args: argparse.Namespace) -> None:
    """Refuse options that would do nothing.

    Raises:
        UsageError: options of the suites with a model, or of a model without one.
    """
    if args.spec is not None and (given := _given(args, _OF_SUITES)):
        raise UsageError(f"{', '.join(given)} is for the suites, which run without a model")
    if args.spec is None and (given := _given(args, _OF_MODELS)):
        raise UsageError(f"{', '.join(given)} is for a model (FILE.py:function); the suites run on the CPU")
    if args.compare is not None and (given := _given(args, ("out", "fresh", "no_compile", "quick"))):
        raise UsageError(f"{', '.join(given)} does nothing with --compare, which runs quick cases and prints ratios")


def _given(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]


def run(args: argparse.Namespace) -> int:
    """Run suites or the comparison. Returns 0, 1 where a gate is red or a case failed, 130 where it was interrupted."""
    options = _options(args)
    if args.peers_env is not None:
        os.environ["SPARSEFLOW_PEERS_DIR"] = str(args.peers_env.resolve())  # cases run in processes that inherit it
    if args.compare is not None:
        return commits.compare(args.compare, options, suites=args.suite, only=args.only or "", as_json=args.json)
    run = Run(args.out or OUT, options, fresh=bool(args.fresh), only=args.only or "")
    names = args.suite or [name for name in SUITES if not (options.quick and name == _NOT_QUICK)]
    try:
        green = run.run(names)
    except KeyboardInterrupt:
        run.console.print(f"interrupted; {run.path} has what was finished, and the same command goes on from there")
        return _INTERRUPTED
    if args.json:
        print(json.dumps(json.loads(run.path.read_text()), indent=1))
    run.console.print(f"wrote {run.path} and {page.write(run.results, run.out / PAGE)}")
    return 0 if green else 1


def _options(args: argparse.Namespace) -> Options:
    return Options(
        quick=bool(args.quick),
        repeats=args.repeats or (_QUICK_REPEATS if args.quick else _REPEATS),
        threads=args.threads or torch.get_num_threads(),
        seed=args.seed or 0,
        compile=not args.no_compile,
    )
