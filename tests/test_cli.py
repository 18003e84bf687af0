"""The command line: output, exit codes, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch

from sparseflow import cli
from sparseflow.bench.synthetic import NOTE, MultiStepLIF, synthetic_network
from sparseflow.report import BenchResult

USER_MODEL = """
    import torch
    import sparseflow

    class Threshold(torch.nn.Module):
        def forward(self, v):
            return (v >= 1.0).to(v.dtype)

    def build():
        sparseflow.register_neuron(Threshold, overwrite=True)
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(16, 64), Threshold(), torch.nn.Linear(64, 8)).eval()
        return net, torch.randn(4, 16)

    def broken():
        raise RuntimeError("no weights\\nto be found")

    def no_example():
        return torch.nn.Linear(2, 2)

    number = 3
"""


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "user_model.py"
    path.write_text(textwrap.dedent(USER_MODEL))
    yield path
    sys.modules.pop("user_model", None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


@pytest.fixture(autouse=True)
def threads_kept():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_model_goes_to_the_device_that_was_asked_for(model_file, monkeypatch):
    asked = []
    monkeypatch.setattr(cli.api, "accelerate", lambda model, example, **_: asked.append((model, example)) or model)
    monkeypatch.setattr(cli.api, "report", lambda model: "")
    assert cli.main(["report", f"{model_file}:build", "--device", "meta"]) == 0
    [(model, example)] = asked
    assert {p.device.type for p in model.parameters()} == {example.device.type} == {"meta"}


def test_without_a_gpu_asking_for_one_is_an_error(model_file, monkeypatch, capsys):
    monkeypatch.setattr(cli.gpus, "visible", list)
    assert cli.main(["report", f"{model_file}:build", "--device", "cuda"]) == 2
    assert "no CUDA device is visible" in capsys.readouterr().err


def test_env_names_machine_and_versions(capsys):
    assert cli.main(["env"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"] == torch.__version__
    assert {"cpu", "engine", "threads", "python", "spikingjelly", "snntorch"} <= lines.keys()


def test_env_json(capsys):
    assert cli.main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["threads"] == torch.get_num_threads()


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "sparseflow", "report", "nowhere.py:f"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "sparseflow report: there is no file nowhere.py\n"


class TestReport:
    def test_prints_every_layer(self, model_file, capsys):
        assert cli.main(["report", f"{model_file}:build"]) == 0
        out = capsys.readouterr().out
        assert "layers run sparse" in out
        assert {"0", "2"} <= {line.split()[0] for line in out.splitlines() if line.strip()}

    def test_json_alone_on_standard_output(self, model_file, capsys):
        assert cli.main(["report", f"{model_file}:build", "--json"]) == 0
        assert [layer["kind"] for layer in json.loads(capsys.readouterr().out)["layers"]] == ["linear", "linear"]

    def test_html(self, model_file, tmp_path, capsys):
        page = tmp_path / "page.html"
        assert cli.main(["report", f"{model_file}:build", "--html", str(page)]) == 0
        assert page.stat().st_size > 0
        assert str(page) in capsys.readouterr().err

    def test_threads(self, model_file):
        assert cli.main(["report", f"{model_file}:build", "--threads", "1"]) == 0
        assert torch.get_num_threads() == 1


class TestBench:
    def test_prints_times_and_speedup(self, model_file, capsys):
        assert cli.main(["bench", f"{model_file}:build", "--repeats", "2"]) == 0
        out = capsys.readouterr().out
        assert "over 2 alternations" in out
        assert "of 2 layers run sparse" in out

    def test_json_holds_result_and_environment(self, model_file, capsys):
        assert cli.main(["bench", f"{model_file}:build", "--repeats", "2", "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["result"]["matches"]
        assert record["environment"]["torch"] == torch.__version__

    def test_a_red_gate_gives_no_speedup_and_exit_code_1(self, model_file, capsys, monkeypatch):
        red = BenchResult((2.0, 2.0, 2.0), (1.0, 1.0, 1.0), 0.5, False, "the gate", 2)
        monkeypatch.setattr(cli, "compare", lambda *_, **__: red)
        assert cli.main(["bench", f"{model_file}:build"]) == 1
        assert "2.00x" not in capsys.readouterr().out


def test_synthetic_network_is_labelled(capsys):
    assert cli.main(["report"]) == 0
    assert capsys.readouterr().err.strip() == NOTE


class TestErrors:
    @pytest.mark.parametrize(
        ("function", "message"),
        [
            ("missing", "has no function 'missing'"),
            ("number", "has no function 'number'"),
            ("no_example", "must return (torch.nn.Module, example_input), got Linear"),
            ("broken", "RuntimeError: no weights to be found"),
        ],
    )
    def test_bad_function(self, model_file, capsys, function, message):
        assert cli.main(["report", f"{model_file}:{function}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("sparseflow report: ")
        assert message in error
        assert error.count("\n") == 1

    @pytest.mark.parametrize("spec", ["model.py", "model.py:", ":build", "model.py:not a name"])
    def test_malformed_spec(self, capsys, spec):
        assert cli.main(["bench", spec]) == 2
        assert "expected FILE.py:function" in capsys.readouterr().err

    def test_not_python(self, tmp_path, capsys):
        path = tmp_path / "weights.bin"
        path.write_bytes(b"\0")
        assert cli.main(["report", f"{path}:build"]) == 2
        assert "is not a Python file" in capsys.readouterr().err

    def test_unknown_backend(self, model_file, capsys):
        assert cli.main(["report", f"{model_file}:build", "--backend", "abacus"]) == 2
        assert "abacus" in capsys.readouterr().err

    def test_traceback_on_request(self, model_file):
        with pytest.raises(RuntimeError, match="no weights"):
            cli.main(["report", f"{model_file}:broken", "--traceback"])

    @pytest.mark.parametrize("arguments", [[], ["fly"], ["bench", "--repeats", "0"], ["report", "--repeats", "3"]])
    def test_bad_arguments(self, arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2


class TestSyntheticNetwork:
    def test_neurons_fire_sparsely_in_every_layer(self):
        network, example = synthetic_network()
        rates = []
        for module in network.modules():
            if isinstance(module, MultiStepLIF):
                module.register_forward_hook(lambda _m, _args, spikes: rates.append(spikes.mean().item()))
        network(example)
        assert len(rates) == 6
        assert all(0.01 < rate < 0.2 for rate in rates)

    def test_the_same_seed_gives_the_same_network_and_leaves_the_generator_alone(self):
        state = torch.get_rng_state()
        (first, x), (second, y) = synthetic_network(), synthetic_network()
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(x, y)
        assert torch.equal(first(x), second(y))

    def test_lif_integrates_fires_and_resets(self):
        spikes = MultiStepLIF()(torch.tensor([[1.5], [1.5], [1.5], [4.0]]))
        # v: 0.75, 1.125 (fires, reset), 0.75, 2.375 (fires)
        assert spikes.flatten().tolist() == [0.0, 1.0, 0.0, 1.0]
