"""The public functions: planning, options, errors, calibration, observation."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import sparseflow
from sparseflow import Path, Provenance, Reason
from sparseflow.modules.swap import runtimes

from .modules.nets import SPIKE_FED, Fire, conv_net, images


@pytest.fixture
def net():
    return sparseflow.accelerate(conv_net().eval(), images(), mode="sparse")


def test_analyze_changes_nothing_and_says_what_accelerate_would_do():
    model = conv_net().eval()
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    plan = sparseflow.analyze(model, images(), mode="sparse")
    for (cls, attributes), module in zip(before, model.modules(), strict=True):
        assert type(module) is cls
        assert attributes.keys() == module.__dict__.keys()
    assert [layer.name for layer in plan.layers] == ["0", "2", "5", "8"]
    assert [layer.path for layer in plan.layers] == [Path.DENSE] + [Path.EVENT] * 3
    assert plan["0"].reason is Reason.NOT_SPIKE_FED
    assert plan["2"].provenance is Provenance.BINARY
    assert 0.0 < plan["2"].density < 0.6
    assert sparseflow.Plan.from_json(plan.to_json()) == plan
    accelerated = sparseflow.accelerate(model, images(), mode="sparse")
    assert sparseflow.analyze(accelerated, images()) == plan


def test_measured_plan_carries_its_figures():
    plan = sparseflow.analyze(conv_net().eval(), images())
    for name in SPIKE_FED:
        layer = plan[name]
        assert layer.reason in (Reason.SPARSE_WINS, Reason.DENSE_WINS)
        assert layer.crossover.dense_ms > 0
        assert layer.crossover.sparse_ms[0] > 0
        assert sparseflow.Plan.from_json(plan.to_json())[name] == layer


def test_without_an_example_the_first_call_plans():
    model = sparseflow.accelerate(conv_net().eval(), mode="sparse")
    assert runtimes(model) == {}
    with pytest.raises(ValueError, match="plans at its first call"):
        sparseflow.report(model)
    with torch.no_grad():
        first = model(images())
        assert set(runtimes(model)) == set(SPIKE_FED)
        assert not model._forward_pre_hooks
        with sparseflow.disabled(model):
            torch.testing.assert_close(first, model(images()), rtol=1e-4, atol=1e-5)


def test_restore_cancels_a_pending_plan():
    model = sparseflow.restore(sparseflow.accelerate(conv_net().eval()))
    assert not model._forward_pre_hooks
    model(images())
    assert runtimes(model) == {}


def test_accelerate_twice_plans_anew(net):
    assert sparseflow.accelerate(net, images(), mode="sparse", exclude="5") is net
    assert set(runtimes(net)) == {"2", "8"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "2"}, {"2"}),
        ({"include": ["2", "5"], "exclude": "5"}, {"2"}),
        ({"exclude": lambda name, module: isinstance(module, nn.Linear)}, {"2", "5"}),
    ],
)
def test_include_and_exclude(options, expected):
    model = sparseflow.accelerate(conv_net().eval(), images(), mode="sparse", **options)
    assert set(runtimes(model)) == expected
    excluded = {layer.name for layer in sparseflow.report(model).layers if layer.reason == Reason.EXCLUDED}
    assert excluded == set(SPIKE_FED) - expected


def test_mode_dense_swaps_nothing():
    with pytest.warns(sparseflow.NothingAcceleratedWarning, match="mode='dense'"):
        model = sparseflow.accelerate(conv_net().eval(), images(), mode="dense")
    assert runtimes(model) == {}


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"mode": "fast"}, ValueError, "mode must be one of"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"include": 3}, TypeError, "include must be"),
        ({"exclude": [1]}, TypeError, "exclude must be"),
        ({"calibration": "/nonexistent.json"}, sparseflow.CalibrationError, "not a calibration file"),
        ({"colour": "red"}, TypeError, "colour"),
    ],
)
def test_bad_options_name_the_problem_and_leave_the_model(options, error, text):
    model = conv_net().eval()
    with pytest.raises(error, match=text):
        sparseflow.accelerate(model, images(), **options)
    assert runtimes(model) == {}
    with pytest.raises(TypeError):
        sparseflow.analyze(model, images(), colour="red")


BACKENDS_THAT_CANNOT_RUN = {
    "not installed": ("sys.modules['triton'] = None", "triton cannot be imported"),
    "on the CPU": ("", "set TRITON_INTERPRET=1"),
}


@pytest.mark.parametrize("case", BACKENDS_THAT_CANNOT_RUN)
def test_triton_that_cannot_run_says_why(case):
    """In a process of its own: this one interprets the kernels."""
    prepare, expected = BACKENDS_THAT_CANNOT_RUN[case]
    script = f"""
