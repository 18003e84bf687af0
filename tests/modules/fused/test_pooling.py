"""A max pooling between a layer and its neuron is part of their block, and the results stay what they are."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import layer
from torch import nn

import sparseflow

from .nets import (
    Net,
    assert_equal,
    assert_twins,
    check,
    conv,
    iff,
    images,
    kinds,
    leaky,
    lif,
    norm,
    on_grid,
    outputs,
    program,
    spikes,
    stem,
    twins,
)

pytestmark = pytest.mark.filterwarnings("ignore::sparseflow.NothingAcceleratedWarning")
EXAMPLES = Path(__file__).parents[3] / "examples"


def pool(kernel=2, **options):
    return layer.MaxPool2d(kernel, **{"step_mode": "m", **options})


def pooled(step, width=12, behind=lambda m, y: m.n1(y), **parts):
    """A net whose second convolution is pooled by ``m.pool`` in front of its neuron."""
    parts = {"c1": conv(8, width), "pool": step, "n1": lif(v_threshold=0.5), **parts}
    return Net(lambda m, x: behind(m, m.pool(m.c1(spikes(m, x)))), **stem(), **parts)


def pools(model):
    """Window of every block that pools."""
    return [block.pool.window for block in program(model).fused.blocks if block.pool is not None]


# ---- what becomes one block


def with_norm():
    return pooled(nn.Sequential(norm(12), pool())), [(1, 2, 2)], {"Block": 2, "Unpack": 1}


def a_function_on_images():
    net = pooled(nn.Identity(), behind=lambda m, y: m.n1(F.max_pool2d(y.flatten(0, 1), 2).unflatten(0, (3, 2))))
    return net, [(1, 2, 2)], {"Block": 2, "Unpack": 1}


def an_addition_in_front():
    def run(m, x):
        s = spikes(m, x)
        return m.n1(m.pool(m.b1(m.c1(s)) + s))

    return Net(run, **stem(), c1=conv(8, 8), b1=norm(8), pool=pool(3), n1=lif()), [(1, 3, 3)], {"Block": 2, "Unpack": 1}


def a_shortcut_in_front():
    def run(m, x):
        s = spikes(m, x)
        return m.n1(m.pool(m.c1(s) + m.b2(m.c2(s))))

    net = Net(run, **stem(), c1=conv(8, 24), c2=conv(8, 24, 1), b2=norm(24), pool=pool(), n1=iff())
    return net, [(1, 2, 2)], {"Block": 3, "Unpack": 1}


def the_stem():
    net = Net(lambda m, x: m.n1(m.c1(m.n0(m.pool(m.c0(x))))), **stem(), pool=pool(), c1=conv(8, 8), n1=lif())
    return net, [(1, 2, 2)], {"Block": 2, "Unpack": 1}


def windows_of_two_by_three():
    return pooled(pool((2, 3))), [(1, 2, 3)], {"Block": 2, "Unpack": 1}


def ceil_mode_that_divides():
    return pooled(pool(2, ceil_mode=True)), [(1, 2, 2)], {"Block": 2, "Unpack": 1}


def ceil_mode_that_does_not():
    return pooled(pool(3, ceil_mode=True)), [], {"Block": 3, "Eager": 1, "Unpack": 1}


def overlapping_windows():
    return pooled(pool(3, stride=2)), [], {"Block": 3, "Eager": 1, "Unpack": 1}


def padded_windows():
    return pooled(pool(2, padding=1)), [], {"Block": 3, "Eager": 1, "Unpack": 1}


def an_average():
    net = pooled(layer.AvgPool2d(2, step_mode="m"))
    return net, [], {"Block": 3, "Eager": 1, "Unpack": 1}


def sums_that_are_read():
    net = Net(lambda m, x: m.run2(m, m.c1(spikes(m, x))), **stem(), c1=conv(8, 12), pool=pool(), n1=lif())
    net.run2 = lambda m, y: (m.n1(m.pool(y)), y)
    return net, [], {"Block": 3, "Eager": 1, "Unpack": 1}


def maxima_that_are_read():
    net = pooled(pool(), behind=lambda m, y: (m.n1(y), y))
    return net, [], {"Block": 3, "Eager": 1, "Unpack": 1}


def an_addition_behind():
    net = pooled(pool(), behind=lambda m, y: m.n1(y + 0.5 * y.flip(0)))
    return net, [], {"Block": 3, "Eager": 3, "Unpack": 1}


def no_layer_in_front():
    net = pooled(pool(), behind=lambda m, y: m.n2(m.pool2(m.n1(y) * 0.75)), pool2=pool(), n2=iff(v_threshold=0.5))
    return net, [(1, 2, 2)], {"Block": 3, "Unpack": 2, "Eager": 2}


@pytest.mark.parametrize(
    "build",
    [
        with_norm,
        a_function_on_images,
        an_addition_in_front,
        a_shortcut_in_front,
        the_stem,
        windows_of_two_by_three,
        ceil_mode_that_divides,
        ceil_mode_that_does_not,
        overlapping_windows,
        padded_windows,
        an_average,
        sums_that_are_read,
        maxima_that_are_read,
        an_addition_behind,
        no_layer_in_front,
    ],
    ids=lambda build: build.__name__,
)
def test_steps_and_results(build):
    net, windows, steps = build()
    model = check(net, images())
    assert pools(model) == windows
    assert kinds(model) == steps


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims):
    convolution, maximum = getattr(layer, f"Conv{dims}d"), getattr(layer, f"MaxPool{dims}d")
    parts = {
        "c0": convolution(2, 8, 3, padding=1, step_mode="m"),
        "n0": iff(),
        "c1": convolution(8, 12, 3, padding=1, step_mode="m"),
        "pool": maximum(2, step_mode="m"),
        "n1": lif(v_threshold=0.5),
    }
    x = (
        images(3, 2, 2, 7)[..., 0].flatten(3)
        if dims == 1
        else torch.stack([images(3, 2, 2, 7, s) for s in range(5)], 3)
    )
    model = check(Net(lambda m, x: m.n1(m.pool(m.c1(m.n0(m.c0(x))))), **parts), x)
    assert pools(model) == [(1, 1, 2) if dims == 1 else (2, 2, 2)]


# ---- the same results


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    """With two, every call uses both, however little there is to do."""
    from sparseflow.kernels.cpu import blocks, engine

    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    if request.param > 1:
        monkeypatch.setattr(engine, "MIN_PARALLEL_WORK", 0)
        monkeypatch.setattr(blocks, "_MIN_PARALLEL_NEURONS", 0)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("width", [12, 16, 30, 64])
@pytest.mark.parametrize(("size", "window"), [(8, 2), (9, 2), (7, 3), (11, 3)])
def test_maps_and_channels(width, size, window, threads):
    net = pooled(
        nn.Sequential(norm(width), pool(window)), width=width, behind=lambda m, y: m.c2(m.n1(y)), c2=conv(width, 4)
    )
    model = check(net, images(4, 3, size=size))
    assert pools(model) == [(1, window, window)]


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("batch", [1, 5])
def test_steps_and_batches(steps, batch):
    assert pools(check(pooled(pool()), images(steps, batch)))


@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_a_loop_over_time(reset):
    """snnTorch passes states along and pools by a function."""

    def run(m, x):
        mem1, mem2, out = m.n1.init_leaky(), m.n2.init_leaky(), []
        for t in range(len(x)):
            s, mem1 = m.n1(F.max_pool2d(m.c1(x[t]), 2), mem1)
            s, mem2 = m.n2(F.max_pool2d(m.c2(s), 2), mem2)
            out.append(mem2)
        return torch.stack(out), s

    make = {"reset_mechanism": reset}
    parts = {"c1": nn.Conv2d(3, 12, 3), "n1": leaky(**make), "c2": nn.Conv2d(12, 30, 3), "n2": leaky(**make)}
    model = check(Net(run, **parts), images(5, 2, size=13))
    assert pools(model) == [(1, 2, 2)] * 2


def test_a_loop_with_hidden_states():
    body = nn.Sequential(
        *(nn.Conv2d(3, 12, 3), nn.MaxPool2d(2), leaky(init_hidden=True)),
        *(nn.Conv2d(12, 8, 3), nn.MaxPool2d(2), leaky(init_hidden=True)),
    )
    model = check(Net(lambda m, x: torch.stack([m.body(step) for step in x.unbind(0)]), body=body), images(4, size=12))
    assert pools(model) == [(1, 2, 2)] * 2


def test_the_same_image_at_every_step():
    """The layer runs once, and so does the pooling."""
    net, windows, _ = the_stem()
    x = images(1).expand(4, -1, -1, -1, -1)
    assert pools(check(net, x)) == windows
    assert pools(check(the_stem()[0], x.contiguous())) == windows


class Repeats(nn.Module):
    """A loop over time that shows the same image at every step."""

    def __init__(self, convolution, step, behind):
        super().__init__()
        self.c1, self.step, self.behind, self.n1 = convolution, step, behind, leaky(threshold=1.0)
        self.c2, self.n2 = nn.Conv2d(12, 8, 3), leaky()

    def forward(self, x):
        mem1, mem2, out = self.n1.init_leaky(), self.n2.init_leaky(), []
        for _ in range(5):
            s, mem1 = self.n1(self.behind(self.step(self.c1(x))), mem1)
            s, mem2 = self.n2(self.c2(s), mem2)
            out.append(s + mem2)
        return torch.stack(out), mem1


@pytest.mark.parametrize("convolution", [nn.Conv2d(3, 12, 3), nn.Identity()])
@pytest.mark.parametrize("step", [nn.MaxPool2d(2), nn.Identity()])
@pytest.mark.parametrize("behind", [nn.Identity(), lambda y: y * 0.75])
def test_a_loop_that_repeats_its_input(convolution, step, behind):
    """The layer belongs to the block unless something that the block cannot do lies in between."""
    layered = isinstance(convolution, nn.Conv2d)
    x = images(1, 3, channels=3 if layered else 12, size=11)[0]
    model = check(Repeats(convolution, step, behind), x)
    first = program(model).fused.blocks[0]
    assert first.repeated == (layered and isinstance(behind, nn.Identity))
    assert pools(model) == [(1, 2, 2)] * (first.repeated and isinstance(step, nn.MaxPool2d))
    with sparseflow.verify(model) as watch:
        outputs(model, x)
    assert watch.checked >= 2
    assert watch.worst <= 1.0


def test_the_same_image_and_another_shortcut_at_every_step():
    def run(m, x):
        return m.n1(m.pool(m.c1(x) + m.c0(x.flip(0) * torch.arange(4.0).view(4, 1, 1, 1, 1))))

    net = Net(run, c0=conv(3, 8), c1=conv(3, 8), pool=pool(), n1=iff())
    assert pools(check(net, images(1).repeat(4, 1, 1, 1, 1))) == [(1, 2, 2)]


def test_a_dense_convolution_in_front_of_the_pooling():
    dense, ours = twins(on_grid(pooled(nn.Sequential(norm(12), pool()))), images())
    assert_twins(dense, ours, images())
    block = program(ours).blocks[-1]
    block.policy.crossover = copy.copy(block.policy.crossover)
    object.__setattr__(block.policy.crossover, "density", 1e-6)
    assert_twins(dense, ours, images())
    assert block.stats.calls["dense"] == 2


def test_what_is_no_number_is_what_it_is_in_pytorch():
    """The logarithm of zero is minus infinity, and that of less is no number."""
    net = Net(lambda m, x: m.n1(m.pool(m.c1(spikes(m, x)) + x.log())), **stem(), c1=conv(8, 3), pool=pool(), n1=iff())
    x = images(size=9).clamp(-0.125)
    dense, ours = twins(on_grid(net), x)
    for _ in range(2):
        assert_equal(outputs(ours, x), outputs(dense, x))
    torch.testing.assert_close(ours.n1.v, dense.n1.v, rtol=0, atol=0, equal_nan=True)
    assert 0 < dense.n1.v.isnan().float().mean() < 1
    assert pools(ours) == [(1, 2, 2)]


def test_settings_of_the_pooling_are_watched():
    net = on_grid(pooled(pool(2), behind=lambda m, y: m.n1(y).mean((-1, -2))))
    dense, ours = twins(net, images())
    assert_twins(dense, ours, images())
    from spikingjelly.activation_based import functional

    for model in (dense, ours):
        functional.reset_net(model)
        model.pool.kernel_size = model.pool.stride = 4
    assert_twins(dense, ours, images(), calls=3)
    assert pools(ours) == [(1, 4, 4)]


def test_verification():
    torch.manual_seed(3)
    net = pooled(nn.Sequential(norm(12), pool()), width=12).eval()
    model = sparseflow.accelerate(net, (images(),), mode="sparse")
    outputs(model, images())
    with sparseflow.verify(model) as watch:
        outputs(model, images(seed=4))
    assert watch.checked >= 2
    assert watch.worst <= 1.0


def test_the_trained_example(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    from snntorch_digits.net import load_checkpoint, load_split

    net, x = load_checkpoint(), load_split()[1].images[:3]
    model = sparseflow.accelerate(copy.deepcopy(net), (x,), mode="sparse")
    expected, found = outputs(net, x), outputs(model, x)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    assert pools(model) == [(1, 2, 2)] * 2
    assert kinds(model)["Block"] == 3
    with sparseflow.verify(model) as watch:
        outputs(model, x)
    assert watch.worst <= 1.0


def test_a_backend_that_does_not_pool_sums():
    """Triton, in its interpreter: sums, PyTorch's pooling, and the neuron."""
    for build in (with_norm, the_stem, an_addition_in_front):
        net, windows, _ = build()
        dense = copy.deepcopy(on_grid(net)).eval()
        ours = sparseflow.accelerate(net.eval(), (images(2, 1, size=6),), mode="sparse", backend="triton")
        assert_twins(dense, ours, images(2, 1, size=6))
        assert pools(ours) == windows
        assert not program(ours).ops.pools_sums
