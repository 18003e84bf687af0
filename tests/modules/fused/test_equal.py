"""The models of the frameworks at three levels: as they are, with swapped layers, with fused blocks.

Weights are on a grid and thresholds set so that every layer fires, so that spikes, states and outputs have to be equal
bit for bit whatever the order of sums. Where a model has parts that round (attention in floating point), blocks are
checked against float64 one by one instead.
"""

from __future__ import annotations

import copy

import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model import ms_resnet, sew_resnet, spikformer, spiking_resnet
from torch import nn

import sparseflow
from sparseflow.bench.suites.stand_ins import fire_like_trained
from tests.graph import zoo

from .nets import assert_equal, assert_twins, features, images, is_fused, on_grid, outputs, program

pytestmark = pytest.mark.filterwarnings("ignore::sparseflow.NothingAcceleratedWarning")
T = 4
NEURON = {"spiking_neuron": neuron.LIFNode, "surrogate_function": surrogate.ATan(), "num_classes": 10}
IF = {**NEURON, "spiking_neuron": neuron.IFNode}
NETS = {
    "spiking_resnet18": lambda: spiking_resnet.spiking_resnet18(**NEURON),
    "spiking_resnet50": lambda: spiking_resnet.spiking_resnet50(**NEURON),
    "spiking_resnet18 soft": lambda: spiking_resnet.spiking_resnet18(**NEURON, v_reset=None, decay_input=False),
    "sew_resnet18 add": lambda: sew_resnet.sew_resnet18(**IF, cnf="ADD"),
    "sew_resnet18 and": lambda: sew_resnet.sew_resnet18(**IF, cnf="AND"),
    "sew_resnet18 iand": lambda: sew_resnet.sew_resnet18(**NEURON, cnf="IAND"),
    "ms_resnet18": lambda: ms_resnet.MSResNet(T=T, num_classes=10, layers=(2, 2, 2, 2), base_channels=16),
    "spikformer": lambda: spikformer.Spikformer(
        T=T, img_size_h=32, img_size_w=32, num_classes=10, embed_dims=64, num_heads=2, depths=2
    ),
    **{family: zoo.FAMILIES[family] for family in ("vgg", "plif_mnist", "plif_cifar", "max_resnet")},
}
# Sums of products that are no multiples of a power of two.
ROUNDING = ("qkformer", "spike_driven_transformer", "maxformer", "attention_ms_resnet")


def excited(net: nn.Module, x: torch.Tensor, density: float = 0.15) -> nn.Module:
    """Weights on the grid, and the threshold of every neuron such that it fires with about this probability."""
    functional.set_step_mode(net, "m")
    on_grid(net).eval()
    hooks = []
    for node in net.modules():
        if isinstance(node, neuron.BaseNode):
            hooks.append(node.register_forward_pre_hook(lambda node, args: set_threshold(node, args[0], density)))
    outputs(net, x)
    for hook in hooks:
        hook.remove()
    functional.reset_net(net)
    return net


