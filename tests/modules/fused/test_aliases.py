"""Writes in place, views, and several names for one tensor: what others read is what they would have read."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .nets import (
    Net,
    assert_equal,
    assert_twins,
    check,
    conv,
    features,
    fresh,
    iff,
    images,
    is_fused,
    kinds,
    leaky,
    lif,
    linear,
    norm,
    on_grid,
    program,
    spikes,
    stem,
    twins,
)

pytestmark = pytest.mark.filterwarnings("ignore::sparseflow.NothingAcceleratedWarning")


def two_layers(run):
    return Net(run, **stem(), c1=conv(8, 8), n1=lif(), c2=conv(8, 8), b2=norm(8), n2=iff(), act=nn.ReLU(inplace=True))


WRITES = {
    "mul_": lambda m, s: s.mul_(2),
    "relu_": lambda m, s: s.relu_(),
    "inplace module": lambda m, s: m.act(s),
    "inplace function": lambda m, s: F.hardtanh(s, 0.0, 0.5, inplace=True),
    "out": lambda m, s: torch.add(s, 1, out=s),
    "view": lambda m, s: s.view(-1).mul_(2),
    "flatten": lambda m, s: s.flatten(0, 1).add_(1),
    "permuted": lambda m, s: s.permute(1, 0, 2, 3, 4).mul_(3),
    "item": lambda m, s: s[0].zero_(),
    "slice": lambda m, s: s[:, :, 2:4].fill_(1),
    "setitem": lambda m, s: operator.setitem(s, (slice(None), 0), 0.5),
    "setitem by mask": lambda m, s: operator.setitem(s, s == 0, 0.25),
    "chunk": lambda m, s: s.chunk(2, 2)[1].mul_(2),
    "unbind": lambda m, s: s.unbind(0)[1].add_(1),
    "masked_fill_": lambda m, s: s.masked_fill_(s > 0, 2.0),
    "data": lambda m, s: s.data.mul_(2),
    "iadd": lambda m, s: operator.iadd(s, 1.0),
    "iadd spikes": lambda m, s: operator.iadd(s, m.n2(m.c2(s))),
    "copy_": lambda m, s: s.copy_(m.c2(s)),
    "index_fill_": lambda m, s: s.index_fill_(2, torch.tensor([1, 3]), 0.5),
    "clamp_": lambda m, s: torch.clamp_(s, max=0.5),
}


@pytest.mark.parametrize("others", ["before", "after"])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_into_spikes_that_a_layer_reads(name, others):
    def run(m, x):
        s = spikes(m, x)
        if others == "after":
            WRITES[name](m, s)
            return m.n1(m.c1(s)), s
        y = m.c1(s)
        WRITES[name](m, s)
        return m.n1(y), s.sum(), m.b2(s)

    check(two_layers(run), images())


@pytest.mark.parametrize("name", WRITES)
def test_a_write_into_spikes_that_nobody_else_reads(name):
    def run(m, x):
        return WRITES[name](m, spikes(m, x)) if name[:3] != "set" else x

    check(two_layers(run), images())


def test_what_a_norm_reads_is_written_to_before_the_neuron():
    def run(m, x):
        y = m.c0(x)
        z = m.b2(y)
        y += 1
        return m.n1(m.c1(m.n0(z))) + y

    check(two_layers(run), images())


@pytest.mark.parametrize("view", [lambda r: r, lambda r: r.view(-1), lambda r: r[1:], lambda r: r.transpose(0, 1)])
def test_a_residual_is_written_to_between_addition_and_neuron(view):
    def run(m, x):
        s = spikes(m, x)
        r = m.c2(s)
        y = m.c1(s) + r
        view(r).add_(1)
        return m.n1(y), r

    check(two_layers(run), images())


def test_an_addition_in_place_into_a_part_of_something():
    def run(m, x):
        s = spikes(m, x)
        whole = torch.cat([m.c2(s), m.c2(s)], dim=-1)
        part = whole[..., :8]
        part += m.c1(s)
        return m.n1(part), whole

    check(two_layers(run), images())


def test_a_shortcut_that_is_added_to():
    """``identity += y`` instead of ``y += identity``."""

    def run(m, x):
        s = spikes(m, x)
        identity = m.c2(s)
        t = m.n2(identity)
        identity += m.b2(m.c1(t))
        return m.n1(identity)

    check(two_layers(run), images())


def test_a_view_of_a_layers_result_is_written_to():
    def run(m, x):
        y = m.c1(spikes(m, x))
        y.view(3, -1).mul_(2)
        return m.n1(y), y

    check(two_layers(run), images())


def test_an_input_that_the_model_writes_into():
    def run(m, x):
        y = m.c0(x)
        x *= 0.5
        return m.n1(m.c1(m.n0(y))) + x.sum()

    dense, ours = twins(on_grid(two_layers(run)), images())
    a, b = images(), images()
    with torch.no_grad():
        assert_equal([ours(a)], [dense(b)])
    assert_equal([a], [b])


def test_the_result_of_a_call_is_the_callers():
    """Writing into it changes neither the next result nor the state."""

    def run(m, x):
        s = spikes(m, x)
        return s, m.c1(s), m.n1(m.c2(s)), F.avg_pool2d(s.flatten(0, 1), 2)

    dense, ours = twins(on_grid(two_layers(run)), images())
    for _ in range(3):
        with torch.no_grad():
            expected, found = dense(images()), ours(images())
        assert_equal(found, expected)
        for tensor in found:
            tensor.fill_(float("nan"))


def test_results_of_earlier_calls_stay_what_they_were():
    dense, ours = twins(on_grid(two_layers(lambda m, x: m.n1(m.c1(spikes(m, x))))), images())
    with torch.no_grad():
        found = [ours(images(seed=seed)) for seed in range(4)]
        assert_equal(found, [dense(images(seed=seed)) for seed in range(4)])


# ---- views and parts of spikes

VIEWS = {
    "permute": lambda s: s.permute(1, 0, 2, 3, 4).contiguous(),
    "swap channels and rows": lambda s: s.transpose(2, 3),
    "slice of channels": lambda s: torch.cat([s[:, :, :4], s[:, :, 4:]], 2),
    "every second step": lambda s: torch.cat([s[::2], s[1:2]]),
    "flip": lambda s: s.flip(0),
    "indexed": lambda s: s[torch.tensor([2, 0, 1])],
    "roll": lambda s: s.roll(1, -1),
    "expand": lambda s: s[:1].expand(3, -1, -1, -1, -1),
    "repeat": lambda s: s.amax(0, keepdim=True).repeat(3, 1, 1, 1, 1),
    "pad": lambda s: F.pad(s, (1, 0, 0, 1))[..., 1:, :-1],
    "torn apart": lambda s: s.view(3, 2, 4, 2, 8, 8).transpose(2, 3).reshape(3, 2, 8, 8, 8),
    "there and back": lambda s: s.flatten(0, 1).unsqueeze(0).squeeze(0).unflatten(0, (3, 2)),
    "flattened and back": lambda s: s.flatten(2).view(3, 2, 8, 8, 8),
    "as integers": lambda s: s.view(torch.int32).view(torch.float32),
    "as bool": lambda s: s.bool().float(),
    "clone": lambda s: s.clone(),
    "where": lambda s: torch.where(s > 0, s, -s),
    "upsampled": lambda s: F.interpolate(s[..., ::2, ::2].flatten(0, 1), scale_factor=2.0).unflatten(0, (3, 2)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_layer_behind_a_view(name):
    model = check(two_layers(lambda m, x: m.n1(m.c1(VIEWS[name](spikes(m, x))))), images())
    assert is_fused(model)
    if name == "there and back":
        assert "Eager" not in kinds(model)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_as_result(name):
    check(two_layers(lambda m, x: VIEWS[name](spikes(m, x))), images())


@pytest.mark.parametrize("shape", [(3, -1), (6, 512), (-1,), (3, 2, 8, 64), (2, 3, 8, 8, 8)])
@pytest.mark.parametrize("what", ["spikes", "layer", "pool", "arithmetic"])
def test_view_wants_contiguous_memory(shape, what):
    def run(m, x):
        s = spikes(m, x)
        of = {
            "spikes": s,
            "layer": m.c1(s),
            "pool": F.avg_pool2d(s.flatten(0, 1), 1),
            "arithmetic": torch.sin(s * 2),
        }
        return of[what].view(*shape)

    check(two_layers(run), images())


def test_a_module_of_the_user_asks_for_a_view():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = nn.Buffer(torch.zeros(1))

        def forward(self, x):
            return x.view(x.shape[0], -1).sum(1)

    net = two_layers(lambda m, x: (m.head(spikes(m, x)), m.head(m.c1(spikes(m, x)))))
    net.add_module("head", Head())
    check(net, images())


# ---- inputs and outputs


def test_several_inputs_and_a_dictionary_of_results():
    def run(m, x, gain, *more, bias=None, scale=2.0):
        s = m.n1(m.c1(spikes(m, x)) * gain)
        total = s * scale + (0 if bias is None else bias)
        return {"spikes": s, "more": [total, *more], "none": None, "number": scale}

    check(two_layers(run), images(), torch.tensor(0.5), torch.ones(2), torch.zeros(3))
    dense, ours = twins(on_grid(two_layers(run)), x=images(), gain=torch.tensor(0.5), bias=torch.ones(1))
    assert_twins(dense, ours, x=images(), gain=torch.tensor(2.0), bias=torch.ones(1))
    assert is_fused(ours)
    assert_twins(dense, ours, x=images(), gain=torch.tensor(2.0), bias=torch.ones(1), scale=3.0, calls=4)
    assert program(ours)


def test_an_input_list_of_tensors():
    check(two_layers(lambda m, xs: m.n1(m.c1(spikes(m, xs[0] + xs[1])))), [images(), images(seed=3)])


def test_parameters_and_buffers_in_the_forward():
    net = two_layers(lambda m, x: m.n1(m.c1(spikes(m, x)) * m.gain + m.shift))
    net.gain, net.shift = nn.Parameter(torch.tensor(0.5)), nn.Buffer(torch.ones(8, 1, 1))
    net.plain = torch.tensor(0.25)
    net.run = lambda m, x: m.n1(m.c1(spikes(m, x)) * m.gain + m.shift * m.plain)
    dense, ours = twins(on_grid(net), images())
    assert_twins(dense, ours, images())
    for model in (dense, ours):
        with torch.no_grad():
            model.gain.mul_(2)
            model.shift.add_(0.5)
            model.plain = torch.tensor(0.75)
    assert_twins(dense, ours, images())
    assert is_fused(ours)


def test_spikes_times_membrane_of_a_loop():
    """The membrane of every step, its last one, and states that are given."""

    def run(m, x, mem):
        found = []
        for t in range(4):
            s, mem = m.n1(m.f1(x[t]), mem)
            found.append(s * mem)
        return torch.stack(found), mem

    net = Net(run, f1=nn.Linear(6, 16), n1=leaky(reset_mechanism="zero"))
    model = check(net, features(4), torch.ones(2, 16) / 4)
    assert is_fused(model)


@pytest.mark.parametrize("x", [features(4, batch=16), images(2, size=4)[:, :, :, :, 0].contiguous()])
def test_one_dimension_and_none(x):
    """Linear layers over several leading dimensions, and 1-d convolutions."""
    if x.dim() == 3:
        net = Net(lambda m, x: m.n1(m.f1(m.n0(m.f0(x)))), f0=linear(6, 8), n0=iff(), f1=linear(8, 8), n1=lif())
    else:
        parts = {"c0": nn.Conv1d(3, 8, 3, padding=1), "c1": nn.Conv1d(8, 8, 3), "n0": iff(), "n1": lif()}

        def run(m, x):
            s = m.n0(m.c0(x.flatten(0, 1)).unflatten(0, (2, 2)))
            return m.n1(m.c1(s.flatten(0, 1)).unflatten(0, (2, 2)))

        net = Net(run, **parts)
    assert kinds(check(net, x))["Block"] == 2
    assert fresh(x) is not x
