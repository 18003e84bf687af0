"""The trainings of a study: which ones there are, and running them in processes of their own, resumably.

Optuna keeps the trainings (one of its studies per data set, in a journal file), prunes them, and knows after a restart
which are finished. A process that ends in whatever way costs its training only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Generator, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import nets
from .datasets import DataSet
from .records import Choice, Matched, Neuron, Status, Surrogate
from .training import Training, train

JOURNAL, LOG, WEIGHTS = "optuna.log", "trainings.log", "weights"
_STARTUP_TRIALS = 8  # finished ones of a data set before any is pruned
_PRELOADED = ["sparseflow.study.grid", "snntorch", "spikingjelly.activation_based.layer"]


@dataclasses.dataclass(frozen=True)
class Grid:
    """All combinations of these values.

    What changes nothing is left out: IF neurons have beta 1, only Lapicque neurons tell ``matched`` apart (a LIF neuron
    stands for both), and the stochastic spike operator has no slope. ``None`` among the slopes is the published one.

    >>> grid = Grid(neurons=(Neuron.IF,), surrogates=(Surrogate.ARCTAN,), seeds=1)
    >>> [choice.name for choice in grid.choices()]
    ['digits/snntorch/IF/arctan/beta 1.0/threshold 1.0/slope default/equal beta/seed 0']
    """

    datasets: tuple[str, ...] = ("digits",)
    frameworks: tuple[str, ...] = ("snntorch",)
    neurons: tuple[Neuron, ...] = tuple(Neuron)
    surrogates: tuple[Surrogate, ...] = tuple(Surrogate)
    betas: tuple[float, ...] = (0.5, 0.9)
    thresholds: tuple[float, ...] = (1.0,)
    slopes: tuple[float | None, ...] = (None,)
    matched: tuple[Matched, ...] = tuple(Matched)
    seeds: int = 2

    def choices(self) -> list[Choice]:
        """Those there is a network for, all settings with one seed before any with the next."""
        return [choice for choice in self._combinations() if nets.unsupported(choice) is None]

    def left_out(self) -> dict[str, int]:
        """Why there is no network for the others, and for how many of them."""
        reasons = [reason for choice in self._combinations() if (reason := nets.unsupported(choice))]
        return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}

    def _combinations(self) -> list[Choice]:
        fields: tuple[Any, ...] = (
            self.frameworks,
            self.neurons,
            self.surrogates,
            self.betas,
            self.thresholds,
            self.slopes,
        )
        product: Any = itertools.product(range(self.seeds), self.datasets, *fields, self.matched)
        return list(dict.fromkeys(_canonical(Choice(*values, seed=seed)) for seed, *values in product))


def _canonical(choice: Choice) -> Choice:
    if choice.neuron is Neuron.IF:
        choice = dataclasses.replace(choice, beta=1.0)
    if choice.neuron is not Neuron.LAPICQUE:
        choice = dataclasses.replace(choice, matched=Matched.BETA)
    if choice.surrogate is Surrogate.STOCHASTIC:
        choice = dataclasses.replace(choice, slope=None)
    return choice


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a training ended. ``validation`` is the accuracy of the best epoch; ``error`` says why it failed."""

    status: Status
    epochs: int = 0
    validation: float | None = None
    error: str = ""


def weights_of(choice: Choice, out: Path) -> Path:
    """The file with the trained weights (a state dictionary)."""
    return out / WEIGHTS / f"{choice.name.replace('/', '_').replace(' ', '-')}.pt"


# ---- what Optuna keeps


