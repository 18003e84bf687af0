"""Networks pruned in blocks: the same spikes dense, with swapped layers and with fused blocks, before and after."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from spikingjelly.activation_based import functional, layer
from torch import nn

import sparseflow
from sparseflow.dispatch.blocks import block_key
from sparseflow.kernels.cpu import engine
from sparseflow.kernels.geometry import ConvGeometry
from sparseflow.modules.fused.model import fused_blocks, fusion_of
from sparseflow.modules.swap import runtimes

from .nets import (
    Net,
    assert_alive,
    assert_twins,
    conv,
    images,
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

pytestmark = pytest.mark.skipif(not engine.available(), reason="no native engine on this machine")


def spikingjelly_net() -> nn.Module:
    """Stem, a stride, a residual, a point-wise convolution and a linear layer."""

    def run(net, x):
        x = net.sn1(net.bn1(net.conv1(x)))
        x = net.sn2(net.bn2(net.conv2(x)))
        x = net.sn3(net.conv3(x) + x)
        x = net.sn4(net.conv4(x))
        return net.fc2(net.sn5(net.fc1(net.flat(x))))

    parts = {
        "conv1": conv(3, 32),
        "bn1": norm(32),
        "sn1": lif(),
        "conv2": conv(32, 40, stride=2),
        "bn2": norm(40),
        "sn2": lif(),
        "conv3": conv(40, 40),
        "sn3": lif(),
        "conv4": conv(40, 48, 1),
        "sn4": lif(),
        "flat": layer.Flatten(step_mode="m"),
        "fc1": linear(48 * 16, 64),
        "sn5": lif(),
        "fc2": linear(64, 10),
    }
    return Net(run, **parts)


def snntorch_net() -> nn.Module:
    """The user's own loop over time."""

    def run(net, x):
        m1, m2, m3 = net.lif1.init_leaky(), net.lif2.init_leaky(), net.lif3.init_leaky()
        out = []
        for step in x:
            s1, m1 = net.lif1(net.conv1(step), m1)
            s2, m2 = net.lif2(net.conv2(s1), m2)
            s3, m3 = net.lif3(net.fc(s2.flatten(1)), m3)
            out.append(s3)
        return torch.stack(out)

    convolutions = {"conv1": nn.Conv2d(3, 32, 3, padding=1), "conv2": nn.Conv2d(32, 48, 3, padding=1)}
    return Net(run, **convolutions, lif1=leaky(), lif2=leaky(), lif3=leaky(), fc=nn.Linear(48 * 64, 10))


NETS = {"spikingjelly": spikingjelly_net, "snntorch": snntorch_net}


@pytest.mark.parametrize("level", ["layers", "blocks"])
@pytest.mark.parametrize("name", NETS)
def test_a_pruned_network_gives_the_same_spikes_at_every_level(name, level):
    net = on_grid(NETS[name]()).eval()
    assert sparseflow.prune_blocks(net, density=0.25).density == pytest.approx(0.25, abs=0.05)
    x = images()
    dense, ours = twins(net, x)
    if level == "layers":
        sparseflow.restore(ours)
        sparseflow.accelerate(ours, x, mode="sparse", fuse=False)
    assert_twins(dense, ours, x)
    if level == "layers":
        found = [r.last_site.candidates[0][1].eager.variant for r in runtimes(ours).values() if r.last_site is not None]
    else:
        found = [block.policy.crossover.variant for block in fused_blocks(ours).values() if block.policy is not None]
    assert any(variant.startswith("blocks") for variant in found)


def test_pruning_an_accelerated_network_reaches_plans_and_layers():
    net = on_grid(spikingjelly_net()).eval()
    x = images()
    dense, ours = twins(net, x)
    assert_twins(dense, ours, x)
    assert not any(name.startswith("blocks") for name in variants(ours))
    for model in (dense, ours):
        sparseflow.prune_blocks(model, density=0.25)
    assert_twins(dense, ours, x, calls=3)
    assert any(name.startswith("blocks") for name in variants(ours))
    assert_alive(ours, x)
    assert any("of the weight blocks are left; blocks" in layer.detail for layer in sparseflow.report(ours).layers)


def test_weights_pruned_by_hand_are_noticed_by_fused_plans():
    net = on_grid(spikingjelly_net()).eval()
    x = images()
    dense, ours = twins(net, x)
    for model in (dense, ours):
        with torch.no_grad():
            model.conv3.weight[:32].zero_()
    assert_twins(dense, ours, x, calls=3)
    assert fused_blocks(ours)["conv3"].policy.crossover.variant.startswith("blocks")


def variants(model: nn.Module) -> list[str]:
    assert fusion_of(model) is not None
    return [block.policy.crossover.variant for block in fused_blocks(model).values() if block.policy is not None]


def test_crossovers_tell_shares_of_zero_blocks_apart():
    geometry = ConvGeometry.from_call((4, 64, 5, 5), (48, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    full, half, quarter = (block_key("cpu", geometry, 4, "lif", "none", share) for share in (1.0, 0.5, 0.25))
    assert full == block_key("cpu", geometry, 4, "lif", "none")
    assert len({full, half, quarter}) == 3


def test_a_layer_measures_again_after_pruning():
    torch.manual_seed(0)
    net = on_grid(nn.Sequential(conv(3, 32), lif(), conv(32, 64), lif(), conv(64, 64), lif())).eval()
    x = images()
    sparseflow.accelerate(net, x, fuse=False)
    functional.reset_net(net)
    net(x)
    keys = {name: runtime.describe().crossover.key for name, runtime in runtimes(net).items()}
    sparseflow.prune_blocks(net, density=0.25, exclude="4")
    functional.reset_net(net)
    net(x)
    again = {name: runtime.describe().crossover.key for name, runtime in runtimes(net).items()}
    assert "blocks0.25" in again["2"]
    assert again["4"] == keys["4"]


@pytest.mark.parametrize("window", [2, 3])
def test_a_pool_between_a_pruned_layer_and_its_neuron(window):
    def run(m, x):
        return m.n1(m.pool(m.c1(spikes(m, x))))

    parts = {"c1": conv(32, 32), "pool": layer.MaxPool2d(window, step_mode="m"), "n1": lif()}
    made = on_grid(Net(run, **stem(32), **parts))
    sparseflow.prune_blocks(made, density=0.25, include="c1")
    dense, ours = twins(made, images(size=11))
    assert_twins(dense, ours, images(size=11))
    block = program(ours).blocks[-1]
    variants = [name for name in block.ops.variants(block.geometry, 3, 0.25) if name.startswith("blocks")]
    assert variants
    assert block.policy is not None
    for name in variants:  # which of them was fastest is a matter of chance
        block.policy.crossover = dataclasses.replace(block.policy.crossover, variant=name)
        block.refresh()
        assert_twins(dense, ours, images(size=11))
