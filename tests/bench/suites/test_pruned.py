"""The suite of pruned networks and layers: gates, baselines, accuracies."""

from __future__ import annotations

import types

import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn

from sparseflow.bench.records import Scope
from sparseflow.bench.suites import Options, layers, pruned
from sparseflow.bench.suites.baselines import Workload
from sparseflow.bench.suites.shapes import Shape
from sparseflow.kernels.weight_blocks import present_share

QUICK = Options(quick=True, repeats=2, compile=False)
SMALL = Shape("3x3 32@6", (2, 32, 6, 6), "Conv2d", (32, 32, 3), (("padding", 1),))


def test_a_layer_keeps_the_share_of_its_blocks():
    assert present_share(pruned.with_zero_blocks(SMALL.layer(), 0.25).weight) == 0.25


def test_points_of_a_layer_name_every_baseline_and_one_honest_one():
    rows = list(pruned.layer_points("case", SMALL, 0.25, QUICK))
    assert {row.config["density set"] for row in rows} == {0.02, 0.05, 0.1, 0.2}
    assert {row.baseline for row in rows} == {"best dense fp32", "best dense bf16", "eager", pruned.FULL}
    assert {row.baseline for row in rows if row.honest} == {"best dense fp32"}
    assert all(row.gate.green and row.value and row.speedup and row.scope is Scope.PRUNED for row in rows)


def test_a_wrong_layer_has_no_figure(monkeypatch):
    swap = layers.swapped

    def wrong(plain, mode):
        twin = swap(plain, mode)
        return lambda x: twin(x) + 1.0

    monkeypatch.setattr(layers, "swapped", wrong)
    rows = list(pruned.layer_points("case", SMALL, 0.25, QUICK))
    assert len(rows) == 4
    assert all(not row.gate.green and row.value is None and row.gate.why for row in rows)


def net() -> nn.Module:
    torch.manual_seed(0)
    options = {"padding": 1, "bias": False, "step_mode": "m"}
    parts = [layer.Conv2d(1, 16, 3, **options), neuron.IFNode(step_mode="m")]
    parts += [layer.Conv2d(16, 32, 3, **options), neuron.IFNode(step_mode="m")]
    parts += [layer.Conv2d(32, 32, 3, **options), neuron.IFNode(step_mode="m"), layer.Flatten(step_mode="m")]
    made = nn.Sequential(*parts, layer.Linear(32 * 36, 10, step_mode="m"))
    with torch.no_grad():
        for module in made:
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(4.0)
    return made.eval()


@pytest.fixture
def recipe(monkeypatch):
    """A network and a training of no time at all."""
    epochs = []

    def train_epoch(model, split, optimizer, schedule, size):
        epochs.append(size)
        optimizer.zero_grad()
        sum(parameter.square().sum() for parameter in model.parameters()).backward()
        optimizer.step()
        return 0.0

    split = types.SimpleNamespace(labels=torch.zeros(64), images=torch.zeros(64))
    module = types.SimpleNamespace(
        accuracy=lambda _net, _split: 0.5 + len(epochs) / 100,
        train_epoch=train_epoch,
        load_split=lambda: (split, split),
    )
    monkeypatch.setattr(pruned.nets, "from_checkout", lambda _name: module)
    inputs = tuple(torch.rand(3, 2, 1, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(2))
    workload = Workload("tiny", {"batch": 2, "T": 3}, net, inputs)
    monkeypatch.setitem(pruned.RECIPES, "tiny", pruned.Recipe(lambda _batch: workload, "data", "training", 1e-3))
    return epochs


def test_a_network_is_pruned_trained_and_compared(recipe):
    rows = list(pruned.network_points("tiny, half", "tiny", 0.5, QUICK))
    assert recipe == [32] * 6
    assert {row.case for row in rows} == {"tiny, half"}
    assert {row.baseline for row in rows} >= {"eager", pruned.UNPRUNED}
    config = rows[0].config
    assert (config["accuracy"], config["accuracy_pruned"], config["accuracy_fine_tuned"]) == (0.5, 0.5, 0.56)
    assert config["block_density"] == pytest.approx(0.5, abs=0.1)
    assert all(row.gate.green for row in rows), rows[0].gate.why


def test_every_case_has_a_name_of_its_own():
    names = [case.name for case in pruned.run(Options())]
    assert len(set(names)) == len(names) == 2 * 3 + 5 * 4
    assert [case.name for case in pruned.run(QUICK)] == ["3x3 256@14, 25.0% of the blocks"]
