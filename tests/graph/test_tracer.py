"""The traced graph does what the model does, on the example, on other sizes, and on a second call; or says why not."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparseflow.frameworks import NeuronSpec, register_neuron, unregister_neuron
from sparseflow.graph import TraceError, spike_map, trace

from .nets import Function


class Integrate(nn.Module):
    def __init__(self):
        super().__init__()
        self.v = None

    def forward(self, x):
        self.v = x if self.v is None or self.v.shape != x.shape else self.v + x
        spike = (self.v >= 1).to(x.dtype)
        self.v = self.v - spike
        return spike


@pytest.fixture(autouse=True)
def registered():
    register_neuron(Integrate)
    yield
    unregister_neuron(Integrate)


def rank_questions(_net, x):
    if x.dim() != 3 or x.ndim != 3 or len(x.shape) != 3 or not x.is_floating_point() or x.device.type == "meta":
        raise ValueError
    if x.dtype is torch.float16 or x.shape[0] == 7 or not isinstance(x.shape, tuple) or x.is_cuda:
        raise ValueError
    return x.flatten(0, 1) * len(x)


def sizes(_net, x):
    t, n, c = x.shape
    rows = torch.arange(t * n).to(x).view(t, n, 1)
    return (x + rows).reshape(t * n, c) + torch.zeros(x.shape).flatten(0, 1) + x.new_ones(t * n, c) * c**0.5


def aliases(_net, x):
    y = x * 2
    other = y
    y += x
    y[0] *= 0.5
    y[1] = x[0]
    return other


def factories(_net, x):
    buffer = torch.zeros(x.size(0), x.size(1))
    for t, step in enumerate(x.unbind(0)):
        buffer[t] = step.sum(-1)
    return buffer + torch.full_like(buffer, 3.0) + torch.tensor(0.5)


def containers(_net, x):
    parts = {"a": x[..., :2], "b": x[..., 2:]}
    low, high = parts["a"].sum(), parts["b"].max(-1)
    return {"low": low, "high": (high.values, high[1])}


def loops(net, x):
    return torch.stack([net.fc(net.sn(x[t])) for t in range(x.size(0))]) + sum(x[t].mean() for t in range(2))


FORWARDS = {f.__name__: f for f in (rank_questions, sizes, aliases, factories, containers, loops)}


def flat(value):
    return torch.utils._pytree.tree_leaves(value)


def reset(net):
    for module in net.modules():
        if isinstance(module, Integrate):
            module.v = None


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("batch", [2, 5])
def test_graph_equals_the_forward(name, batch):
    net = Function(FORWARDS[name], sn=Integrate(), fc=nn.Linear(4, 3))
    graph = trace(net, (torch.rand(3, 2, 4),))
    x = torch.rand(3, batch, 4)
    with torch.no_grad():
        expected = [flat(net(x.clone())), flat(net(x.clone() * 2))]
        reset(net)
        actual = [flat(graph(x.clone())), flat(graph(x.clone() * 2))]
    assert all(torch.equal(a, b) for xs, ys in zip(actual, expected, strict=True) for a, b in zip(xs, ys, strict=True))


class Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0.5).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_surrogate_functions_are_written_out():
    net = Function(lambda net, x: net.fc(Surrogate.apply(x)), fc=nn.Linear(4, 3))
    x = torch.rand(2, 4)
    assert torch.equal(trace(net, (torch.rand(2, 4),))(x), net(x))


def test_random_numbers_stay_random():
    graph = trace(Function(lambda _net, x: x + torch.rand(2)), (torch.zeros(2),))
    assert not torch.equal(graph(torch.zeros(2)), graph(torch.zeros(2)))


def test_graph_shares_modules_and_parameters():
    net = nn.Sequential(nn.Linear(2, 2), Integrate())
    graph = trace(net, (torch.rand(1, 2),))
    assert graph.get_submodule("0").weight is net[0].weight
    assert graph.get_submodule("1") is net[1]


class Signature(nn.Module):
    def forward(self, x, gain=2.0, *rest, bias=None, **more):
        y = x * gain + sum(rest)
        return y + bias + more["extra"] if bias is not None else y


def test_call_signature_is_kept():
    x, b = torch.rand(3), torch.rand(3)
    net = Signature()
    graph = trace(net, (x, 3.0, b), {"bias": b, "extra": x})
    assert torch.equal(graph(x, 3.0, b, bias=b, extra=x), net(x, 3.0, b, bias=b, extra=x))
    graph = trace(net, (x,))
    assert torch.equal(graph(x), net(x))


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Unregistered(nn.Module):
    def __init__(self):
        super().__init__()
        self.v = 0.0

    def forward(self, x):
        self.v = self.v + x
        return (self.v > 1).float()


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.record = []

    def forward(self, x):
        self.record.append(x)
        return x


def autocast(_net, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.linear(x, x)


def branches(_net, x):
    return x if x.sum() > 0 else -x


REFUSED = {
    "values decide": (lambda: Function(branches), "depends on the values"),
    "values read": (lambda: Function(lambda _net, x: x * x.max().item()), "reads tensor values"),
    "autocast": (lambda: Function(autocast), "autocast"),
    "counts calls": (lambda: nn.Sequential(Counter()), "keeps state in calls"),
    "hand-written memory": (lambda: nn.Sequential(Unregistered()), "keeps state in v; register it"),
    "keeps its input": (lambda: nn.Sequential(Keeps()), "keeps state in record"),
    "single layer": (lambda: nn.Linear(3, 3), "single Linear"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_cannot_hold_is_refused_with_the_reason(name):
    make, reason = REFUSED[name]
    net = make()
    before = {key: dict(module.__dict__) for key, module in net.named_modules()}
    with pytest.raises(TraceError, match=reason):
        trace(net, (torch.rand(3, 3),))
    assert before == {key: dict(module.__dict__) for key, module in net.named_modules()}
    found = spike_map(net, (torch.rand(3, 3),))
    assert found.method == "dynamic"
    assert reason.split(";")[0] in found.fallback_detail


def test_a_graph_that_took_another_branch_is_not_handed_out():
    """A traced tensor is no ``torch.Tensor``, and a forward may ask."""
    net = Function(lambda _net, x: x * 2 if isinstance(x, torch.Tensor) else x * 3)
    with pytest.raises(TraceError, match="differs from the model"):
        trace(net, (torch.rand(3),))


def test_reading_a_membrane_is_refused():
    net = Function(lambda n, x: n.sn(x) + n.sn.mem, sn=Buffered())
    register_neuron(Buffered, NeuronSpec(states=("mem",)))
    try:
        with pytest.raises(TraceError, match="reads mem of sn directly"):
            trace(net, (torch.rand(3),))
    finally:
        unregister_neuron(Buffered)


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mem", torch.zeros(3))

    def forward(self, x):
        self.mem = self.mem + x
        return (self.mem > 1).float()


def test_other_threads_are_not_traced():
    bystander, done = nn.Linear(2, 2), []

    def forward(net, x):
        worker = threading.Thread(target=lambda: done.append(bystander(torch.ones(1, 2)) + torch.zeros(1)))
        worker.start()
        worker.join()
        return net.fc(x)

    graph = trace(Function(forward, fc=nn.Linear(2, 2)), (torch.rand(1, 2),))
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]
    assert type(done[0]) is torch.Tensor
