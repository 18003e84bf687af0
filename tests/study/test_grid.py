"""The grid and its trainings: what is in it, going on after a kill, pruning, failures, crashes."""

from __future__ import annotations

import dataclasses
import os
import time

import optuna
import pytest
import torch
from rich.console import Console

pytest.importorskip("snntorch")

from sparseflow.study import datasets, grid
from sparseflow.study import training as training_module
from sparseflow.study.grid import Grid, Outcome, train_all, weights_of
from sparseflow.study.records import Choice, Matched, Neuron, Status, Surrogate
from sparseflow.study.training import DivergedError, Training, train

CHOICE = Choice("digits", "snntorch", Neuron.LIF, Surrogate.ARCTAN, 0.9, 1.0, None, Matched.BETA, 0)
TRAINING = Training(epochs=1, batch=32, width=4)


@pytest.fixture(autouse=True)
def threads_kept():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits", steps=4, limit=64)


@pytest.fixture
def files(digits, tmp_path):
    digits.save(tmp_path / "digits.pt")
    return {"digits": tmp_path / "digits.pt"}


def seeds(count, **values):
    return [dataclasses.replace(CHOICE, seed=seed, **values) for seed in range(count)]


def trained(choices, files, out, training=TRAINING, **options):
    options = {"jobs": 2, "console": Console(quiet=True)} | options
    return train_all(choices, files, out, training, **options)


def trials(out, dataset="digits"):
    return grid._study(dataset, out, TRAINING).get_trials()


class TestGrid:
    def test_all_combinations_with_the_first_seed_first(self):
        names = [
            (choice.surrogate, choice.beta, choice.seed)
            for choice in Grid(
                neurons=(Neuron.LIF,), surrogates=(Surrogate.ARCTAN, Surrogate.SIGMOID), betas=(0.5, 0.9), seeds=2
            ).choices()
        ]
        settings = [(surrogate, beta) for surrogate in (Surrogate.ARCTAN, Surrogate.SIGMOID) for beta in (0.5, 0.9)]
        assert names == [(*setting, seed) for seed in (0, 1) for setting in settings]

    def test_what_changes_nothing_is_not_repeated(self):
        options = {"surrogates": (Surrogate.STOCHASTIC, Surrogate.ARCTAN), "slopes": (None, 5.0), "seeds": 1}
        choices = Grid(neurons=(Neuron.IF,), **options).choices()
        assert [(c.surrogate, c.slope, c.beta, c.matched) for c in choices] == [
            (Surrogate.STOCHASTIC, None, 1.0, Matched.BETA),
            (Surrogate.ARCTAN, None, 1.0, Matched.BETA),
            (Surrogate.ARCTAN, 5.0, 1.0, Matched.BETA),
        ]

    def test_lapicque_alone_is_matched_in_both_ways(self):
        choices = Grid(surrogates=(Surrogate.ARCTAN,), betas=(0.9,), seeds=1).choices()
        assert {(c.neuron, c.matched) for c in choices} == {
            (Neuron.LIF, Matched.BETA),
            (Neuron.LAPICQUE, Matched.BETA),
            (Neuron.LAPICQUE, Matched.TIME_CONSTANT),
            (Neuron.IF, Matched.BETA),
            (Neuron.PLIF, Matched.BETA),
        }

    def test_what_a_framework_lacks_is_left_out_and_said(self):
        found = Grid(frameworks=("spikingjelly",), betas=(0.9,), seeds=1)
        assert {(c.neuron, c.surrogate) for c in found.choices()} == {
            (neuron, surrogate)
            for neuron in (Neuron.LIF, Neuron.IF, Neuron.PLIF)
            for surrogate in (Surrogate.ARCTAN, Surrogate.SIGMOID)
        }
        assert sum(found.left_out().values()) == 5 * 2 + 3 * 3
        assert "SpikingJelly has no Lapicque neuron; use snntorch" in found.left_out()

    def test_names_of_files_are_unique(self, tmp_path):
        choices = Grid(slopes=(None, 5.0), thresholds=(0.5, 1.0)).choices()
        assert len({weights_of(choice, tmp_path) for choice in choices}) == len(choices)