def _study(dataset: str, out: Path, training: Training) -> optuna.Study:
    """Trainings are compared, and pruned, within a data set. The first half of the epochs is left to each."""
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(out / JOURNAL)))
    pruner = optuna.pruners.MedianPruner(n_startup_trials=_STARTUP_TRIALS, n_warmup_steps=training.epochs // 2)
    return optuna.create_study(
        study_name=dataset,
        storage=storage,
        sampler=optuna.samplers.RandomSampler(),  # never asked: every trial is enqueued with all its parameters
        pruner=pruner if training.prune else optuna.pruners.NopPruner(),
        direction="maximize",
        load_if_exists=True,
    )


def _trial(study: optuna.Study, choice: Choice) -> optuna.Trial:
    """A new trial, with everything that was chosen as its parameters."""
    parameters = dataclasses.asdict(choice)
    del parameters["dataset"]
    given = {name: value for name, value in parameters.items() if value is not None}
    study.enqueue_trial(given)
    return study.ask({name: _DISTRIBUTIONS[name] for name in given})


# Wide enough for any grid: all trials of an Optuna study have to agree on them.
_DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "framework": CategoricalDistribution(nets.FRAMEWORKS),
    "neuron": CategoricalDistribution([neuron.value for neuron in Neuron]),
    "surrogate": CategoricalDistribution([surrogate.value for surrogate in Surrogate]),
    "beta": FloatDistribution(0, 1),
    "threshold": FloatDistribution(0, 1e6),
    "slope": FloatDistribution(0, 1e6),
    "matched": CategoricalDistribution([matched.value for matched in Matched]),
    "seed": IntDistribution(0, 2**31 - 1),
}
_KINDS = {"neuron": Neuron, "surrogate": Surrogate, "matched": Matched}
_STATES = {TrialState.COMPLETE: Status.COMPLETE, TrialState.PRUNED: Status.PRUNED, TrialState.FAIL: Status.FAILED}


def _tell(trial: optuna.Trial, outcome: Outcome) -> None:
    for name in ("epochs", "validation", "error"):
        trial.set_user_attr(name, getattr(outcome, name))
    if outcome.status is Status.COMPLETE:
        trial.study.tell(trial, outcome.validation)
    else:
        trial.study.tell(trial, state=TrialState.PRUNED if outcome.status is Status.PRUNED else TrialState.FAIL)


def _ended(study: optuna.Study) -> dict[Choice, Outcome]:
    """How trainings ended; of one that was repeated, the last time.

    As nothing runs when a study is taken up, what Optuna believes to be running or waiting was interrupted. For Optuna
    it has failed, but without an error, and it is not among what has ended.
    """
    while study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.tell(study.ask(), state=TrialState.FAIL)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    found: dict[Choice, Outcome] = {}
    for trial in study.get_trials(deepcopy=False):
        about = trial.user_attrs
        if trial.state is not TrialState.FAIL or about.get("error"):
            chosen = {name: _KINDS[name](value) if name in _KINDS else value for name, value in trial.params.items()}
            choice = Choice(**({"dataset": study.study_name, "slope": None} | chosen))
            found[choice] = Outcome(_STATES[trial.state], **about)
    return found


# ---- running them


@dataclasses.dataclass(frozen=True)
class _Job:
    """What the process of a training is told."""

    choice: Choice
    data: Path
    out: Path
    training: Training
    threads: int


