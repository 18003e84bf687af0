"""Autograd in all its forms: checkpointing, second derivatives, forward mode, torch.func, dispatch modes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import sparseflow
from sparseflow.plan import Crossover

from .nets import Fire, conv_net, images


@pytest.fixture
def net():
    return sparseflow.accelerate(conv_net().eval(), images(), mode="sparse")


def spikes(*shape):
    return (torch.rand(*shape) < 0.1).float()


def dense_and_ours(model, run):
    with sparseflow.disabled(model):
        dense = run()
    return dense, run()


def assert_same(model, run, **tolerance):
    dense, ours = dense_and_ours(model, run)
    torch.testing.assert_close(ours, dense, **tolerance)


@pytest.mark.filterwarnings("ignore::sparseflow.NothingAcceleratedWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.5])
def test_checkpointing_saves_the_same_tensors_when_it_recomputes(monkeypatch, use_reentrant, density):
    """Shapes met first inside a checkpoint, in layers where sparse never wins (0.0) and where it may."""
    monkeypatch.setattr(
        "sparseflow.dispatch.crossovers.measure",
        lambda key, kernel, *_: Crossover(key, density, 1.0, 0.1, 0.1, (0.01,), (0.5,), kernel.variants()[0]),
    )
    sparseflow.register_neuron(Fire, overwrite=True)
    layers = [nn.Linear(64, 64), Fire(), nn.Linear(64, 48), Fire(), nn.Linear(48, 3)]
    model = sparseflow.accelerate(nn.Sequential(*layers), torch.randn(2, 64) * 3)
    batches = [(torch.randn(n, 64) * 3).requires_grad_() for n in (77, 150)]

    def gradients(run):
        model.zero_grad()
        sum(run(x).sum() for x in batches).backward()
        return [p.grad for p in model.parameters()]

    ours = gradients(lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
    torch.testing.assert_close(ours, gradients(model))


def test_second_derivatives():
    model = sparseflow.accelerate(conv_net().double().eval(), images().double(), mode="sparse").train()

    def penalty():
        model.zero_grad()
        x = images().double().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert_same(model, penalty)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("name", "shape"), [("2", (2, 32, 8, 8)), ("8", (2, 128))])
def test_forward_mode_keeps_its_tangents(net, name, shape, grad):
    layer, x, tangent = net.get_submodule(name), spikes(*shape), torch.randn(*shape)

    def push():
        with forward_ad.dual_level(), torch.set_grad_enabled(grad):
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent.detach()

    assert_same(net, push)


def test_torch_func_over_parameters(net):
    """The spikes are ordinary here, only the weights are wrapped."""
    layer, x = net[8], spikes(4, 128)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(weights):
        return torch.func.functional_call(layer, weights, (x,)).square().sum()

    assert_same(layer, lambda: torch.func.grad(loss)(weights))
    assert_same(layer, lambda: torch.func.jvp(loss, (weights,), (weights,)))
    stacked = {name: torch.stack([w, 2 * w]) for name, w in weights.items()}
    assert_same(layer, lambda: torch.vmap(loss)(stacked))


def test_dispatch_modes_see_what_they_would_see_without_us(net):
    def count():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(images())
        return counter.get_total_flops()

    dense, ours = dense_and_ours(net, count)
    assert ours == dense > 0
