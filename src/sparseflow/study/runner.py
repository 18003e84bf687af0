"""A whole study: data, trainings in parallel, then measurements one at a time; saved as it goes, and taken up again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from sparseflow.bench.summary import console as standard_console
from sparseflow.env import environment
from sparseflow.errors import SparseflowError

from . import datasets, measurement, nets, storage
from .datasets import DataSet
from .grid import JOURNAL, LOG, WEIGHTS, Outcome, train_all, weights_of
from .predict import predict_latency
from .predictor import LOOP
from .records import Choice, Net, Status, Study
from .training import Training

_DATA = "data"


class OtherStudyError(SparseflowError):
    """The study in the folder was made with other settings or on another machine, or is running now."""


@dataclasses.dataclass(frozen=True)
class Measuring:
    """How trained networks are timed; see :func:`sparseflow.study.measurement.latency`."""

    repeats: int = 25
    batch: int = 1
    compiled: bool = False


def run_study(
    out: str | Path,
    choices: Sequence[Choice],
    *,
    training: Training | None = None,
    measuring: Measuring | None = None,
    data: str | Path | None = None,
    samples: int | None = None,
    jobs: int | None = None,
    fresh: bool = False,
    retry_failed: bool = False,
    console: Console | None = None,
) -> Study:
    """Train and measure networks; ``out`` holds the study, and a study that was interrupted goes on where it was.

    Trainings run in processes of their own. A script that calls this needs the usual guard,
    ``if __name__ == "__main__":``.

    Args:
        out: folder for ``study.json``, the two CSV tables, the weights and Optuna's journal. Networks of earlier runs
            with the same settings stay in the study.
        choices: what to train, for example ``Grid().choices()``.
        training, measuring: settings; default: those of the classes.
        data: folder with recordings that tonic has saved.
        samples: at most so many to train on, and half as many each for validation and test.
        jobs: trainings at a time; default: one for every thread of PyTorch.
        fresh: forget the study in ``out`` and start over.
        retry_failed: repeat the trainings that failed in an earlier run.
        console: for progress; default: the standard error output.

    Returns:
        The study: networks whose training was pruned are measured like the others, those that failed have an error.

    Raises:
        OtherStudyError: ``out`` holds a study of other settings or of another machine, or one that is running.
        DataError: a data set cannot be had.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    console = console or standard_console()
    training, measuring = training or Training(), measuring or Measuring()
    settings = {"training": vars(training), "measuring": vars(measuring), "samples": samples}
    with _alone(out):
        if fresh:
            _forget(out)
        study = _start(out, settings)
        files = {name: _prepared(name, out, data, samples) for name in dict.fromkeys(c.dataset for c in choices)}
        study = _with_descriptions(study, files)
        trained = train_all(
            choices,
            files,
            out,
            training,
            jobs=jobs or torch.get_num_threads(),
            retry_failed=retry_failed,
            console=console,
        )
        study = _measured(study, trained, _measurer(files, out, training, measuring), out, console)
        return finish(study, out)


def finish(study: Study, out: Path) -> Study:
    """Predict latencies from what was counted, write ``study.json`` and the tables, and return what was written."""
    study = dataclasses.replace(study, nets=tuple(map(_predicted, study.nets)))
    storage.save(study, out / storage.STUDY)
    storage.save_tables(study, out)
    return study