import sys, torch, sparseflow
{prepare}
model = torch.nn.Linear(4, 4)
try:
    sparseflow.accelerate(model, torch.zeros(1, 4), backend="triton")
except sparseflow.BackendUnavailableError as error:
    print(error)
assert type(model) is torch.nn.Linear
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = [sys.executable, "-c", script]
    said = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.startswith("backend='triton': ")
    assert expected in said
    assert "backend='auto'" in said


def test_not_a_module():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        sparseflow.accelerate(lambda x: x, images())


def test_a_model_without_spikes_warns_or_raises():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.warns(sparseflow.NothingAcceleratedWarning, match="report"):
        sparseflow.accelerate(model, torch.randn(2, 4))
    assert "not a spike tensor" in str(sparseflow.report(model))
    with pytest.raises(sparseflow.UnsupportedModelError):
        sparseflow.accelerate(sparseflow.restore(model), torch.randn(2, 4), strict=True)
    assert runtimes(model) == {}
    with pytest.raises(ValueError, match="accelerate"):
        sparseflow.report(model)


def test_an_example_that_does_not_fit_leaves_the_model():
    model = conv_net().eval()
    with pytest.raises(RuntimeError):
        sparseflow.accelerate(model, torch.randn(2, 4, 8, 8))
    assert runtimes(model) == {}
    assert all(type(m).__module__ != "sparseflow.modules.swap" for m in model.modules())


def test_accelerate_logs_one_line_and_forward_none(caplog):
    with caplog.at_level(logging.INFO, "sparseflow"):
        model = sparseflow.accelerate(conv_net().eval(), images(), mode="sparse")
        lines = [r.message for r in caplog.records if "layers" in r.message]
        assert lines == ["3 of 4 layers run sparse: Sequential"]
        caplog.clear()
        model(images())
    assert not caplog.records


def test_keyword_and_tuple_examples():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv_net()

        def forward(self, x, *, scale):
            return self.net(x * scale)

    model = sparseflow.accelerate(Two().eval(), {"x": images(), "scale": 1.5}, mode="sparse")
    assert set(runtimes(model)) == {f"net.{name}" for name in SPIKE_FED}
    pair = nn.Sequential(conv_net()).eval()
    assert len(runtimes(sparseflow.accelerate(pair, (images(),), mode="sparse"))) == 3


def test_disabled_nests(net):
    runtime = runtimes(net)["2"]
    with sparseflow.disabled(net), sparseflow.disabled(net):
        pass
    before = runtime.stats.calls.total()
    with torch.no_grad():
        with sparseflow.disabled(net):
            net(images())
        assert runtime.stats.calls.total() == before
        net(images())
    assert runtime.stats.calls.total() == before + 1


def test_report_lists_every_layer_with_reason(net):
    report = sparseflow.report(net)
    assert [layer.name for layer in report.layers] == ["0", "2", "5", "8"]
    assert report.accelerated == 3
    assert report.layers[1].calls == {"event": 1}
    assert "input is not a spike tensor" in str(report)


