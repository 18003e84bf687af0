"""Small instances of every SpikingJelly model family, with spikes in every layer."""

from __future__ import annotations

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model import (
    masnn,
    maxformer,
    ms_resnet,
    parametric_lif_net,
    qkformer,
    sew_resnet,
    spike_driven_transformer,
    spikformer,
    spiking_resnet,
    spiking_vgg,
)
from torch import nn

T = 2
NEURON = {"spiking_neuron": neuron.LIFNode, "surrogate_function": surrogate.ATan()}
NARROW = {"num_classes": 5, "width_per_group": 16}
BLOCKS = [1, 1, 1, 1]


def _sew(cnf):
    return sew_resnet.SEWResNet(sew_resnet.BasicBlock, BLOCKS, num_classes=5, cnf=cnf, **NEURON)


def _vgg():
    """Built without memory: its classifier has 120 million weights whatever the features are."""
    with torch.device("meta"):
        net = spiking_vgg.SpikingVGG([8, "M", 16, "M", 16, "M"], batch_norm=True, init_weights=False, **NEURON)
        net.classifier = nn.Sequential(layer.Linear(16 * 49, 32), neuron.LIFNode(), layer.Linear(32, 5))
    net.to_empty(device="cpu")
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)):
            module.reset_parameters()
    return net


FAMILIES = {
    "spiking_resnet": lambda: spiking_resnet.SpikingResNet(spiking_resnet.BasicBlock, BLOCKS, num_classes=5, **NEURON),
    "spiking_resnet_bottleneck": lambda: spiking_resnet.SpikingResNet(
        spiking_resnet.Bottleneck, BLOCKS, **NARROW, **NEURON
    ),
    "sew_add": lambda: _sew("ADD"),
    "sew_and": lambda: _sew("AND"),
    "sew_iand": lambda: _sew("IAND"),
    "vgg": _vgg,
    "plif_mnist": lambda: parametric_lif_net.MNISTNet(channels=8, spiking_neuron=neuron.ParametricLIFNode),
    "plif_cifar": lambda: parametric_lif_net.CIFAR10Net(channels=8, spiking_neuron=neuron.LIFNode),
    "spikformer": lambda: spikformer.Spikformer(
        T=T, img_size_h=32, img_size_w=32, num_classes=5, embed_dims=32, num_heads=2, depths=2
    ),
    "ms_resnet": lambda: ms_resnet.MSResNet(T=T, num_classes=5, layers=(1, 1, 1, 1), base_channels=8),
    "max_resnet": lambda: ms_resnet.MaxResNet(T=T, num_classes=5, layers=(1, 1, 1, 1), base_channels=8),
    "attention_ms_resnet": lambda: masnn.AttMSResNet(T=T, num_classes=5, layers=(1, 1, 1, 1), base_channels=8),
    "qkformer": lambda: qkformer.QKFormer(
        T=T, num_classes=5, embed_dims=32, num_heads=(2, 2, 2), depths=(1, 1, 1), mlp_ratio=2.0
    ),
    "spike_driven_transformer": lambda: spike_driven_transformer.SpikeDrivenTransformer(
        T=T, num_classes=5, embed_dims=32, num_heads=2, depths=1, mlp_ratio=2.0
    ),
    "maxformer": lambda: maxformer.MaxFormer(T=T, num_classes=5, embed_dims=32, depths=(1, 1, 1), mlp_ratio=2.0),
    "maxformer_cifar": lambda: maxformer.MaxFormer(
        T=T, num_classes=5, embed_dims=32, depths=(1, 1, 1), mlp_ratio=2.0, cifar=True
    ),
}
# The others fail in single-step mode by themselves: their heads and attention index the time axis.
SINGLE_STEP = (
    "spiking_resnet",
    "spiking_resnet_bottleneck",
    "sew_add",
    "sew_and",
    "sew_iand",
    "vgg",
    "plif_mnist",
    "plif_cifar",
    "spikformer",
)


def build(family: str, step_mode: str) -> tuple[nn.Module, torch.Tensor]:
    """A model in eval mode whose neurons fire, reset, and an input ``[T, N, C, H, W]`` or ``[N, C, H, W]``."""
    torch.manual_seed(3)
    net = FAMILIES[family]()
    channels, size = (1, 28) if family == "plif_mnist" else (3, 32)
    x = torch.rand(T, 2, channels, size, size)
    functional.set_step_mode(net, "m")
    _enliven(net, x)
    functional.set_step_mode(net, step_mode)
    return net.eval(), x if step_mode == "m" else x[0]


def _enliven(net: nn.Module, x: torch.Tensor) -> None:
    """Batch norm statistics of the input itself, and thresholds low enough that no layer is silent."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
        if hasattr(module, "v_threshold"):
            module.v_threshold = 0.2
        if isinstance(module, nn.Linear):
            module.weight.data.mul_(4)
    with torch.no_grad():
        net.train()(x)
    functional.reset_net(net)
