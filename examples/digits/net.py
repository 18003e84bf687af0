"""A narrow, CIFAR-style spiking ResNet-18 from SpikingJelly's own blocks, and its checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model.spiking_resnet import BasicBlock, conv1x1, conv3x3
from torch import nn

CHECKPOINT = Path(__file__).with_name("digits_resnet18.pt")
TIME_STEPS = 4
WIDTHS = (32, 64, 128, 256)
BLOCKS_PER_STAGE = 2


def lif() -> neuron.LIFNode:
    """LIF with tau = 2, hard reset to 0, threshold 1 and the ATan surrogate."""
    return neuron.LIFNode(tau=2.0, detach_reset=True, surrogate_function=surrogate.ATan())


class DigitsResNet(nn.Module):
    """Spiking ResNet-18 for 32x32 images: 3x3 stem of stride 1, no max-pool, widths 32-64-128-256.

    Input ``[T, N, 1, 32, 32]``, output logits ``[T, N, 10]``; average over T for a prediction. Multi-step mode.

    >>> DigitsResNet()(torch.zeros(4, 2, 1, 32, 32)).shape
    torch.Size([4, 2, 10])
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = conv3x3(1, widths[0])
        self.bn1 = layer.BatchNorm2d(widths[0])
        self.sn1 = lif()
        inputs = (widths[0], *widths[:-1])
        strides = (1, *[2] * (len(widths) - 1))
        stages = [_stage(*spec) for spec in zip(inputs, widths, strides, strict=True)]
        self.stages = nn.Sequential(*stages)
        self.avgpool = layer.AdaptiveAvgPool2d((1, 1))
        self.flatten = layer.Flatten()
        self.fc = layer.Linear(widths[-1], num_classes)
        functional.set_step_mode(self, "m")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.sn1(self.bn1(self.conv1(x)))
        return self.fc(self.flatten(self.avgpool(self.stages(x))))


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), layer.BatchNorm2d(outputs))
    first = BasicBlock(inputs, outputs, stride, shortcut, spiking_neuron=lif)
    rest = [BasicBlock(outputs, outputs, spiking_neuron=lif) for _ in range(BLOCKS_PER_STAGE - 1)]
    return nn.Sequential(first, *rest)


def save_checkpoint(net: nn.Module, path: Path = CHECKPOINT) -> None:
    """Store the weights: matrices and kernels in fp16, to halve the file; batch norm and biases as they are."""
    state = {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in net.state_dict().items()}
    torch.save(state, path)


def load_checkpoint(path: Path = CHECKPOINT) -> DigitsResNet:
    """The trained network in eval mode, weights in fp32. Raises ``FileNotFoundError`` without a checkpoint."""
    state = torch.load(path, weights_only=True, map_location="cpu")
    net = DigitsResNet()
    net.load_state_dict({k: v.float() if v.dtype == torch.float16 else v for k, v in state.items()})
    return net.eval()
