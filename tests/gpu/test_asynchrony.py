"""Nothing waits for the device, graphs replay with other spikes, and streams and devices do not mix."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch

import sparseflow
from sparseflow import Path
from sparseflow.modules.swap import runtimes

from ..modules.nets import SPIKE_FED, conv_net
from .conftest import pictures


@contextlib.contextmanager
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def dense(model, x):
    with torch.no_grad(), sparseflow.disabled(model):
        return model(x).clone()


def captured(model, x):
    """The model's forward as a graph that reads ``x``, and the output it writes."""
    with torch.no_grad():
        model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
    return graph, y


@pytest.mark.parametrize("mode", ["sparse", "auto"])
def test_calls_do_not_wait(mode):
    model = sparseflow.accelerate(conv_net().eval().cuda(), pictures(), mode=mode)
    inputs = [pictures(seed=seed) for seed in range(20)]
    with torch.no_grad():
        for x in inputs:  # a kernel that is chosen for the first time packs the weight, which may wait
            model(x)
            torch.cuda.synchronize()
        with waiting_is_an_error():
            for x in inputs:
                model(x)


def test_counts_arrive(net):
    runtime = runtimes(net)["2"]
    with torch.no_grad():
        seen = runtime.stats.numel
        for _ in range(4):
            net(pictures())
            torch.cuda.synchronize()
        runtime.receive()
    assert runtime.stats.numel > seen
    assert 0.0 < runtime.describe().density < 0.6


@pytest.mark.parametrize("mode", ["sparse", "auto"])
def test_a_graph_replays_with_other_spikes(mode):
    x = pictures()
    model = sparseflow.accelerate(conv_net().eval().cuda(), x, mode=mode)
    graph, y = captured(model, x)
    for seed in (5, 6, 7):
        x.copy_(pictures(seed=seed))
        graph.replay()
        torch.testing.assert_close(y, dense(model, x), rtol=1e-3, atol=1e-3)
    x.fill_(-10.0)  # not one spike
    graph.replay()
    torch.testing.assert_close(y, dense(model, x), rtol=1e-3, atol=1e-3)


def test_a_graph_sees_new_weights_after_refresh(net):
    x = pictures()
    graph, y = captured(net, x)
    for write in (lambda w: w.mul_(-1.5), lambda w: w.data.mul_(0.5)):
        with torch.no_grad():
            write(net[2].weight)
        sparseflow.refresh(net)
        graph.replay()
        torch.testing.assert_close(y, dense(net, x), rtol=1e-3, atol=1e-3)


def test_a_graph_outlives_other_forms_of_the_weight(net):
    x = pictures()
    graph, y = captured(net, x)
    with torch.no_grad():
        for dtype in (torch.float16, torch.bfloat16):
            with torch.autocast("cuda", dtype):
                net(x)
    graph.replay()
    torch.testing.assert_close(y, dense(net, x), rtol=1e-3, atol=1e-3)


def test_an_input_first_met_in_a_capture_runs_dense_and_is_said(net, caplog):
    x, before = pictures(7), runtimes(net)["2"].stats.calls[Path.DENSE]
    graph = torch.cuda.CUDAGraph()
    expected = dense(net, x)  # also loads what the dense layers need
    with torch.no_grad(), caplog.at_level(logging.WARNING, "sparseflow"), torch.cuda.graph(graph):
        y = net(x)
    graph.replay()
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    assert "before capturing" in caplog.text
    assert runtimes(net)["2"].stats.calls[Path.DENSE] == before + 1


def test_streams(net):
    """Weights packed on one stream are read on others."""
    inputs = [pictures(seed=seed) for seed in range(6)]
    expected = [dense(net, x) for x in inputs]
    sparseflow.refresh(net)
    streams = [torch.cuda.Stream() for _ in range(3)]
    outputs = []
    for index, x in enumerate(inputs):
        stream = streams[index % 3]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            outputs.append(net(x))
    torch.cuda.synchronize()
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_model_on_another_than_the_current_device():
    x = pictures(device="cuda:1")
    model = sparseflow.accelerate(conv_net().eval().to("cuda:1"), x, mode="sparse")
    assert torch.cuda.current_device() == 0
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(model, x), rtol=1e-3, atol=1e-3)
        model.to("cuda:0")
        torch.testing.assert_close(model(x.to("cuda:0")), dense(model, x.to("cuda:0")), rtol=1e-3, atol=1e-3)
    assert all(runtimes(model)[name].stats.calls[Path.TILE] for name in SPIKE_FED)
