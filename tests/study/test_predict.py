"""``sparseflow.predict``: one network, three kinds of hardware."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import sparseflow
from sparseflow.report import LayerProfile, ProfileResult
from sparseflow.study.hardware import Accelerator, cycles
from sparseflow.study.predict import CPU, H200, predict, predict_latency
from sparseflow.study.predictor import call_of, shipped
from sparseflow.study.records import LayerShape
from sparseflow.study.shapes import shapes_of, trace

from .layer_shapes import convolution

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="its cost model is Triton's")
HARDWARE = [CPU, pytest.param(H200, marks=NEEDS_TRITON), Accelerator(neuron_units=8)]
INPUT = torch.zeros(4, 2, 2, 16, 16)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """``[T, N, 2, 16, 16]`` to ``[T, N, 10]``."""
    net = nn.Sequential(
        layer.Conv2d(2, 32, 3, padding=1),
        neuron.LIFNode(),
        layer.Conv2d(32, 64, 3, padding=1),
        neuron.LIFNode(),
        layer.Flatten(),
        layer.Linear(64 * 16 * 16, 10),
        neuron.LIFNode(),
    )
    functional.set_step_mode(net, "m")
    return net.eval()


@pytest.mark.parametrize("hardware", HARDWARE)
def test_dense_does_not_depend_on_density(net, hardware):
    call = trace(net, INPUT)
    found = [predict(call, density, hardware=hardware) for density in (0.0, 0.1, 0.9, 1.0)]
    assert len({prediction.dense_ms for prediction in found}) == 1
    assert found[0].dense_ms > 0


LARGE = call_of([convolution(256, 256, size=28), LayerShape("fc", 4096, 4096)], steps=4, batch=8)


@pytest.mark.parametrize("hardware", HARDWARE)
def test_accelerated_grows_with_density(hardware):
    found = [predict(LARGE, density, hardware=hardware).accelerated_ms for density in (0.0, 0.001, 0.01, 0.1, 1.0)]
    assert found == sorted(found)
    assert found[0] < found[-1]


@pytest.mark.parametrize("hardware", HARDWARE)
def test_totals_are_the_layers_and_the_rest(net, hardware):
    found = sparseflow.predict(net, {"2": 0.1, "5": 0.2}, example_input=INPUT, hardware=hardware)
    assert [(each.name, each.density) for each in found.layers] == [("0", 1.0), ("2", 0.1), ("5", 0.2)]
    assert found.dense_ms == pytest.approx(found.rest_dense_ms + sum(each.dense_ms for each in found.layers))
    assert found.totals == {"dense": found.dense_ms, "accelerated": found.accelerated_ms}
    assert found.speedup == pytest.approx(found.dense_ms / found.accelerated_ms)
    assert found.layers[1].speedup == pytest.approx(found.layers[1].dense_ms / found.layers[1].accelerated_ms)


def test_cpu_prediction_has_the_error_of_its_models(net):
    found = predict(net, 0.1, example_input=INPUT)
    assert found.dense_error == shipped().dense_net.error
    assert found.accelerated_error == shipped().accelerated_net.error
    assert found.cycles is None
    assert shipped().machine["cpu"] in found.hardware


def test_cpu_layer_never_runs_slower_than_dense(net):
    """The dispatcher would not let it."""
    dense = predict(net, 1.0, example_input=INPUT)
    for density in (0.1, 0.99):
        found = predict(net, density, example_input=INPUT)
        pairs = zip(found.layers, dense.layers, strict=True)
        assert all(layer.accelerated_ms <= other.accelerated_ms for layer, other in pairs)


def test_accelerator_counts_the_cycles_of_every_row(net):
    accelerator = Accelerator(encoder_width=32, neuron_units=8, clock_mhz=200)
    found = predict(net, {"2": 0.25}, example_input=INPUT, hardware=accelerator)
    counts = torch.full((1, 1, 32), 64.0)
    one = cycles(shapes_of(net, INPUT)[1], counts, accelerator).item()
    assert found.layers[1].cycles == 8 * one
    assert found.layers[1].accelerated_ms == pytest.approx(8 * one / 200e3)
    assert found.cycles == sum(each.cycles for each in found.layers)
    assert found.accelerated_error is None


@NEEDS_TRITON
def test_gpu_prediction_says_that_nothing_was_measured(net):
    found = predict(net, {"2": 0.001}, example_input=INPUT, hardware=H200)
    assert found.dense_error is None
    assert found.accelerated_error is None
    assert "predicted and not measured" in " ".join(str(found).split())
    assert all(each.accelerated_ms <= each.dense_ms for each in found.layers)


@NEEDS_TRITON
@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(64, 64, 3, groups=64, padding=1),
        nn.Conv2d(64, 64, 3, dilation=2),
        nn.Conv2d(64, 32, 4, padding="same"),
    ],
)
def test_gpu_takes_any_convolution(module):
    found = predict(module, 0.001, example_input=torch.zeros(2, 64, 16, 16), hardware=H200)
    assert 0 < found.accelerated_ms <= found.dense_ms


def test_gpu_prediction_needs_triton(net, monkeypatch):
    monkeypatch.setitem(sys.modules, "sparseflow.kernels.triton", None)
    with pytest.raises(sparseflow.BackendUnavailableError, match="needs triton"):
        predict(net, 0.1, example_input=INPUT, hardware=H200)


def test_densities_of_a_profile(net):
    layers = (LayerProfile("0", "conv", 1.0, 1), LayerProfile("2", "conv", 1.0, 1, density=0.3, paths={"event": 1}))
    found = predict(net, ProfileResult(layers, 3.0), example_input=INPUT)
    assert [each.density for each in found.layers] == [1.0, 0.3, 1.0]


def test_profile_of_an_accelerated_network():
    threshold = type("Threshold", (nn.Module,), {"forward": lambda self, x: (x >= 0).to(x.dtype)})
    sparseflow.register_neuron(threshold)
    model = nn.Sequential(nn.Linear(64, 64), threshold(), nn.Linear(64, 64)).eval()
    x = torch.randn(2, 64)
    sparseflow.accelerate(model, x, backend="torch", mode="sparse")
    with torch.no_grad(), sparseflow.profile(model) as watch:
        spikes = model[1](model[0](x))
        model(x)
    found = predict(model, watch, example_input=x)
    assert [each.density for each in found.layers] == [1.0, pytest.approx(spikes.mean().item())]


def test_shapes_alone_are_enough(net):
    shapes = shapes_of(net, INPUT)
    known = predict_latency(shapes, {"2": 0.1}, steps=4, batch=2)
    assert known.totals == pytest.approx(predict(net, {"2": 0.1}, example_input=INPUT).totals)


def test_loop_over_time_costs_calls():
    shapes = [LayerShape("one", 64, 64), LayerShape("two", 64, 10)]
    once, looped = (predict_latency(shapes, {"two": 0.1}, steps=25, calls=calls) for calls in (1, 25))
    assert looped.dense_ms > once.dense_ms


def test_text_has_every_layer_and_the_error(net):
    text = str(predict(net, 0.1, example_input=INPUT))
    rows = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert {"layer", "0", "2", "5", "rest"} <= set(rows)
    assert "held-out cases" in text
    assert "10.0 %" in text
    assert "cycles" in str(predict(net, 0.1, example_input=INPUT, hardware=Accelerator()))


@pytest.mark.parametrize(
    ("densities", "options", "error", "message"),
    [
        ({"conv9": 0.1}, {}, ValueError, "no layer is called conv9; there are 0, 2, 5"),
        ({"2": 1.5}, {}, ValueError, "shares in 0..1, got 2: 1.5"),
        (-0.1, {}, ValueError, "shares in 0..1"),
        ([0.1], {}, TypeError, "got list"),
        (0.1, {"hardware": "tpu"}, ValueError, "cpu, h200 or an Accelerator, got 'tpu'"),
        (0.1, {"example_input": None}, TypeError, "needs example_input"),
    ],
)
def test_errors_say_what_is_wrong(net, densities, options, error, message):
    with pytest.raises(error, match=message):
        predict(net, densities, **{"example_input": INPUT, **options})


def test_model_has_to_be_one():
    with pytest.raises(TypeError, match="got str"):
        predict("resnet18", 0.1)


def test_import_of_sparseflow_leaves_the_study_out():
    probe = """
import sys, sparseflow
print(any(name.startswith("sparseflow.study") for name in sys.modules))
sparseflow.predict
print([name for name in ("scipy", "sklearn", "optuna", "triton", "spikingjelly", "snntorch") if name in sys.modules])
print(hasattr(sparseflow, "no_such_name"))
"""
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:3] == ["False", "[]", "False"]