class _Running:
    """The process of a training, and a pipe: it sends the accuracy after every epoch and is told whether to stop."""

    def __init__(self, job: _Job, trial: optuna.Trial):
        context = _context()
        self.choice, self.trial = job.choice, trial
        self.connection, other_end = context.Pipe()
        self.process: BaseProcess = context.Process(target=_child, args=(other_end, job))
        self.process.start()
        other_end.close()

    def hear(self) -> Outcome | None:
        """Take what it has sent; the outcome if that was the last."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return Outcome(Status.FAILED, error=f"its process ended with exit code {self.process.exitcode}; see {LOG}")
        if isinstance(message, Outcome):
            return message
        epoch, validation = message
        self.trial.report(validation, epoch)
        with contextlib.suppress(ConnectionError):  # it is no more, which the next call hears
            self.connection.send(self.trial.should_prune())
        return None

    def end(self) -> None:
        """End it if it has not ended."""
        self.process.terminate()
        self.process.join()
        self.connection.close()


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)  # names that cannot be imported are left out
    return context


def train_all(
    choices: Sequence[Choice],
    data: dict[str, Path],
    out: Path,
    training: Training,
    *,
    jobs: int,
    retry_failed: bool = False,
    console: Console,
) -> dict[Choice, Outcome]:
    """Train what has not been trained yet, ``jobs`` at a time, and return how all ``choices`` ended.

    Args:
        choices: what to train.
        data: files of :meth:`DataSet.save` by name.
        out: folder of the journal and the weights.
        training: settings.
        jobs: processes. Each gets an equal share of the threads.
        retry_failed: also repeat trainings that failed before.
        console: for the progress bar, and a line for every training that fails.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    (out / WEIGHTS).mkdir(parents=True, exist_ok=True)
    studies = {dataset: _study(dataset, out, training) for dataset in dict.fromkeys(c.dataset for c in choices)}
    ended = {choice: outcome for study in studies.values() for choice, outcome in _ended(study).items()}
    again = {choice for choice, outcome in ended.items() if retry_failed and outcome.status is Status.FAILED}
    pending = [choice for choice in choices if choice not in ended or choice in again]
    threads = max(1, torch.get_num_threads() // jobs)
    trials = (
        (_Job(choice, data[choice.dataset], out, training, threads), _trial(studies[choice.dataset], choice))
        for choice in pending
    )
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as progress,
        contextlib.closing(_in_turn(trials, jobs)) as finished,
    ):
        task = progress.add_task("training", total=len(choices), completed=len(choices) - len(pending))
        for running, outcome in finished:
            _tell(running.trial, outcome)
            progress.update(task, advance=1, description=running.choice.name)
            if outcome.status is Status.FAILED:
                console.print(f"failed: {running.choice.name}: {outcome.error}", markup=False)
            ended[running.choice] = outcome
    return {choice: ended[choice] for choice in choices}


def _in_turn(trials: Iterator[tuple[_Job, optuna.Trial]], at_once: int) -> Generator[tuple[_Running, Outcome]]:
    """Start so many at a time, and give each when it is done; however this ends, none is left running."""
    running: list[_Running] = []
    try:
        while True:
            running += [_Running(*trial) for trial in itertools.islice(trials, at_once - len(running))]
            if not running:
                return
            ready = wait([one.connection for one in running])
            for one in [one for one in running if one.connection in ready]:
                if (outcome := one.hear()) is not None:
                    one.end()
                    running.remove(one)
                    yield one, outcome
    finally:
        for one in running:
            one.end()


# ---- in the process of a training


def _child(connection: Connection, job: _Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the study, which then ends its trainings
    torch.set_num_threads(job.threads)
    warnings.simplefilter("ignore")  # of the frameworks, about their own future
    with (
        (job.out / LOG).open("a", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        connection.send(_trained(connection, job))


def _trained(connection: Connection, job: _Job) -> Outcome:
    """Train, and keep the weights. A study that is no more closes the pipe, and so ends its trainings."""

    def stop(epoch: int, validation: float) -> bool:
        connection.send((epoch, validation))
        return connection.recv()

    try:
        trained = train(job.choice, DataSet.load(job.data), job.training, stop)
        _save(trained.network.state_dict(), weights_of(job.choice, job.out))
        status = Status.PRUNED if trained.pruned else Status.COMPLETE
        return Outcome(status, trained.epochs, trained.validation)
    except Exception as error:
        print(job.choice.name, file=sys.stderr)
        traceback.print_exc()
        return Outcome(Status.FAILED, error=f"{type(error).__name__}: {error}")


def _save(weights: dict[str, Any], path: Path) -> None:
    unfinished = path.with_suffix(".part")
    torch.save(weights, unfinished)
    os.replace(unfinished, path)
