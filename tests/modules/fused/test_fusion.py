"""Which nodes of a graph become one block, and that the blocks compute what the nodes did."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import layer
from torch import nn

from sparseflow.graph.steps import Unpack

from .nets import (
    Net,
    check,
    conv,
    features,
    iff,
    images,
    kinds,
    leaky,
    lif,
    linear,
    norm,
    outputs,
    program,
    spikes,
    stem,
)

pytestmark = pytest.mark.filterwarnings("ignore::sparseflow.NothingAcceleratedWarning")


def plain(run, x=None, **parts):
    """A net behind :func:`stem`, and its input."""
    return Net(run, **stem(), **parts), images() if x is None else x


def conv_bn_lif():
    return plain(lambda m, x: m.n1(m.b1(m.c1(spikes(m, x)))), c1=conv(8, 8), b1=norm(8), n1=lif())


def residual_of_spikes():
    def run(m, x):
        s = spikes(m, x)
        return m.n1(m.b1(m.c1(s)) + s)

    return plain(run, c1=conv(8, 8), b1=norm(8), n1=lif())


def residual_of_a_dense_tensor():
    """A shortcut with a layer of its own is a block without a neuron."""

    def run(m, x):
        s = spikes(m, x)
        return m.n1(m.b1(m.c1(s)) + m.b2(m.c2(s)))

    return plain(run, c1=conv(8, 8), b1=norm(8), c2=conv(8, 8, 1), b2=norm(8), n1=lif())


def downsample():
    def run(m, x):
        s = spikes(m, x)
        return m.n2(m.b2(m.c2(m.n1(m.c1(s)))) + m.b3(m.c3(s)))

    parts = {"c1": conv(8, 16, stride=2), "n1": iff(), "c2": conv(16, 16), "b2": norm(16), "n2": iff()}
    return plain(run, **parts, c3=conv(8, 16, 1, stride=2), b3=norm(16))


def residual_in_place():
    def run(m, x):
        s = spikes(m, x)
        y = m.c1(s)
        y += s
        return m.n1(y)

    return plain(run, c1=conv(8, 8), n1=lif())


def sew(combine):
    def run(m, x):
        s = spikes(m, x)
        return m.c2(combine(m.n1(m.c1(s)), s))

    return plain(run, c1=conv(8, 8), n1=iff(v_threshold=0.5), c2=conv(8, 4))


def ms_resnet():
    """Membranes are added up, every block begins with its neuron."""

    def run(m, x):
        v = m.c0(x)
        v = v + m.b1(m.c1(m.n0(v)))
        v = v + m.b2(m.c2(m.n1(v)))
        return m.n2(v)

    parts = {"c1": conv(8, 8), "b1": norm(8), "n1": iff(), "c2": conv(8, 8), "b2": norm(8), "n2": iff()}
    return plain(run, **parts)


def pooled(pool):
    return lambda: plain(lambda m, x: m.n1(m.c1(m.pool(spikes(m, x)))), pool=pool(), c1=conv(8, 8), n1=iff())


def pooled_by(function):
    """Functions take images, not sequences of them."""

    def run(m, x):
        s = function(spikes(m, x).flatten(0, 1)).unflatten(0, (3, 2))
        return m.n1(m.c1(s))

    return lambda: plain(run, c1=conv(8, 8), n1=iff())


def flattened():
    return plain(lambda m, x: m.n1(m.fc(spikes(m, x).flatten(2))), fc=linear(512, 16), n1=lif())


def averaged_and_viewed():
    """An average is channels last in memory, of which ``view`` wants contiguous."""

    def run(m, x):
        y = F.avg_pool2d(spikes(m, x).flatten(0, 1), 2)
        return m.fc(y.view(y.size(0), -1))

    return plain(run, fc=nn.Linear(128, 5))


def concatenated():
    def run(m, x):
        s = spikes(m, x)
        return m.n2(m.c2(torch.cat([s, m.n1(m.c1(s))], dim=2)))

    return plain(run, c1=conv(8, 24), n1=iff(), c2=conv(32, 8), n2=lif())


def concatenated_along_pixels():
    def run(m, x):
        s = spikes(m, x)
        return m.n2(m.c2(torch.cat([s, m.n1(m.c1(s))], dim=-1)))

    return plain(run, c1=conv(8, 8), n1=iff(), c2=conv(8, 8), n2=lif())


def vgg():
    features_ = nn.Sequential(
        *(conv(3, 8), norm(8), iff(), conv(8, 16), norm(16), iff(), layer.MaxPool2d(2, step_mode="m")),
        *(conv(16, 16), norm(16), iff(), layer.MaxPool2d(2, step_mode="m")),
    )
    head = nn.Sequential(layer.Flatten(step_mode="m"), linear(64, 32), iff(), layer.Dropout(step_mode="m"))
    net = Net(lambda m, x: m.out(m.head(m.features(x))).mean(0), features=features_, head=head, out=linear(32, 5))
    return net, images(4)


def used_twice():
    """One layer and one neuron, called twice."""

    def run(m, x):
        s = m.n1(m.c1(spikes(m, x)))
        return m.n1(m.c1(s)) + s

    return plain(run, c1=conv(8, 8), n1=lif())


def spikes_read_twice():
    def run(m, x):
        s = spikes(m, x)
        return m.n1(m.c1(s)), m.n2(m.c2(s))

    return plain(run, c1=conv(8, 8), n1=lif(), c2=conv(8, 4), n2=iff())


def no_neuron_behind():
    return plain(lambda m, x: m.b1(m.c1(spikes(m, x))), c1=conv(8, 8), b1=norm(8))


def norm_of_another_dimension():
    """The last dimension is what the linear layers have as channels, and the first of three what the norm has."""
    parts = {"f0": linear(6, 8), "n0": iff(), "f1": linear(8, 8), "n1": iff()}
    norm1d = layer.BatchNorm1d(8, step_mode="m")
    x = features(3, 16).view(3, 2, 8, 6)
    return Net(lambda m, x: m.n1(m.b1(m.f1(m.n0(m.f0(x))).transpose(-1, -2))), **parts, b1=norm1d), x


def unrolled_loop():
    """snnTorch passes states along: the loop becomes one call per layer."""

    def run(m, x):
        mem1, mem2 = m.n1.init_leaky(), m.n2.init_leaky()
        out = []
        for t in range(len(x)):
            s, mem1 = m.n1(m.f1(x[t]), mem1)
            s, mem2 = m.n2(m.f2(s), mem2)
            out.append(s)
        return torch.stack(out), mem2

    return Net(run, f1=nn.Linear(6, 16), n1=leaky(), f2=nn.Linear(16, 4), n2=leaky()), features(5)


def hidden_loop():
    def run(m, x):
        return torch.stack([m.body(step) for step in x.unbind(0)])

    body = nn.Sequential(nn.Linear(6, 16), leaky(init_hidden=True), nn.Linear(16, 4), leaky(init_hidden=True))
    return Net(run, body=body), features(4)


def membranes_of_a_loop():
    def run(m, x):
        mem = m.n1.init_leaky()
        out = []
        for t in range(len(x)):
            _, mem = m.n1(m.f1(x[t]), mem)
            out.append(mem)
        return torch.stack(out)

    return Net(run, f1=nn.Linear(6, 16), n1=leaky(reset_mechanism="zero")), features(5)


def one_time_step():
    return Net(lambda m, x: m.n1(m.c1(spikes(m, x))), **stem(), c1=conv(8, 8), n1=lif()), images(1)


_SEW = {
    "add": lambda a, b: a + b,
    "and": lambda a, b: a * b,
    "iand": lambda a, b: a * (1.0 - b),
}
CASES = {
    "conv_bn_lif": (conv_bn_lif, {"Block": 2, "Unpack": 1}),
    "residual_of_spikes": (residual_of_spikes, {"Block": 2, "Unpack": 1}),
    "residual_of_a_dense_tensor": (residual_of_a_dense_tensor, {"Block": 3, "Unpack": 1}),
    "downsample": (downsample, {"Block": 4, "Unpack": 1}),
    "residual_in_place": (residual_in_place, {"Block": 2, "Unpack": 1}),
    **{f"sew_{op}": (lambda f=f: sew(f), {"Block": 3, "Combine": 1}) for op, f in _SEW.items()},
    "ms_resnet": (ms_resnet, {"Block": 4, "Eager": 1, "Unpack": 1}),
    "max_pool": (pooled(lambda: layer.MaxPool2d(3, 2, 1, step_mode="m")), {"Block": 2, "Pool": 1, "Unpack": 1}),
    "avg_pool": (pooled(lambda: layer.AvgPool2d(2, step_mode="m")), {"Block": 2, "Pool": 1, "Unpack": 1}),
    "adaptive": (pooled(lambda: layer.AdaptiveAvgPool2d(4, step_mode="m")), {"Block": 2, "Pool": 1, "Unpack": 1}),
    "ceil_mode": (
        pooled(lambda: layer.MaxPool2d(3, 2, ceil_mode=True, step_mode="m")),
        {"Block": 2, "Unpack": 2, "Eager": 1},
    ),
    "F.max_pool2d": (pooled_by(lambda s: F.max_pool2d(s, 2)), {"Block": 2, "Pool": 1, "Unpack": 1}),
    "F.avg_pool2d": (
        pooled_by(lambda s: F.avg_pool2d(s, 2, 2, 1, count_include_pad=False)),
        {"Block": 2, "Pool": 1, "Eager": 1, "Unpack": 1},
    ),
    "F.adaptive": (
        pooled_by(lambda s: F.adaptive_avg_pool2d(s, (2, 4))),
        {"Block": 2, "Pool": 1, "Eager": 1, "Unpack": 1},
    ),
    "flattened": (flattened, {"Block": 2, "Unpack": 1}),
    "averaged_and_viewed": (averaged_and_viewed, {"Block": 1, "Pool": 1, "Eager": 3}),
    "concatenated": (concatenated, {"Block": 3, "Combine": 1, "Unpack": 1}),
    "concatenated_along_pixels": (concatenated_along_pixels, {"Block": 3, "Unpack": 3, "Eager": 1}),
    "vgg": (vgg, {"Block": 4, "Pool": 2, "Unpack": 1, "Eager": 2}),
    "used_twice": (used_twice, {"Block": 3, "Combine": 1, "Unpack": 1}),
    "spikes_read_twice": (spikes_read_twice, {"Block": 3, "Unpack": 2}),
    "no_neuron_behind": (no_neuron_behind, {"Block": 2}),
    "norm_of_another_dimension": (norm_of_another_dimension, {"Block": 3, "Eager": 2, "Unpack": 1}),
    "unrolled_loop": (unrolled_loop, {"Block": 2, "Unpack": 1, "Eager": 4}),
    "hidden_loop": (hidden_loop, {"Block": 2, "Unpack": 1, "Eager": 1}),
    "membranes_of_a_loop": (membranes_of_a_loop, {"Block": 1, "Eager": 2}),
    "one_time_step": (one_time_step, {"Block": 2, "Unpack": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_and_results(name):
    build, expected = CASES[name]
    assert kinds(check(*build())) == expected


def blocks(model):
    """Layer, norm, kind of residual and neuron of every block."""
    found = []
    for block in program(model).fused.blocks:
        residual = None if block.residual is None else "spikes" if block.residual.packed else "dense"
        found.append((block.layer, block.norm, residual, block.neuron))
    return found


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (conv_bn_lif, ("c1", "b1", None, "n1")),
        (residual_of_spikes, ("c1", "b1", "spikes", "n1")),
        (residual_of_a_dense_tensor, ("c1", "b1", "dense", "n1")),
        (residual_in_place, ("c1", None, "spikes", "n1")),
        (flattened, ("fc", None, None, "n1")),
    ],
)
def test_what_the_last_block_takes_along(build, expected):
    assert blocks(check(*build()))[-1] == expected


def test_all_time_steps_of_a_loop_are_one_call():
    model = check(*unrolled_loop())
    assert {block.steps for block in program(model).fused.blocks} == {5}


def test_a_shortcut_with_a_layer_is_one_block():
    assert ("c3", "b3", None, None) in blocks(check(*downsample()))


def test_one_unpack_however_many_look():
    def run(m, x):
        s = spikes(m, x)
        return s.mean(), s.sin(), s, torch.sigmoid(s), m.c1(s)

    model = check(*plain(run, c1=conv(8, 8)))
    unpacks = [step for step in program(model).fused.steps if isinstance(step, Unpack)]
    assert len(unpacks) == 1


def test_no_unpack_where_nobody_looks():
    assert "Unpack" not in kinds(check(*no_neuron_behind()))


def test_spikes_that_nobody_reads_still_move_the_membrane():
    def run(m, x):
        s = spikes(m, x)
        m.n1(m.c1(s))
        return s

    model = check(*plain(run, c1=conv(8, 8), n1=lif()))
    assert model.n1.v.any()


def test_wide_sums_of_spikes_stay_packed_up_to_255():
    def run(m, x):
        s = spikes(m, x)
        for _ in range(8):
            s = s + s
        return m.c1(s)

    model = check(*plain(run, c1=conv(8, 8)))
    assert kinds(model)["Combine"] == 7
    assert [step.source.packed.most for step in program(model).fused.steps if isinstance(step, Unpack)] == [128]


def test_dropout_is_nothing_in_eval_mode_and_itself_in_training_mode():
    net = Net(lambda m, x: m.c1(m.drop(spikes(m, x))), **stem(), c1=conv(8, 8), drop=nn.Dropout(0.5))
    model = check(net, images())
    assert kinds(model) == {"Block": 2}
    model.drop.train()
    found = [outputs(model, images())[0] for _ in range(4)]
    assert not torch.equal(found[2], found[3])
    assert kinds(model)["Eager"] == 2  # the dropout, and the layer behind it


def test_a_subclass_of_a_known_layer_with_a_forward_of_its_own_is_called():
    class Twice(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    net = Net(lambda m, x: m.n1(m.c1(spikes(m, x).flatten(0, 1)).view(3, 2, 8, 6, 6)), **stem(), n1=lif())
    net.add_module("c1", Twice(8, 8, 3, bias=False))
    assert ("c1", None, None, "n1") not in blocks(check(net, images()))


def test_an_identity_that_was_given_another_forward_is_called():
    net, x = plain(lambda m, x: m.c1(m.same(spikes(m, x))), c1=conv(8, 8), same=nn.Identity())
    net.same.forward = lambda s: s * 3
    assert kinds(check(net, x))["Eager"] == 2