class TestTraining:
    def test_loss_falls_and_the_best_epoch_is_kept(self, digits):
        seen = []
        found = train(
            CHOICE, digits, Training(epochs=4, batch=16, width=8), lambda *report: seen.append(report) or False
        )
        assert [epoch for epoch, _ in seen] == list(range(found.epochs))
        assert found.validation == max(accuracy for _, accuracy in seen) > 0.2
        assert not found.pruned
        assert not found.network.training

    def test_same_seed_same_weights(self, digits):
        first, second, other = (
            train(choice, digits, TRAINING, lambda *_: False).network.state_dict()
            for choice in (CHOICE, CHOICE, dataclasses.replace(CHOICE, seed=1))
        )
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not torch.equal(first["fc.weight"], other["fc.weight"])

    def test_stops_when_it_is_told_to(self, digits):
        found = train(CHOICE, digits, dataclasses.replace(TRAINING, epochs=5), lambda epoch, _: epoch == 1)
        assert (found.pruned, found.epochs) == (True, 2)

    def test_stops_without_progress(self, digits):
        still = dataclasses.replace(TRAINING, epochs=9, patience=2, rate=0.0)
        assert train(CHOICE, digits, still, lambda *_: False).epochs == 3

    def test_test_part_is_not_looked_at(self, digits):
        unusable = dataclasses.replace(digits, test=datasets.Split(torch.empty(0), torch.empty(0)))
        assert train(CHOICE, unusable, TRAINING, lambda *_: False).epochs == 1

    def test_divergence_is_an_error(self, digits, monkeypatch):
        monkeypatch.setattr(training_module, "_train_epoch", lambda *_: float("nan"))
        with pytest.raises(DivergedError, match="the loss was nan in epoch 1"):
            train(CHOICE, digits, TRAINING, lambda *_: False)


