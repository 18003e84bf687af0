"""Rows of whole networks: complete, honest about their baselines, without figures behind a red gate."""

from __future__ import annotations

import pytest
import torch
from spikingjelly.activation_based import neuron

import sparseflow
from sparseflow.bench.records import Layer, Phase, Point, Scope
from sparseflow.bench.suites import Options, memory, models, nets, scaling
from sparseflow.bench.suites.baselines import baselines, in_dtype

from .small import narrow, one_thread, tutorial

__all__ = ["one_thread"]
OPTIONS = Options(quick=True, repeats=2)


@pytest.fixture(scope="module")
def workload():
    return narrow()


@pytest.fixture(scope="module")
def rows(workload):
    return list(models.measure(workload, OPTIONS))


def points(rows):
    return [row for row in rows if isinstance(row, Point)]


class TestRows:
    def test_a_point_for_every_level_and_baseline(self, rows):
        found = {(point.kernel, point.baseline) for point in points(rows)}
        assert found == {(level, name) for level in models.LEVELS for name in ("eager", "eager channels_last")}

    def test_points_say_what_they_are(self, rows, workload):
        for point in points(rows):
            assert (point.suite, point.case, point.scope) == ("models", "narrow", Scope.EXACT)
            assert point.config == workload.config
            assert len(point.densities) == 17
            assert 0 < point.rho < 0.3
            assert point.gate.green
            assert point.value[0] <= point.value[1] <= point.value[2]

    def test_without_a_compiled_baseline_none_is_the_strongest(self, rows):
        assert not any(point.honest for point in points(rows))

    def test_every_layer_is_listed_once(self, rows, workload):
        layers = [row.name for row in rows if isinstance(row, Layer)]
        expected = [
            name
            for name, module in workload.build().named_modules()
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
        ]
        assert sorted(layers) == sorted(expected)

    def test_phases_of_both_levels(self, rows):
        phases = [row for row in rows if isinstance(row, Phase)]
        names = {level: {row.phase for row in phases if row.kernel == level} for level in models.LEVELS}
        assert names["level 1"] == {"prescan", "compute", "neuron", "rest"}
        assert names["level 2"] in ({"compute", "neuron", "rest"}, names["level 1"])  # fused, or found slower
        assert all(row.ms >= 0 for row in phases)

    def test_no_figure_of_a_wrong_network(self, workload):
        wrong = sparseflow.accelerate(workload.build(), workload.inputs[0], mode="sparse")
        wrong.sn1.v_threshold *= 1.1
        (point,) = points(models.measure(workload, OPTIONS, {"level 2": wrong}, suite="scaling"))
        assert (point.value, point.baseline_value, point.speedup, point.honest) == (None, None, None, False)
        assert not point.gate.green
        assert point.gate.why


class TestStrongest:
    def test_compiled_where_it_is_fastest(self):
        ms = {"eager": (1, 3.0, 4), "eager channels_last": (1, 2.5, 3), "compiled fp32": (1, 2.0, 3)}
        assert models.strongest(ms) == "compiled fp32"

    def test_bf16_never_is_a_baseline_of_fp32(self):
        ms = {"eager": (1, 3.0, 4), "compiled fp32": (1, 2.0, 3), "compiled bf16": (1, 1.0, 2), "level 2": (0, 0.1, 1)}
        gates = {"level 2": models.Gate(True, "")}
        about = {"config": {}, "rho": 0.1}
        found = {point.baseline: point.honest for point in models.points("models", "case", gates, ms, about)}
        assert found == {"eager": False, "compiled fp32": True, "compiled bf16": False}


class TestWorkloads:
    def test_names_are_unique_and_those_of_what_they_make(self):
        names = [name for name, _ in [*models.everything(), *scaling.everything()]]
        assert len(set(names)) == len(names)
        made = memory.workloads()
        for name in ("digits resnet18 @32, batch 8", "snnTorch convnet @28, T = 25, batch 8", "recurrent, width 256"):
            assert made[name]().name == name

    def test_the_gate_sees_enough_images(self):
        inputs = dict(models.everything())["digits resnet18 @32, batch 8"]().inputs
        assert sum(x.shape[1] for x in inputs) >= nets.IMAGES

    def test_quick_cases_are_named_alike(self):
        for suite, everything in ((models, models.everything()), (scaling, scaling.everything())):
            assert {case.name for case in suite.run(OPTIONS)} <= {name for name, _ in everything}

    def test_one_size_changes_along_an_axis(self):
        made = dict(scaling.everything())
        assert made["convolutional, T 16"]().inputs[0].shape == (16, 1, 1, 32, 32)
        assert made["convolutional, resolution 16"]().inputs[0].shape == (4, 1, 1, 16, 16)
        assert made["recurrent, batch 4"]().inputs[0].shape == (8, 4, 1024)
        for kind in ("feed-forward", "recurrent"):
            net = made[f"{kind}, depth 4"]().build()
            assert sum(isinstance(module, neuron.LIFNode) for module in net.modules()) == 4

    def test_stand_in_where_there_is_no_checkpoint(self, monkeypatch, tmp_path):
        monkeypatch.setattr(nets.from_checkout("benchmarks.trained"), "CHECKPOINT", tmp_path / "none.pt")
        workload = nets.spiking_resnet18(1, 64)
        assert workload.config["activity"] == "stand-in"
        assert workload.inputs[0].shape == (4, 1, 3, 64, 64)

    def test_an_installed_package_says_that_it_has_no_trained_networks(self, monkeypatch):
        monkeypatch.setattr(nets, "checkout", lambda: None)
        with pytest.raises(ModuleNotFoundError, match="in the source checkout, not in the package"):
            nets.digits(1)
        assert nets.spiking_resnet18(1, 32, images=2).config["activity"] == "stand-in"
        assert scaling.convolutional("any", 2, 1, 32).config == {
            "batch": 1, "T": 2, "resolution": 32, "activity": "stand-in", "density set": nets.LIF_DENSITY
        }  # fmt: skip

    @pytest.mark.parametrize("recurrent", [False, True])
    def test_fully_connected_networks_fire_as_set(self, recurrent):
        workload = nets.fully_connected(64, recurrent=recurrent, batch=8, steps=8, density=0.1)
        net, rates = workload.build(), []
        for module in net.modules():
            if hasattr(module, "v_threshold"):
                module.register_forward_hook(lambda _m, _a, spikes: rates.append(float(spikes.mean())))
        with torch.no_grad():
            net(workload.inputs[0])
        assert len(rates) == (16 if recurrent else 2)
        assert sum(rates) / len(rates) == pytest.approx(0.1, rel=0.1)

    def test_spikes_keep_the_dtype_of_a_bf16_network(self):
        workload = tutorial()
        net = in_dtype(workload.build(), torch.bfloat16)
        with torch.no_grad():
            assert net(workload.inputs[0].bfloat16())[0].dtype == torch.bfloat16

    def test_no_layout_of_images_where_there_are_none(self):
        workload = nets.fully_connected(16, recurrent=False, batch=1, steps=2, density=0.1)
        assert [name for name, _, _ in baselines(workload, with_compile=False)] == ["eager"]
