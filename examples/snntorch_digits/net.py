"""The convolutional network of snnTorch's tutorials, as a user writes it, its data and its checkpoint.

https://snntorch.readthedocs.io/en/latest/tutorials/tutorial_6.html, with the loop over time inside ``forward``.
"""

from __future__ import annotations

from pathlib import Path

import snntorch as snn
import torch
import torch.nn.functional as F
from digits.data import Split
from digits.data import load_split as load_larger
from snntorch import surrogate
from torch import nn

CHECKPOINT = Path(__file__).with_name("digits_convnet.pt")
TIME_STEPS = 25
IMAGE_SIZE = 28
BETA = 0.5


class ConvNet(nn.Module):
    """Two convolutions with max-pooling and a linear layer, a Leaky neuron (beta = 0.5) behind each.

    Input: images ``[N, 1, 28, 28]``, seen at each of the T = 25 steps. Output: spikes and membrane potentials of the
    last layer, ``[T, N, 10]`` each; the class is the one that spikes most. Every call starts from silence.

    >>> spikes, membranes = ConvNet()(torch.zeros(2, 1, 28, 28))
    >>> spikes.shape, membranes.shape
    (torch.Size([25, 2, 10]), torch.Size([25, 2, 10]))
    """

    def __init__(self, steps: int = TIME_STEPS, width: int = 12) -> None:
        super().__init__()
        spike_grad = surrogate.fast_sigmoid(slope=25)
        self.steps = steps
        self.conv1, self.lif1 = nn.Conv2d(1, width, 5), snn.Leaky(beta=BETA, spike_grad=spike_grad)
        self.conv2, self.lif2 = nn.Conv2d(width, 64, 5), snn.Leaky(beta=BETA, spike_grad=spike_grad)
        self.fc1, self.lif3 = nn.Linear(64 * 4 * 4, 10), snn.Leaky(beta=BETA, spike_grad=spike_grad)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mem1, mem2, mem3 = self.lif1.init_leaky(), self.lif2.init_leaky(), self.lif3.init_leaky()
        spk_rec, mem_rec = [], []
        for _ in range(self.steps):
            spk1, mem1 = self.lif1(F.max_pool2d(self.conv1(x), 2), mem1)
            spk2, mem2 = self.lif2(F.max_pool2d(self.conv2(spk1), 2), mem2)
            spk3, mem3 = self.lif3(self.fc1(spk2.flatten(1)), mem3)
            spk_rec.append(spk3)
            mem_rec.append(mem3)
        return torch.stack(spk_rec), torch.stack(mem_rec)


def load_split() -> tuple[Split, Split]:
    """Training and test set of :func:`digits.data.load_split` at 28 x 28 pixels.

    >>> load_split()[1].images.shape
    torch.Size([360, 1, 28, 28])
    """
    train, test = (split._replace(images=_resized(split.images)) for split in load_larger())
    return train, test


def _resized(images: torch.Tensor) -> torch.Tensor:
    return F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)


def load_checkpoint(path: Path = CHECKPOINT) -> ConvNet:
    """The trained network in eval mode. Raises ``FileNotFoundError`` without a checkpoint."""
    net = ConvNet()
    net.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return net.eval()