class TestTrainings:
    def test_two_networks_in_processes_of_their_own(self, files, tmp_path):
        found = trained(seeds(2), files, tmp_path)
        assert [outcome.status for outcome in found.values()] == [Status.COMPLETE] * 2
        for choice, outcome in found.items():
            assert outcome.epochs == 1
            assert 0 <= outcome.validation <= 1
            assert weights_of(choice, tmp_path).exists()

    def test_the_process_gives_what_training_here_gives(self, digits, files, tmp_path):
        outcome = trained([CHOICE], files, tmp_path)[CHOICE]
        torch.set_num_threads(1)
        here = train(CHOICE, digits, TRAINING, lambda *_: False)
        assert here.validation == outcome.validation
        weights = torch.load(weights_of(CHOICE, tmp_path), weights_only=True)
        assert all(torch.allclose(weights[name], value) for name, value in here.network.state_dict().items())

    def test_goes_on_after_a_kill(self, files, tmp_path, monkeypatch):
        """Killed after the first of three, before what became of the second was written down."""
        choices, tell = seeds(3), grid._tell
        told = []

        def tell_one_and_die(trial, outcome):
            if told:
                raise KeyboardInterrupt
            told.append(trial)
            tell(trial, outcome)

        with monkeypatch.context() as patch:
            patch.setattr(grid, "_child", quick_child)
            patch.setattr(grid, "_tell", tell_one_and_die)
            with pytest.raises(KeyboardInterrupt):
                trained(choices, files, tmp_path, jobs=1)
            before = [trial.state.name for trial in trials(tmp_path)]
            assert before == ["COMPLETE", "RUNNING"]
            patch.setattr(grid, "_tell", tell)
            found = trained(choices, files, tmp_path)
        assert [outcome.status for outcome in found.values()] == [Status.COMPLETE] * 3
        assert [trial.state.name for trial in trials(tmp_path)] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
        assert trained(choices, files, tmp_path) == found
        assert len(trials(tmp_path)) == 4, "what is finished is not trained again"

    def test_a_grid_can_grow(self, files, tmp_path, monkeypatch):
        monkeypatch.setattr(grid, "_child", quick_child)
        trained(seeds(2), files, tmp_path)
        assert set(trained(seeds(3), files, tmp_path)) == set(seeds(3))
        assert len(trials(tmp_path)) == 3

    def test_choices_read_back_from_the_journal(self, files, tmp_path, monkeypatch):
        monkeypatch.setattr(grid, "_child", quick_child)
        choices = [CHOICE, dataclasses.replace(CHOICE, slope=3.7, threshold=0.1 + 0.2, neuron=Neuron.PLIF, beta=1 / 3)]
        trained(choices, files, tmp_path)
        assert set(grid._ended(grid._study("digits", tmp_path, TRAINING))) == set(choices)

    def test_failure_is_recorded_with_its_error_and_kept(self, files, tmp_path):
        broken = dataclasses.replace(CHOICE, beta=0.0)
        found = trained([broken, CHOICE], files, tmp_path)
        assert found[CHOICE].status is Status.COMPLETE
        assert found[broken].status is Status.FAILED
        assert "ChoiceError: beta of a LIF neuron must be between 0 and 1" in found[broken].error
        assert "ChoiceError" in (tmp_path / grid.LOG).read_text()
        assert trained([broken, CHOICE], files, tmp_path) == found
        assert len(trials(tmp_path)) == 2
        trained([broken], files, tmp_path, retry_failed=True)
        assert len(trials(tmp_path)) == 3

    def test_a_crash_costs_one_training(self, files, tmp_path, monkeypatch):
        monkeypatch.setattr(grid, "_child", crash_on_odd_seeds)
        found = trained(seeds(3), files, tmp_path)
        assert [outcome.status for outcome in found.values()] == [Status.COMPLETE, Status.FAILED, Status.COMPLETE]
        assert "exit code 7" in found[seeds(2)[1]].error

    def test_worse_than_the_median_is_pruned(self, files, tmp_path, monkeypatch):
        monkeypatch.setattr(grid, "_child", scripted_child)
        training = Training(epochs=4, prune=True)
        choices = [dataclasses.replace(choice, threshold=9.0) for choice in seeds(8)] + seeds(1, threshold=1.0)
        found = trained(choices, files, tmp_path, training, jobs=1)
        assert [found[choice].status for choice in choices] == [Status.COMPLETE] * 8 + [Status.PRUNED]
        assert found[choices[-1]].epochs == 3, "the first half of the epochs is left to it"
        assert trials(tmp_path)[-1].state is optuna.trial.TrialState.PRUNED

    def test_pruning_is_a_choice(self, files, tmp_path, monkeypatch):
        monkeypatch.setattr(grid, "_child", scripted_child)
        choices = [dataclasses.replace(choice, threshold=9.0) for choice in seeds(8)] + seeds(1, threshold=1.0)
        found = trained(choices, files, tmp_path, Training(epochs=4, prune=False))
        assert {outcome.status for outcome in found.values()} == {Status.COMPLETE}

    def test_a_training_ends_with_its_study(self, files, tmp_path, monkeypatch):
        """Its study is gone while it trains: the pipe is closed, and it does not go on."""
        monkeypatch.setattr(grid, "_child", slow_child)
        running = grid._Running(grid._Job(CHOICE, files["digits"], tmp_path, TRAINING, 1), trial=None)
        assert running.connection.poll(30)
        running.connection.close()
        running.process.join(20)
        assert running.process.exitcode not in (None, 0)


# ---- stand-ins for a training, run in its process


def quick_child(connection, job):
    connection.send(Outcome(Status.COMPLETE, 1, 0.5))


def crash_on_odd_seeds(connection, job):
    if job.choice.seed % 2:
        os._exit(7)
    quick_child(connection, job)


def scripted_child(connection, job):
    """An accuracy of a tenth of the threshold after every epoch."""
    for epoch in range(job.training.epochs):
        connection.send((epoch, job.choice.threshold / 10))
        if connection.recv():
            connection.send(Outcome(Status.PRUNED, epoch + 1, job.choice.threshold / 10))
            return
    connection.send(Outcome(Status.COMPLETE, job.training.epochs, job.choice.threshold / 10))


def slow_child(connection, job):
    for epoch in range(1000):
        connection.send((epoch, 0.5))
        if epoch:
            connection.recv()
        time.sleep(0.01)
