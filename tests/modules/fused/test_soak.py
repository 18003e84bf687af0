"""Ten thousand calls of a small fused net that carries its state: equal at the end, and nothing grows."""

from __future__ import annotations

import gc
import resource
import sys

import pytest
import torch
from torch import nn

from sparseflow.modules.fused.model import fusion_of

from .nets import (
    Net,
    assert_equal,
    assert_twins,
    conv,
    features,
    iff,
    images,
    is_fused,
    leaky,
    lif,
    linear,
    norm,
    on_grid,
    outputs,
    program,
    spikes,
    states,
    stem,
    twins,
)

CALLS, STEPS = 5000, 2
WARM = 200


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def pooled(model: nn.Module) -> int:
    return sum(map(len, program(model).ops.pool._free.values()))


def resident_kib() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


def residual_net() -> nn.Module:
    """Sums of spikes, pooling, a dense island and an unpack: everything that takes buffers."""

    def run(m, x):
        s = spikes(m, x)
        t = m.n1(m.b1(m.c1(s)) + s) + s
        y = m.fc(nn.functional.max_pool2d(s.flatten(0, 1), 2).unflatten(0, (STEPS, 1)).flatten(2))
        return m.n2(m.c2(t)), m.n3(y), t.mean()

    parts = {"c1": conv(8, 8), "b1": norm(8), "n1": lif(), "c2": conv(8, 4), "n2": iff(), "n3": lif()}
    return Net(run, **stem(), **parts, fc=linear(32, 8))


def loop_net() -> nn.Module:
    def run(m, x):
        return torch.stack([m.n2(m.f2(m.n1(m.f1(step)))) for step in x])

    neurons = {name: leaky(init_hidden=True) for name in ("n1", "n2")}
    return Net(run, f1=nn.Linear(6, 16), f2=nn.Linear(16, 4), **neurons)


@pytest.mark.parametrize(
    ("make", "example"),
    [(residual_net, images(STEPS, 1, size=4)), (loop_net, features(STEPS, 1))],
    ids=["conv", "loop"],
)
def test_a_stream(make, example):
    dense, ours = twins(on_grid(make()), example)
    stream = torch.randint(-8, 24, (16, *example.shape), generator=torch.Generator().manual_seed(3)) / 8
    assert_twins(dense, ours, example, calls=1)
    before = None
    for call in range(CALLS):
        x = stream[call % 16]
        found = outputs(ours, x)
        if call % 10 == 0 or call == CALLS - 1:
            assert_equal(found, outputs(dense, x))
        else:
            outputs(dense, x)
        if call == WARM:
            plan, before = program(ours), (tensors(), pooled(ours), resident_kib())
    assert is_fused(ours)
    assert program(ours) is plan
    assert tensors() <= before[0] + 16
    assert pooled(ours) <= before[1]
    assert resident_kib() < before[2] + 8 * 1024
    assert len(fusion_of(ours).plans) == 1
    for name, value in states(dense).items():
        assert torch.equal(states(ours)[name], value)
