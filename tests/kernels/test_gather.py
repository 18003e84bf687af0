"""The pure-PyTorch fallback: exact, measured like every kernel, and all there is without the native engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflow.kernels import functional
from sparseflow.kernels.base import LinearCall, Refusal
from sparseflow.kernels.reference import excess
from sparseflow.kernels.select import select
from sparseflow.plan import Path, Reason

from .test_functional import SEEDS, randn, spikes


def run(kernel, x, weight, bias):
    variant = kernel.variants()[0]
    return kernel.compute(x, kernel.prescan(x, variant), kernel.pack(weight, variant), bias, variant)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 4), max_size=2),
    st.sampled_from([1, 5, 64]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([None, "graded"]),
    st.booleans(),
    SEEDS,
)
def test_linear_is_inside_the_budget(lead, k, density, values, biased, seed):
    x, weight = spikes((*lead, k), density, seed, values), randn(7, k, seed=seed)
    bias = randn(7, seed=seed + 1) if biased else None
    kernel = select(x, weight, LinearCall(), "torch")
    assert kernel.path is Path.GATHER
    y = run(kernel, x, weight, bias)
    assert y.shape == (*lead, 7)
    assert excess(y, x, weight, bias, LinearCall()) <= 1.0


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_pointwise_convolution_keeps_the_dense_layout(stride, form):
    x = spikes((2, 8, 5, 7), 0.2).to(memory_format=form)
    weight, bias = torch.randn(4, 8, 1, 1), torch.randn(4)
    call = functional.conv_call(2, weight, stride, 0, 1, 1)
    y = run(select(x, weight, call, "torch"), x, weight, bias)
    assert y.stride() == call.dense(x, weight, bias).stride()
    assert excess(y, x, weight, bias, call) <= 1.0


def test_scan_counts_rows():
    x = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 3.0]])
    scan = select(x, torch.randn(2, 3), LinearCall(), "torch").prescan(x, "embedding_bag")
    assert (scan.nonzero, scan.numel, scan.occupied, scan.words) == (3, 9, 2, 3)


def test_changed_weights_are_noticed():
    x, weight = torch.zeros(1, 64), torch.randn(32, 64)
    kernel = select(x, weight, LinearCall(), "torch")
    packed = kernel.pack(weight, "embedding_bag")
    assert all(kernel.matches(weight, packed, "embedding_bag", offset) for offset in range(70))
    weight[3, 5] += 1
    assert not all(kernel.matches(weight, packed, "embedding_bag", offset) for offset in range(70))


@pytest.mark.parametrize(
    ("x", "weight", "call", "reason"),
    [
        (torch.zeros(1, 4, 6, 6), torch.zeros(2, 4, 3, 3), (2, 1, 1, 1, 1), Reason.NO_ENGINE),
        (torch.zeros(1, 4, 6, 6), torch.zeros(4, 1, 1, 1), (2, 1, 0, 1, 4), Reason.NO_ENGINE),
        (torch.zeros(2, 4).half(), torch.zeros(3, 4).half(), None, Reason.DTYPE),
        (torch.zeros(2, 4, device="meta"), torch.zeros(3, 4, device="meta"), None, Reason.DEVICE),
    ],
)
def test_refusals_are_named(x, weight, call, reason):
    bound = LinearCall() if call is None else functional.conv_call(call[0], weight, *call[1:])
    found = select(x, weight, bound, "torch")
    assert isinstance(found, Refusal)
    assert found.reason is reason
    assert found.detail


_WITHOUT_ENGINE = """
import json, torch, sparseflow
from torch import nn
class Fire(nn.Module):
    def forward(self, v): return (v >= 1.0).to(v.dtype)
sparseflow.register_neuron(Fire)
net = nn.Sequential(Fire(), nn.Conv2d(8, 8, 3), Fire(), nn.Flatten(), nn.Linear(128, 9)).eval()
x = (torch.rand(2, 8, 6, 6) < 0.1) * 2.0
sparseflow.accelerate(net, x, mode="sparse")
with torch.no_grad(), sparseflow.verify(net) as watch:
    y = net(x)
try:
    sparseflow.accelerate(net, x, backend="cpu")
except sparseflow.BackendUnavailableError as error:
    refused = str(error)
print(json.dumps({"layers": [[l.name, l.path, l.reason] for l in sparseflow.report(net).layers],
                  "checked": watch.checked, "refused": refused}))
"""


def test_without_the_native_engine_everything_still_works():
    environment = {**os.environ, "SPARSEFLOW_NATIVE": "0"}
    run = subprocess.run([sys.executable, "-c", _WITHOUT_ENGINE], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["layers"] == [["1", "dense", str(Reason.NO_ENGINE)], ["4", "gather", str(Reason.FORCED)]]
    assert found["checked"] == 1
    assert "native engine is not available" in found["refused"]


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty_weights_are_looked_at_twice(shape):
    x, weight = torch.ones(3, shape[1]), torch.empty(shape)
    kernel = select(x, weight, LinearCall(), "torch")
    (variant,) = kernel.variants()
    packed = kernel.pack(weight, variant)
    assert kernel.matches(weight, packed, variant, 1)
    assert kernel.compute(x, kernel.prescan(x, variant), packed, None, variant).shape == (3, shape[0])
