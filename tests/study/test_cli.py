"""``python -m sparseflow study``: files, what is refused, going on, and the same from Python."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest
import torch
from rich.console import Console

pytest.importorskip("snntorch")

from sparseflow import cli
from sparseflow.study import Grid, Training, grid, measurement, run_study, runner, storage
from sparseflow.study import cli as study_cli
from sparseflow.study.records import Matched, Neuron, Status, Surrogate

SMALL = ["--samples", "40", "--epochs", "1", "--jobs", "2", "--repeats", "2"]
TWO = ["--dataset", "digits", "--neurons", "IF", "Lapicque", "--surrogates", "arctan", "--betas", "0.9", "--seeds", "1"]
TWO += ["--matched", "time-constant"]


@pytest.fixture(autouse=True)
def threads_kept():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def predicted(monkeypatch):
    """A predictor of 1 ms a layer, so that these tests do not follow the fitted one."""

    def predict_latency(shapes, densities, *, steps, batch, calls):
        assert set(densities) == {"conv2", "fc"}
        layers = [types.SimpleNamespace(accelerated_ms=1.0) for _ in shapes]
        return types.SimpleNamespace(
            totals={"dense": 2.0 * len(layers), "accelerated": 1.0 * len(layers)}, layers=layers
        )

    monkeypatch.setattr(runner, "predict_latency", predict_latency)


@pytest.fixture(autouse=True)
def pages(monkeypatch):
    """Page writing is tested elsewhere: here only that it is asked for."""
    from sparseflow.study import page

    written = []
    monkeypatch.setattr(page, "write", lambda study, path: written.append((study, path)))
    return written


def study(out, *more):
    return cli.main(["study", "--out", str(out), *SMALL, *TWO, *more])


def parsed(*arguments):
    return cli._parser().parse_args(["study", *arguments])


def test_writes_study_tables_and_page(tmp_path, capsys, pages):
    assert study(tmp_path) == 0
    found = storage.load(tmp_path / "study.json")
    assert [net.choice.neuron for net in found.nets] == [Neuron.IF, Neuron.LAPICQUE]
    for net in found.nets:
        assert net.status is Status.COMPLETE
        assert (net.epochs, net.steps, net.batch) == (1, 10, 1)
        assert 0 <= net.accuracy <= 1
        assert net.cycles == pytest.approx(sum(layer.cycles for layer in net.layers))
        assert {"dense", "accelerated", measurement.LOOP} <= set(net.latency)
        assert net.latency["dense"] == net.latency[net.dense]
        assert net.predicted == {"dense": 6.0, "accelerated": 3.0}
        assert [layer.predicted_ms for layer in net.layers] == [1.0] * 3
    assert found.nets[1].choice.matched is Matched.TIME_CONSTANT
    assert found.settings["training"]["epochs"] == 1
    assert "rate coded" in found.settings["data"]["digits"]
    assert (tmp_path / "nets.csv").read_text().count("\n") == 3
    assert (tmp_path / "layers.csv").read_text().count("\n") == 7
    assert pages == [(found, tmp_path / "report.html")]
    assert "2 networks (2 complete)" in capsys.readouterr().out


def test_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    measured, measure = [], measurement.latency

    def interrupted(*args, **options):
        measured.append(args)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(*args, **options)

    monkeypatch.setattr(measurement, "latency", interrupted)
    assert study(tmp_path) == 130
    assert "goes on from there" in capsys.readouterr().err
    assert len(storage.load(tmp_path / "study.json").nets) == 1
    first = (tmp_path / "study.json").read_text()
    assert study(tmp_path) == 0
    assert len(measured) == 3
    assert len(storage.load(tmp_path / "study.json").nets) == 2
    assert storage.load(tmp_path / "study.json").nets[0].latency == json_nets(first)[0]["latency"]
    trials = grid._study("digits", tmp_path, Training()).get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 2


def json_nets(text):
    nets = json.loads(text)["nets"]
    for net in nets:
        net["latency"] = {path: tuple(quantiles) for path, quantiles in net["latency"].items()}
    return nets


def test_an_error_while_measuring_is_in_the_record_and_tried_again(tmp_path, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no clock")

    with monkeypatch.context() as patch:
        patch.setattr(measurement, "latency", broken)
        study(tmp_path, "--neurons", "IF")
    (found,) = storage.load(tmp_path / "study.json").nets
    assert (found.status, found.error) == (Status.COMPLETE, "RuntimeError: no clock")
    study(tmp_path, "--neurons", "IF")
    (found,) = storage.load(tmp_path / "study.json").nets
    assert (found.status, found.error) == (Status.COMPLETE, "")


def test_a_failed_training_is_exit_code_1_and_stays_in_the_study(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(grid, "_child", failing_child)
        assert study(tmp_path) == 1
        assert study(tmp_path) == 1
    found = storage.load(tmp_path / "study.json")
    assert [net.status for net in found.nets] == [Status.FAILED] * 2
    assert {net.error for net in found.nets} == {"RuntimeError: out of memory"}
    capsys.readouterr()
    assert study(tmp_path, "--retry-failed", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "study.json").read_text())


def failing_child(connection, job):
    connection.send(grid.Outcome(Status.FAILED, error="RuntimeError: out of memory"))


def test_other_settings_need_another_folder(tmp_path, capsys):
    storage.save(
        runner.Study(runner.environment(), (), {"training": {}, "measuring": {}, "samples": 7}), tmp_path / "study.json"
    )
    assert study(tmp_path) == 2
    message = capsys.readouterr().err
    assert "is from another study" in message
    assert "samples 7, now 40" in message
    assert "--fresh" in message


def test_fresh_starts_over(tmp_path, monkeypatch):
    storage.save(runner.Study({}, (), {"training": {}}), tmp_path / "study.json")
    (tmp_path / "mine.txt").write_text("kept")
    monkeypatch.setattr(grid, "_child", failing_child)
    assert study(tmp_path, "--fresh") == 1
    assert len(storage.load(tmp_path / "study.json").nets) == 2
    assert (tmp_path / "mine.txt").exists()


def test_two_at_once_in_a_folder_are_refused(tmp_path):
    with runner._alone(tmp_path), pytest.raises(runner.OtherStudyError, match="a study is running"):
        run_study(tmp_path, Grid().choices())


def test_page_only_trains_nothing(tmp_path, monkeypatch, pages):
    monkeypatch.setattr(grid, "_child", failing_child)
    study(tmp_path)
    monkeypatch.setattr(study_cli, "_run", None)
    assert cli.main(["study", "--out", str(tmp_path), "--page-only"]) == 1
    assert len(pages) == 2
    assert (tmp_path / "nets.csv").exists()


def test_page_only_without_a_study(tmp_path, capsys):
    assert cli.main(["study", "--out", str(tmp_path), "--page-only"]) == 2
    assert "study.json" in capsys.readouterr().err


def test_lists_make_the_grid():
    arguments = ["--neurons", "plif", "--surrogates", "spike-rate-escape", "ARCTAN", "--betas", "0.3", "0.7"]
    choices = study_cli._choices(parsed(*arguments, "--thresholds", "2", "--slopes", "default", "9", "--seeds", "3"))
    assert len(choices) == 2 * 2 * 2 * 2 * 3  # surrogates, betas, slopes, data sets, seeds
    assert {choice.slope for choice in choices} == {None, 9.0}
    assert {choice.surrogate for choice in choices} == {Surrogate.SPIKE_RATE_ESCAPE, Surrogate.ARCTAN}
    assert {choice.neuron for choice in choices} == {Neuron.PLIF}


def test_default_grid_sweeps_slopes_and_thresholds_of_lif_alone():
    choices = study_cli._choices(parsed())
    assert len(set(choices)) == len(choices)
    assert {choice.dataset for choice in choices} == {"digits", "digits-events"}
    swept = [choice for choice in choices if choice.slope is not None or choice.threshold != 1.0]
    assert {choice.neuron for choice in swept} == {Neuron.LIF}
    assert {choice.threshold for choice in swept} == {0.5, 1.0, 2.0}
    assert not any(choice.slope is not None and choice.threshold != 1.0 for choice in swept)


def test_quick_is_small():
    args = parsed("--quick")
    choices = study_cli._choices(args)
    assert len(choices) <= 8
    assert {choice.neuron for choice in choices} >= {Neuron.LIF, Neuron.LAPICQUE}
    assert study_cli._training(args).epochs < Training().epochs


def test_what_a_framework_lacks_is_said(capsys):
    arguments = [
        "--framework",
        "spikingjelly",
        "--neurons",
        "LIF",
        "Lapicque",
        "--surrogates",
        "arctan",
        "--seeds",
        "1",
    ]
    assert {choice.neuron for choice in study_cli._choices(parsed(*arguments))} == {Neuron.LIF}
    assert "SpikingJelly has no Lapicque neuron" in capsys.readouterr().err
    with pytest.raises(study_cli.UsageError, match="SpikingJelly has no Lapicque"):
        study_cli._choices(parsed(*arguments[:3], "Lapicque"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--neurons", "Izhikevich"], "'Izhikevich' is none of LIF, Lapicque, IF, PLIF"),
        (["--surrogates", "relu"], "none of fast sigmoid"),
        (["--seeds", "0"], "0 is not positive"),
    ],
)
def test_unknown_values_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parsed(*arguments)
    assert message in capsys.readouterr().err


def test_unknown_data_set_is_one_line(tmp_path, capsys):
    assert cli.main(["study", "--out", str(tmp_path), "--dataset", "mnist", "--seeds", "1"]) == 2
    assert (
        capsys.readouterr().err.strip().endswith("there are digits, digits-events, nmnist, dvs128-gesture, cifar10-dvs")
    )


def test_from_python(tmp_path):
    choices = Grid(neurons=(Neuron.PLIF,), surrogates=(Surrogate.ARCTAN,), betas=(0.9,), seeds=1).choices()
    training = Training(epochs=1, width=4)
    measuring = runner.Measuring(repeats=2, batch=2)
    options = {"training": training, "measuring": measuring, "samples": 40, "console": Console(quiet=True)}
    found = run_study(tmp_path, choices, **options)
    assert [net.choice for net in found.nets] == choices
    assert found.nets[0].batch == 2
    assert run_study(tmp_path, choices, **options) == found


def test_importing_it_imports_neither_optuna_nor_frameworks():
    code = "import sys, sparseflow.cli, sparseflow.study; print([n for n in ('optuna', 'sklearn', 'snntorch', "
    code += "'spikingjelly', 'numpy.testing') if n in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
