"""A forward pass undone bit for bit."""

from __future__ import annotations

import collections
import random

import numpy as np
import pytest
import torch
from torch import nn

from sparseflow.frameworks import restore_state, snapshot_state


class Recorder(nn.Module):
    """Keeps state in every kind of place a hand-written module does."""

    def __init__(self):
        super().__init__()
        self.v, self.calls, self.log, self.by_step = 0.0, 0, [], {}
        self.plain = torch.zeros(2)
        self.register_buffer("trace", torch.zeros(2))

    def forward(self, x):
        self.v = self.v + x
        self.calls += 1
        self.log.append(x)
        self.by_step[self.calls] = [x]
        self.plain += x.sum(0)
        self.trace = self.trace + x.sum(0)
        self.late = x
        return x * torch.rand(2) * random.random() * float(np.random.rand())


def observable(net):
    return {name: value for name, value in net.__dict__.items() if name not in ("_parameters", "_modules")}


def test_every_kind_of_state_comes_back():
    net = Recorder()
    net(torch.ones(3, 2))
    saved = snapshot_state(net)
    objects = observable(net)
    plain, trace = net.plain.clone(), net.trace.clone()
    first = net(torch.ones(3, 2))
    net(torch.ones(1, 2))
    restore_state(net, saved)
    assert {name: id(value) for name, value in observable(net).items()} == {n: id(v) for n, v in objects.items()}
    assert (net.calls, len(net.log), list(net.by_step)) == (1, 1, [1])
    assert torch.equal(net.plain, plain)
    assert torch.equal(net.trace, trace)
    assert torch.equal(net(torch.ones(3, 2)), first), "the same random numbers again"


def test_named_tuples_stay_what_they_are():
    """DistributedDataParallel keeps its configuration in one."""
    Config = collections.namedtuple("Config", "trace, rank")
    net = nn.Identity()
    config = net.config = Config(torch.zeros(2), 3)
    saved = snapshot_state(net)
    net.config.trace.add_(1.0)
    net.config = None
    restore_state(net, saved)
    assert net.config is config
    assert torch.equal(config.trace, torch.zeros(2))


def test_batch_norm_statistics_come_back():
    net = nn.BatchNorm2d(3)
    saved = snapshot_state(net)
    statistics = net.running_var
    net(torch.randn(4, 3, 2, 2))
    assert not torch.equal(net.running_mean, torch.zeros(3))
    restore_state(net, saved)
    assert net.running_var is statistics
    assert torch.equal(statistics, torch.ones(3))
    assert int(net.num_batches_tracked) == 0


def test_spikingjelly_memories_come_back():
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    from spikingjelly.activation_based import layer, neuron

    net = nn.Sequential(neuron.LIFNode(store_v_seq=True), layer.Dropout(0.5))
    functional.set_step_mode(net, "m")
    saved = snapshot_state(net)
    first = net(torch.rand(4, 2, 3) * 4)
    restore_state(net, saved)
    assert (net[0].v, net[0].v_seq, net[1].mask) == (0.0, None, None)
    net(torch.rand(4, 2, 3) * 4)
    mid = snapshot_state(net)
    v, mask = net[0].v.clone(), net[1].mask.clone()
    net(torch.rand(4, 2, 3) * 4)
    functional.reset_net(net)
    restore_state(net, mid)
    assert torch.equal(net[0].v, v)
    assert torch.equal(net[1].mask, mask)
    assert first.shape == (4, 2, 3)


def test_snapshot_of_another_model_is_refused():
    with pytest.raises(ValueError, match="another model"):
        restore_state(nn.Linear(1, 1), snapshot_state(nn.Linear(1, 1)))