def test_profile_counts_calls_paths_and_density(net):
    with sparseflow.profile(net) as p, torch.no_grad():
        for _ in range(3):
            net(images())
    layers = {layer.name: layer for layer in p.layers}
    assert set(layers) == {str(i) for i in range(9)}
    assert layers["1"].kind == "neuron"
    assert layers["2"].paths == {"event": 3}
    assert layers["2"].calls == 3
    assert 0 < layers["2"].density < 0.6
    assert p.result().total_ms >= sum(layer.total_ms for layer in p.layers)
    assert not net[2]._forward_hooks


def test_verify_checks_every_nth_call_and_raises_on_a_wrong_result(net, monkeypatch):
    with sparseflow.verify(net, every=2) as watch, torch.no_grad():
        for _ in range(4):
            net(images())
    assert watch.checked == 2 * 3
    assert watch.worst <= 1.0
    site = runtimes(net)["5"].last_site
    right = site.kernel.compute
    monkeypatch.setattr(site.kernel, "compute", lambda *args: right(*args) + 1e-3)
    with (
        pytest.raises(sparseflow.MismatchError, match=r"^5: the event result"),
        sparseflow.verify(net),
        torch.no_grad(),
    ):
        net(images())
    with pytest.raises(ValueError, match="positive integer"), sparseflow.verify(net, every=0):
        pass


def test_calibrate_measures_on_real_data_and_is_used(tmp_path, monkeypatch):
    model = conv_net().eval()
    calibration = sparseflow.calibrate(model, [(images(), 1), (images(), 2)], prepare=lambda item: item[0])
    assert runtimes(model) == {}
    assert set(calibration.layers) == set(SPIKE_FED)
    assert 0 < calibration.layers["2"].density < 0.6
    assert len(calibration.crossovers) == 3
    calibration.save(tmp_path / "net.json")
    monkeypatch.setattr(
        "sparseflow.dispatch.crossovers.measure", lambda *a: pytest.fail("measured despite calibration")
    )
    monkeypatch.setattr("sparseflow.dispatch.crossovers.shared_cache.get", lambda key: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sparseflow.NothingAcceleratedWarning)
        sparseflow.accelerate(model, images(), calibration=tmp_path / "net.json")
    for name, runtime in runtimes(model).items():
        assert runtime.describe().crossover in calibration.crossovers.values(), name
    with pytest.raises(ValueError, match="at least one batch"):
        sparseflow.calibrate(model, [])


def test_a_calibration_of_another_machine_is_measured_again(caplog):
    model = conv_net().eval()
    foreign = sparseflow.Calibration({}, {}, {"cpu": "another"})
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "sparseflow"):
        warnings.simplefilter("ignore", sparseflow.NothingAcceleratedWarning)
        sparseflow.accelerate(model, images(), calibration=foreign)
    assert "another machine" in caplog.text


def test_the_dispatcher_follows_the_density():
    """A layer whose crossover is known switches with the spikes it sees, and counts show it."""
    sparseflow.register_neuron(Fire, overwrite=True)
    model = nn.Sequential(Fire(), nn.Conv2d(64, 64, 3, padding=1)).eval()
    sparseflow.accelerate(model, (torch.rand(1, 64, 14, 14) < 0.05) * 2.0)
    runtime = runtimes(model)["1"]
    site = runtime.last_site
    known = sparseflow.plan.Crossover("k", 0.2, 1.0, 0.001, 0.01, (0.01, 0.5), (0.1, 2.0), site.kernel.variants()[0])
    site.retune(known)
    runtime.stats.calls.clear()
    with torch.no_grad():
        for density in (0.05, 0.5, 0.5, 0.05, 0.05):  # after two looks in vain the third waits for one call
            model((torch.rand(1, 64, 14, 14) < density) * 2.0)
    assert runtime.stats.calls == {Path.EVENT: 2, Path.DENSE: 3}
