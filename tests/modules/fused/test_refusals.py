"""What is not part of a fused block, and the reason that is given."""

from __future__ import annotations

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn

import sparseflow
from sparseflow.modules.fused.model import fusion_of

from .nets import (
    Net,
    assert_twins,
    check,
    conv,
    features,
    images,
    is_fused,
    kinds,
    leaky,
    lif,
    norm,
    on_grid,
    program,
    spikes,
    stem,
    twins,
)

pytestmark = pytest.mark.filterwarnings("ignore::sparseflow.NothingAcceleratedWarning")


def behind_the_stem(part):
    return Net(lambda m, x: m.n1(m.b1(m.c1(spikes(m, x)))), **stem(), c1=conv(8, 8), b1=norm(8), n1=part)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: lif(store_v_seq=True), "it stores the membrane of every step (store_v_seq)"),
        (lambda: neuron.KLIFNode(step_mode="m"), "the update rule of KLIFNode in this configuration is not known"),
        (lambda: lif(surrogate_function=Steep()), "the update rule of LIFNode in this configuration is not known"),
        (lambda: neuron.ILIFNode(step_mode="m"), "the update rule of ILIFNode in this configuration is not known"),
    ],
    ids=["store_v_seq", "unknown", "surrogate", "counts"],
)
def test_a_neuron_that_stays_itself(make, why):
    model = check(behind_the_stem(make()), images())
    assert program(model).fused.refusals == {"n1": why}
    assert [block.neuron for block in program(model).fused.blocks] == ["n0", None]


class Steep(nn.Module):
    """A surrogate of the user's own."""

    spiking = True

    def forward(self, x):
        return (x >= 0.25).to(x)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"graded_spikes_factor": 2.0}, "the update rule of Leaky in this configuration is not known"),
        ({"beta": torch.full((16, 1), 0.5)}, "its input has too few dimensions, or its constants do not belong to"),
        ({"beta": torch.full((16,), 0.5)}, None),
    ],
    ids=["graded", "misplaced", "by channel"],
)
def test_a_neuron_of_a_loop_that_stays_itself(options, why):
    def run(m, x):
        mem = m.n1.init_leaky()
        out = []
        for step in x:
            s, mem = m.n1(m.f1(step), mem)
            out.append(m.f2(m.n2(s)))
        return torch.stack(out)

    parts = {"f1": nn.Linear(6, 16), "n1": leaky(**options), "n2": leaky(init_hidden=True), "f2": nn.Linear(16, 4)}
    model = check(Net(run, **parts), features(4, batch=16))
    assert program(model).fused.refusals.get("n1", "").startswith(why or "")
    assert ("n1" in program(model).fused.refusals) is (why is not None)


def test_a_model_in_float64_is_not_fused():
    net = on_grid(behind_the_stem(lif())).double().eval()
    model = sparseflow.accelerate(net, images().double(), mode="sparse")
    assert not is_fused(model)
    assert "its input is not float32" in str(sparseflow.report(model).notes)


def test_an_excluded_layer_is_called_and_the_neuron_behind_it_is_not():
    dense, model = twins(on_grid(behind_the_stem(lif())), images())
    model = sparseflow.accelerate(sparseflow.restore(model), images(), mode="sparse", exclude="c1")
    assert_twins(dense, model, images())
    assert [(block.layer, block.norm) for block in program(model).fused.blocks] == [("c0", None), (None, "b1")]
    assert kinds(model) == {"Block": 2, "Eager": 1, "Unpack": 2}


def test_a_model_without_neurons_that_are_known_says_so():
    net = Net(lambda m, x: m.c1(m.n0(m.c0(x))), c0=conv(3, 8), n0=neuron.KLIFNode(step_mode="m"), c1=conv(8, 8))
    model = sparseflow.accelerate(on_grid(net).eval(), images(), mode="sparse")
    assert "not fused: no neuron can be fused: the update rule of KLIFNode" in str(sparseflow.report(model).notes)


def test_without_fuse_only_layers_are_swapped():
    model = sparseflow.accelerate(on_grid(behind_the_stem(lif())).eval(), images(), mode="sparse", fuse=False)
    assert fusion_of(model) is None
    assert sparseflow.report(model).layers[1].path == "event"


@pytest.mark.parametrize("method", ["reshape", "view", "expand"])
def test_a_loop_that_asks_for_the_shape_of_another_tensor(method):
    def run(m, x):
        return torch.stack([m.n1(getattr(m.f1(step), method)(m.f2(step).shape)) for step in x])

    parts = {"f1": nn.Linear(6, 16), "f2": nn.Linear(6, 16), "n1": leaky(init_hidden=True)}
    check(Net(run, **parts), features(4))
