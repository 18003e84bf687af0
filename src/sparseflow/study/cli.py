"""``python -m sparseflow study``: train a grid of networks, measure them, and write what came out."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparseflow.errors import SparseflowError

from .records import Choice, Matched, Neuron, Status, Study, Surrogate
from .training import Training

OUT = Path("out/study")
PAGE = "report.html"
_INTERRUPTED = 130
_REPEATS, _QUICK_REPEATS, _QUICK_SAMPLES, _QUICK_EPOCHS = 25, 3, 320, 3
_SWEPT: dict[str, tuple[float, ...]] = {"slopes": (5.0, 50.0), "thresholds": (0.5, 2.0)}


def _member_of(kind: type[enum.StrEnum]) -> Callable[[str], enum.StrEnum]:
    """Reads a name of one, in whatever case, with blanks or hyphens."""

    def parse(text: str) -> enum.StrEnum:
        named = {member.lower(): member for member in kind}
        name = text.lower().replace("-", " ")
        if name not in named:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(kind)}")
        return named[name]

    return parse


def _slope(text: str) -> float | None:
    return None if text == "default" else float(text)


_LISTS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "dataset": ("datasets", str, "digits, digits-events, nmnist, dvs128-gesture, cifar10-dvs"),
    "framework": ("frameworks", str, "snntorch, spikingjelly"),
    "neurons": ("neurons", _member_of(Neuron), ", ".join(Neuron)),
    "surrogates": ("surrogates", _member_of(Surrogate), ", ".join(Surrogate).replace(" ", "-").replace(",-", ", ")),
    "betas": ("betas", float, "decay of the membrane per step"),
    "thresholds": ("thresholds", float, "firing thresholds"),
    "slopes": ("slopes", _slope, "steepness of the surrogates; default is the published one"),
    "matched": ("matched", _member_of(Matched), "what Lapicque neurons share with LIF neurons: beta, time-constant"),
}


class UsageError(SparseflowError):
    """Arguments of which nothing comes."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Those of ``study``. Lists default to ``None``: what they are then depends on ``--quick``."""
    command.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"folder of the study (default: {OUT})")
    grid = command.add_argument_group("networks", "all combinations of these are trained")
    for name, (_, kind, what) in _LISTS.items():
        grid.add_argument(f"--{name}", nargs="+", type=kind, metavar="VALUE", help=what)
    grid.add_argument("--seeds", type=_positive, metavar="N", help="networks of each setting (default: 2, quick 1)")
    command.add_argument("--data", type=Path, metavar="DIR", help="folder that tonic has saved recordings in")
    command.add_argument("--samples", type=_positive, metavar="N", help="train on at most so many samples")
    command.add_argument(
        "--epochs", type=_positive, metavar="N", help=f"at most (default: {Training.epochs}, quick {_QUICK_EPOCHS})"
    )
    prune = "stop trainings that are worse than the median at the same epoch; they are then no part of comparisons"
    command.add_argument("--prune", action="store_true", help=prune)
    command.add_argument("--jobs", type=_positive, metavar="N", help="trainings at a time (default: one a thread)")
    command.add_argument(
        "--repeats", type=_positive, metavar="N", help=f"timed calls (default: {_REPEATS}, quick {_QUICK_REPEATS})"
    )
    command.add_argument("--compile", action="store_true", help="also time torch.compile (minutes a network)")
    command.add_argument("--quick", action="store_true", help="a few networks on few samples, within a minute")
    command.add_argument("--fresh", action="store_true", help="start over instead of taking up the study in the folder")
    command.add_argument("--retry-failed", action="store_true", help="repeat trainings that failed")
    command.add_argument("--page-only", action="store_true", help="only predict, and write tables and page, anew")


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def run(args: argparse.Namespace) -> int:
    """Run or take up a study, or only write its page. Returns 0, 1 where a network failed, 130 where interrupted."""
    from . import page, runner, storage

    path = args.out / storage.STUDY
    if args.page_only:
        study = runner.finish(storage.load(path), args.out)
    else:
        try:
            study = _run(args)
        except KeyboardInterrupt:
            print(
                f"interrupted; {args.out} has what was finished, and the same command goes on from there",
                file=sys.stderr,
            )
            return _INTERRUPTED
    page.write(study, args.out / PAGE)
    print(json.dumps(json.loads(path.read_text()), indent=1) if args.json else _summary(study, args.out))
    return 1 if any(net.status is Status.FAILED for net in study.nets) else 0


def _run(args: argparse.Namespace) -> Study:
    from .runner import Measuring, run_study

    return run_study(
        args.out,
        _choices(args),
        training=_training(args),
        measuring=Measuring(
            repeats=args.repeats or (_QUICK_REPEATS if args.quick else _REPEATS), compiled=args.compile
        ),
        data=args.data,
        samples=args.samples or (_QUICK_SAMPLES if args.quick else None),
        jobs=args.jobs,
        fresh=args.fresh,
        retry_failed=args.retry_failed,
    )


def _training(args: argparse.Namespace) -> Training:
    epochs = args.epochs or (_QUICK_EPOCHS if args.quick else Training.epochs)
    return Training(epochs=epochs, prune=args.prune)


def _choices(args: argparse.Namespace) -> list[Choice]:
    """The grid that was asked for. Slopes and thresholds that were not are swept with LIF neurons and one beta only."""
    from .grid import Grid

    given = {field: tuple(getattr(args, name)) for name, (field, *_) in _LISTS.items() if getattr(args, name)}
    if args.seeds:
        given["seeds"] = args.seeds
    default = _quick_grid() if args.quick else Grid(datasets=("digits", "digits-events"))
    grid = dataclasses.replace(default, **given)
    choices = grid.choices()
    if not choices:
        raise UsageError("; ".join(grid.left_out()))
    for reason, count in grid.left_out().items():
        print(f"left out, {count} networks: {reason}", file=sys.stderr)
    if not args.quick and Neuron.LIF in grid.neurons:
        swept = dataclasses.replace(grid, neurons=(Neuron.LIF,), betas=grid.betas[-1:])
        for field, values in _SWEPT.items():
            if field not in given:
                choices += dataclasses.replace(swept, **{field: values}).choices()
    return list(dict.fromkeys(choices))


def _quick_grid() -> Any:
    from .grid import Grid

    neurons, surrogates = (Neuron.LIF, Neuron.LAPICQUE), (Surrogate.FAST_SIGMOID, Surrogate.SPIKE_RATE_ESCAPE)
    return Grid(neurons=neurons, surrogates=surrogates, betas=(0.9,), seeds=1)


def _summary(study: Study, out: Path) -> str:
    ended = [net.status for net in study.nets]
    counts = ", ".join(f"{ended.count(status)} {status}" for status in dict.fromkeys(ended))
    return f"{len(ended)} networks ({counts}); wrote {out}/study.json, nets.csv, layers.csv and {PAGE}"
