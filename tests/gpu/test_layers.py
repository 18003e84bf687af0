"""Accelerated nets on a GPU give what the dense ones give, in every dtype and through every way of calling them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparseflow
from sparseflow import Path
from sparseflow.modules.swap import runtimes

from ..modules.nets import SPIKE_FED, conv_net, dense_and_sparse
from .conftest import pictures


def sparse_calls(model):
    return {name: r.stats.calls.total() - r.stats.calls[Path.DENSE] for name, r in runtimes(model).items()}


def assert_agrees(model, x, **tolerance):
    dense, ours = dense_and_sparse(model, x)
    torch.testing.assert_close(ours, dense, **tolerance or {"rtol": 1e-3, "atol": 1e-3})
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_within_the_error_budget(dtype):
    x = pictures(dtype=dtype)
    model = sparseflow.accelerate(conv_net().eval().to("cuda", dtype), x, mode="sparse")
    with sparseflow.verify(model) as watch, torch.no_grad():
        model(x)
        model(x.to(memory_format=torch.channels_last))
    assert watch.checked == 2 * len(SPIKE_FED)
    assert all(sparse_calls(model).values())


def test_tf32_keeps_its_own_error_budget():
    torch.backends.cudnn.allow_tf32 = True
    model = sparseflow.accelerate(conv_net().eval().cuda(), pictures(), mode="sparse")
    with sparseflow.verify(model) as watch, torch.no_grad():
        model(pictures())
    assert watch.checked == len(SPIKE_FED)


def test_the_measured_choice_agrees_and_carries_both_times():
    model = conv_net().eval().cuda()
    plan = sparseflow.analyze(model, pictures())
    for name in SPIKE_FED:
        assert plan[name].crossover.key.endswith("/eager")
        assert plan[name].crossover.dense_ms > 0
    sparseflow.accelerate(model, pictures())
    assert_agrees(model, pictures())
    for runtime in runtimes(model).values():
        for _, measured in runtime.last_site.candidates:
            assert measured.graph.key.endswith("/graph")
            assert measured.eager.dense_ms >= 0.5 * measured.graph.dense_ms


def test_gradients(net):
    def gradients():
        net.zero_grad()
        x = pictures().requires_grad_()
        net(x).square().sum().backward()
        return [x.grad, *(p.grad.clone() for p in net.parameters())]

    before, ours = sparse_calls(net), gradients()
    assert all(sparse_calls(net)[name] > before[name] for name in SPIKE_FED)
    with sparseflow.disabled(net):
        dense = gradients()
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-3)


def test_training_steps(net):
    twin, losses = copy.deepcopy(sparseflow.restore(copy.deepcopy(net))), []
    for model in (net, twin):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        history = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(pictures(8)), torch.arange(8, device="cuda"))
            loss.backward()
            optimizer.step()
            history.append(float(loss))
        losses.append(history)
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(net, dtype):
    """Layer by layer: where a result is rounded to 16 bits the other way, a neuron may fire."""
    with torch.autocast("cuda", dtype), torch.no_grad(), sparseflow.verify(net) as watch:
        assert net(pictures()).dtype == dtype
    assert watch.checked == len(SPIKE_FED)


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}], ids=["default", "reduce-overhead"])
def test_compile(net, options):
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, **options)
    with torch.no_grad():
        for seed in (5, 6, 7, 8):
            x = pictures(seed=seed)
            torch.testing.assert_close(compiled(x).clone(), net(x), rtol=1e-3, atol=1e-3)


def test_other_backends_say_why_they_stay_dense():
    with pytest.warns(sparseflow.NothingAcceleratedWarning, match="device has no sparse backend"):
        model = sparseflow.accelerate(conv_net().eval().cuda(), pictures(), backend="cpu")
    assert "runs on the CPU" in str(sparseflow.report(model))


def test_moving_the_model_measures_anew(net):
    cpu = net.cpu()
    assert_agrees(cpu, pictures(device="cpu"))
    assert_agrees(net.cuda(), pictures())
