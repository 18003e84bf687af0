"""Networks whose input is made of spikes: it is packed in front of the first layer, and no longer when it is not."""

from __future__ import annotations

import pytest
import torch
from spikingjelly.activation_based import functional
from torch import nn

import sparseflow
from sparseflow.plan import Path

from .nets import (
    Net,
    assert_equal,
    assert_twins,
    check,
    conv,
    images,
    is_fused,
    leaky,
    lif,
    linear,
    norm,
    on_grid,
    outputs,
    program,
    twins,
)

STEPS = 4


def spikes(*shape, density=0.2, seed=3):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < density).float()


def events(batch=2, size=6):
    """``[T, N, 2, H, W]``, as a camera with two polarities gives them."""
    return spikes(STEPS, batch, 2, size, size)


def convolutional():
    def run(m, x):
        return m.fc(m.n2(m.c2(m.n1(m.b1(m.c1(x))))).flatten(2))

    parts = {
        "c1": conv(2, 6),
        "b1": norm(6),
        "n1": lif(v_threshold=0.25),
        "c2": conv(6, 4),
        "n2": lif(v_threshold=0.25),
    }
    return Net(run, **parts, fc=linear(144, 5))


def fully_connected():
    return Net(lambda m, x: m.fc(m.n1(m.f1(x))), f1=linear(40, 70), n1=lif(v_threshold=0.25), fc=linear(70, 5))


def loop():
    def run(m, x):
        return torch.stack([m.n1(m.f1(step)) for step in x])

    return Net(run, f1=nn.Linear(40, 16), n1=leaky(init_hidden=True))


NETS = {
    "convolutional": (convolutional, events),
    "fully connected": (fully_connected, lambda: spikes(STEPS, 3, 40)),
    "one sample": (fully_connected, lambda: spikes(STEPS, 1, 40)),
    "loop": (loop, lambda: spikes(STEPS, 2, 40)),
}


def first_block(model):
    return program(model).blocks[0]


@pytest.mark.parametrize(("make", "example"), NETS.values(), ids=NETS)
def test_the_first_layer_runs_on_events(make, example):
    ours = check(make(), example())
    assert first_block(ours).stats.calls[Path.FUSED] > 0
    assert first_block(ours).stats.density == pytest.approx(float(example().mean()), abs=0.05)


def test_other_spikes_than_those_of_the_example():
    dense, ours = twins(on_grid(convolutional()), events())
    for density in (0.0, 0.01, 0.6, 1.0):
        assert_twins(dense, ours, spikes(*events().shape, density=density), calls=1)
    assert first_block(ours).stats.calls[Path.FUSED] >= 4


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, float("nan"), float("inf")])
def test_an_input_that_holds_something_else_runs_dense(value):
    dense, ours = twins(on_grid(convolutional()), events())
    outputs(dense, events()), outputs(ours, events())
    before = first_block(ours).stats.calls[Path.FUSED]
    x = events()
    x[1, 0, 1, 2, 3] = value
    assert_equal(outputs(ours, x), outputs(dense, x))
    assert is_fused(ours)
    assert first_block(ours).stats.calls[Path.FUSED] == before
    functional.reset_net(dense), functional.reset_net(ours)
    assert_twins(dense, ours, events(), calls=1)


def test_images_are_not_packed():
    ours = check(convolutional(), images(STEPS, 2, 2, 6))
    assert first_block(ours).policy is None
    assert first_block(ours).geometry is None


def test_frames_that_are_all_the_same_are_computed_once():
    frame = spikes(1, 2, 2, 6, 6)
    ours = check(convolutional(), frame.repeat(STEPS, 1, 1, 1, 1))
    assert first_block(ours).policy is None


def test_an_input_of_another_memory_layout():
    x = events().transpose(3, 4)
    assert not x.is_contiguous()
    ours = check(convolutional(), x)
    assert first_block(ours).stats.calls[Path.FUSED] > 0


def test_verified_against_float64():
    model, x = on_grid(convolutional()).eval(), events()
    ours = sparseflow.accelerate(model, x, mode="sparse")
    with torch.no_grad(), sparseflow.verify(ours) as found:
        ours(x)
    assert is_fused(ours)
    assert found.checked == len(program(ours).blocks)


def test_weights_that_change_are_followed():
    dense, ours = twins(on_grid(fully_connected()), spikes(STEPS, 3, 40))
    for net in (dense, ours):
        with torch.no_grad():
            net.f1.weight.mul_(0.5)
    assert_twins(dense, ours, spikes(STEPS, 3, 40))