def set_threshold(node: neuron.BaseNode, current: torch.Tensor, density: float) -> None:
    """Half the quantile of what comes in at one step, rounded to a sixteenth."""
    threshold = float(current.flatten()[:: max(1, current.numel() // 100_000)].quantile(1 - density))
    node.v_threshold = max(1 / 16, round(threshold * 16) / 16)


def picture(name: str, steps: int = T, batch: int = 1, seed: int = 1) -> torch.Tensor:
    channels, size = (1, 28) if name == "plif_mnist" else (3, 32)
    return images(steps, batch, channels, size, seed)


def levels(net: nn.Module, x: torch.Tensor) -> tuple[nn.Module, nn.Module, nn.Module]:
    dense, swapped = copy.deepcopy(net), copy.deepcopy(net)
    sparseflow.accelerate(swapped, x, mode="sparse", fuse=False)
    return dense, swapped, sparseflow.accelerate(net, x, mode="sparse")


def firing(net: nn.Module, x: torch.Tensor) -> dict[str, float]:
    """Density of every neuron."""
    net, found = copy.deepcopy(net), {}
    for name, node in net.named_modules():
        if isinstance(node, neuron.BaseNode):
            node.register_forward_hook(lambda _m, _a, out, name=name: found.update({name: float(out.mean())}))
    outputs(net, x)
    return found


@pytest.mark.parametrize("name", NETS)
def test_spikingjelly_models_are_equal_bit_for_bit(name):
    torch.manual_seed(3)
    net, x = excited(NETS[name](), picture(name)), picture(name)
    active = sum(density > 0 for density in firing(net, x).values()) / len(firing(net, x))
    assert active > 0.7
    dense, swapped, fused = levels(net, x)
    for model in (swapped, fused):
        assert_twins(copy.deepcopy(dense), model, x, calls=2)
        assert_twins_after_reset(copy.deepcopy(dense), model, picture(name, seed=2))
    assert is_fused(fused)
    assert any(block.stats.density for block in program(fused).blocks)
    with sparseflow.verify(fused) as watch:
        outputs(fused, x)
    assert watch.checked >= len(program(fused).blocks)
    assert watch.flips == 0


def assert_twins_after_reset(dense: nn.Module, model: nn.Module, x: torch.Tensor) -> None:
    functional.reset_net(dense)
    functional.reset_net(model)
    assert_twins(dense, model, x, calls=1)
    functional.reset_net(dense)
    functional.reset_net(model)


@pytest.mark.parametrize("name", ["spiking_resnet18", "sew_resnet18 add", "vgg"])
def test_other_batches_and_numbers_of_steps(name):
    net = excited(NETS[name](), picture(name))
    dense, _, fused = levels(net, picture(name))
    for steps, batch in ((T, 3), (2, 1), (1, 2)):
        functional.reset_net(dense)
        functional.reset_net(fused)
        x = picture(name, steps, batch)
        assert_twins(dense, fused, x, calls=3)
        assert is_fused(fused)


def test_inference_mode_and_streams():
    net = excited(NETS["spiking_resnet18"](), picture(""))
    dense, _, fused = levels(net, picture(""))
    for seed in range(4):
        with torch.inference_mode(seed % 2 == 0):
            assert_equal(outputs(fused, picture("", seed=seed)), outputs(dense, picture("", seed=seed)))
    assert is_fused(fused)


@pytest.mark.parametrize("name", ROUNDING)
def test_models_that_round_are_right_block_by_block(name):
    torch.manual_seed(3)
    net, x = zoo.build(name, "m")
    dense, _, fused = levels(net, x)
    with torch.no_grad(), sparseflow.verify(fused) as watch:
        found = fused(x)
    assert watch.checked > 5
    assert is_fused(fused)
    with torch.no_grad():
        expected = dense(x)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("make", [spiking_resnet.spiking_resnet18, sew_resnet.sew_resnet18])
def test_stand_ins_with_calibrated_batch_norm(make):
    """Numbers of full precision: blocks against float64, logits within what a flipped spike may change."""
    torch.manual_seed(3)
    options = {**NEURON, "cnf": "ADD"} if make is sew_resnet.sew_resnet18 else NEURON
    net = make(**options)
    functional.set_step_mode(net, "m")
    x = torch.rand(1, 1, 3, 64, 64).repeat(T, 1, 1, 1, 1)
    fire_like_trained(net, x)
    dense, _, fused = levels(net, x)
    with torch.no_grad(), sparseflow.verify(fused) as watch:
        found = fused(x).mean(0)
    with torch.no_grad():
        expected = dense(x).mean(0)
    assert watch.checked >= 20
    assert watch.flips < 20
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["spiking_resnet", "sew_add", "plif_cifar"])
def test_single_step_models_that_are_stepped_from_outside(family):
    net = excited(zoo.FAMILIES[family](), picture(family))
    functional.set_step_mode(net, "s")
    dense, swapped, fused = levels(net, picture(family)[0])
    for x in picture(family, 6).unbind(0):
        expected = outputs(dense, x)
        assert_equal(outputs(swapped, x), expected)
        assert_equal(outputs(fused, x), expected)
    assert is_fused(fused)


# ---- snnTorch


class Tutorial5(nn.Module):
    """Linear layers, states passed along, membranes recorded."""

    def __init__(self, make):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(24, 64), make()
        self.fc2, self.lif2 = nn.Linear(64, 10), make()

    def forward(self, x):
        states = [self.lif1.reset_mem(), self.lif2.reset_mem()]
        states = [s if isinstance(s, tuple) else (s,) for s in states]
        spikes, membranes = [], []
        for step in x:
            s, *states[0] = self.lif1(self.fc1(step), *states[0])
            s, *states[1] = self.lif2(self.fc2(s), *states[1])
            spikes.append(s)
            membranes.append(states[1][-1])
        return torch.stack(spikes), torch.stack(membranes)


class Tutorial6(nn.Module):
    """Convolutions on the same image at every step."""

    def __init__(self, make):
        super().__init__()
        self.conv1, self.lif1 = nn.Conv2d(3, 12, 5), make()
        self.conv2, self.lif2 = nn.Conv2d(12, 32, 5), make()
        self.fc, self.lif3 = nn.Linear(32 * 5 * 5, 10), make()

    def forward(self, x):
        mem1, mem2, mem3 = self.lif1.init_leaky(), self.lif2.init_leaky(), self.lif3.init_leaky()
        spikes, membranes = [], []
        for _ in range(5):
            s1, mem1 = self.lif1(nn.functional.max_pool2d(self.conv1(x), 2), mem1)
            s2, mem2 = self.lif2(nn.functional.max_pool2d(self.conv2(s1), 2), mem2)
            s3, mem3 = self.lif3(self.fc(s2.view(x.size(0), -1)), mem3)
            spikes.append(s3)
            membranes.append(mem3)
        return torch.stack(spikes, dim=0), torch.stack(membranes, dim=0)


LEAKY = [
    {},
    {"reset_mechanism": "zero"},
    {"reset_mechanism": "none", "beta": 0.75},
    {"reset_delay": False},
    {"reset_delay": False, "reset_mechanism": "zero"},
    {"threshold": 0.5, "learn_beta": True, "learn_threshold": True},
    {"beta": torch.linspace(0.25, 0.75, 64)},
]


@pytest.mark.parametrize("options", LEAKY)
def test_linear_tutorial(options):
    if isinstance(options.get("beta"), torch.Tensor):
        net = Tutorial5(lambda: snntorch.Leaky(beta=0.5))
        net.lif1 = snntorch.Leaky(**options)
    else:
        net = Tutorial5(lambda: snntorch.Leaky(**{"beta": 0.5, **options}))
    assert_levels(net, features(5, 3, 24))


@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_synaptic_and_lapicque_tutorials(reset):
    assert_levels(Tutorial5(lambda: snntorch.Synaptic(alpha=0.5, beta=0.75, reset_mechanism=reset)), features(5, 3, 24))
    assert_levels(Tutorial5(lambda: snntorch.Lapicque(R=2, C=4, reset_mechanism=reset)), features(5, 3, 24))


def test_convolutional_tutorial():
    net = Tutorial6(lambda: snntorch.Leaky(beta=0.5))
    assert_levels(net, images(1, 2, 3, 32)[0])


def assert_levels(net: nn.Module, x: torch.Tensor) -> None:
    dense, swapped, fused = levels(on_grid(net).eval(), x)
    assert outputs(dense, x)[0].mean() > 0
    for model in (swapped, fused):
        assert_twins(copy.deepcopy(dense), model, x, calls=3)
    assert is_fused(fused)
    with sparseflow.verify(fused) as watch:
        outputs(fused, x)
    assert watch.checked >= 2


def test_a_sequential_net_that_hides_its_states_and_is_stepped_from_outside():
    parts = [nn.Conv2d(3, 8, 3), snntorch.Leaky(beta=0.5, init_hidden=True), nn.MaxPool2d(2), nn.Flatten()]
    net = nn.Sequential(*parts, nn.Linear(72, 10), snntorch.Leaky(beta=0.5, init_hidden=True, output=True))
    x = images(6, 2, size=8)
    dense, swapped, fused = levels(on_grid(net).eval(), x[0])
    for step in x:
        expected = outputs(dense, step)
        assert_equal(outputs(swapped, step), expected)
        assert_equal(outputs(fused, step), expected)
    assert is_fused(fused)
    assert layer is not None