def _predicted(net: Net) -> Net:
    if not net.layers:
        return net
    shapes = [layer.shape for layer in net.layers]
    densities = {layer.shape.name: layer.density for layer in net.layers[1:]}  # the first layer's input is no neuron's
    calls = net.steps if net.dense == LOOP else 1
    found = predict_latency(shapes, densities, steps=net.steps, batch=net.batch, calls=calls)
    times = [layer.accelerated_ms for layer in found.layers]
    layers = (dataclasses.replace(layer, predicted_ms=ms) for layer, ms in zip(net.layers, times, strict=True))
    return dataclasses.replace(net, predicted=found.totals, layers=tuple(layers))


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    lock = FileLock(out / "study.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OtherStudyError(f"a study is running in {out}; name another folder") from None
    try:
        yield
    finally:
        lock.release()


def _forget(out: Path) -> None:
    for folder in (_DATA, WEIGHTS):
        shutil.rmtree(out / folder, ignore_errors=True)
    for file in (storage.STUDY, JOURNAL, LOG):
        (out / file).unlink(missing_ok=True)


def _start(out: Path, settings: dict[str, Any]) -> Study:
    """The study in the folder, or a new one."""
    about = environment() | {name: version(name) for name in ("optuna", "scikit-learn")}
    path = out / storage.STUDY
    if not path.exists():
        study = Study(about, (), settings)
        storage.save(study, path)
        return study
    study = storage.load(path)
    changed = _different(study.settings, settings) + _different(study.environment, about)
    if changed:
        raise OtherStudyError(
            f"{path} is from another study ({', '.join(changed)}). Name another folder with --out, or start over with "
            "--fresh."
        )
    return study


def _different(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What has another value now, in words. A commit need not change a network; a user who knows better starts over."""
    keys = [key for key in now if key != "commit" and before.get(key) != now[key]]
    return [f"{key} {before.get(key)}, now {now[key]}" for key in keys]


def _prepared(name: str, out: Path, folder: str | Path | None, samples: int | None) -> Path:
    """The file with a data set, which all trainings read."""
    path = out / _DATA / f"{name}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = datasets.load(name, folder=None if folder is None else Path(folder), limit=samples)
        unfinished = path.with_suffix(".part")
        found.save(unfinished)
        os.replace(unfinished, path)
    return path


def _with_descriptions(study: Study, files: dict[str, Path]) -> Study:
    """The study, saying of its data how they were made."""
    described = {name: DataSet.load(path).description for name, path in files.items()}
    return dataclasses.replace(study, settings=study.settings | {"data": study.settings.get("data", {}) | described})


def _measured(
    study: Study, trained: dict[Choice, Outcome], measure: Callable[[Choice, Outcome], Net], out: Path, console: Console
) -> Study:
    """The study with all that was trained; saved after every network."""
    known = {net.choice: net for net in study.nets}
    todo = [choice for choice, outcome in trained.items() if not _is_measured(known.get(choice), outcome)]
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as progress:
        for choice in progress.track(todo, description="measuring"):
            known[choice] = measure(choice, trained[choice])
            if known[choice].error:
                console.print(f"{choice.name}: {known[choice].error}", markup=False)
            study = dataclasses.replace(study, nets=tuple(known.values()))
            storage.save(study, out / storage.STUDY)
    return study


def _is_measured(net: Net | None, outcome: Outcome) -> bool:
    return net is not None and net.status is outcome.status and net.accuracy is not None


def _measurer(
    files: dict[str, Path], out: Path, training: Training, measuring: Measuring
) -> Callable[[Choice, Outcome], Net]:
    """What makes the record of a network. An error while measuring one is in its record, and does not end the study."""
    load = functools.cache(DataSet.load)

    def measure(choice: Choice, outcome: Outcome) -> Net:
        try:
            return _measure(choice, outcome, load(files[choice.dataset]), out, training, measuring)
        except Exception as error:
            return Net(choice, outcome.status, epochs=outcome.epochs, error=f"{type(error).__name__}: {error}")

    return measure


def _measure(
    choice: Choice, outcome: Outcome, data: DataSet, out: Path, training: Training, measuring: Measuring
) -> Net:
    if outcome.status is Status.FAILED:
        return Net(choice, Status.FAILED, epochs=outcome.epochs, error=outcome.error)
    make = functools.partial(_network, choice, data, out, training)
    seen = measurement.activity(make(), data.test)
    timed = measurement.latency(make, data, **dataclasses.asdict(measuring))
    return Net(
        choice,
        outcome.status,
        accuracy=seen.accuracy,
        epochs=outcome.epochs,
        steps=data.steps,
        batch=measuring.batch,
        spikes=seen.spikes,
        layers=seen.layers,
        latency=timed.ms,
        cycles=seen.cycles,
        error=timed.error,
        dense=timed.dense,
    )


def _network(choice: Choice, data: DataSet, out: Path, training: Training) -> nn.Module:
    network = nets.build(choice, data.shape, data.classes, training.width)
    network.load_state_dict(torch.load(weights_of(choice, out), weights_only=True))
    return network.eval()
