"""Fully connected spiking networks as users write them: in SpikingJelly, and in snnTorch with its loop over time."""

from __future__ import annotations

import snntorch as snn
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

CLASSES = 10
_DEPTH = 2
_BETA = 0.95


def _lif() -> neuron.LIFNode:
    return neuron.LIFNode(tau=2.0, detach_reset=True, surrogate_function=surrogate.ATan())


def feed_forward(width: int, depth: int = _DEPTH, classes: int = CLASSES) -> nn.Module:
    """``[T, N, width]`` to ``[T, N, classes]``: linear layers and LIF neurons in multi-step mode.

    >>> feed_forward(8)(torch.zeros(4, 2, 8)).shape
    torch.Size([4, 2, 10])
    """
    hidden = [module for _ in range(depth) for module in (layer.Linear(width, width), _lif())]
    net = nn.Sequential(*hidden, layer.Linear(width, classes))
    functional.set_step_mode(net, "m")
    return net.eval()


class _RecurrentLayer(nn.Module):
    """One step: ``s_t = LIF(W x_t + R s_(t-1))``."""

    def __init__(self, width: int):
        super().__init__()
        self.forward_weights, self.recurrent_weights = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.lif = _lif()

    def forward(self, x: Tensor, spikes: Tensor) -> Tensor:
        return self.lif(self.forward_weights(x) + self.recurrent_weights(spikes))


class RecurrentNet(nn.Module):
    """``[T, N, width]`` to ``[T, N, classes]``: recurrent LIF layers, the loop over T in the forward."""

    def __init__(self, width: int, depth: int = _DEPTH, classes: int = CLASSES):
        super().__init__()
        self.layers = nn.ModuleList(_RecurrentLayer(width) for _ in range(depth))
        self.readout = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        spikes = [torch.zeros_like(x[0]) for _ in self.layers]
        outputs = []
        for step in range(x.shape[0]):
            value = x[step]
            for index, recurrent in enumerate(self.layers):
                value = spikes[index] = recurrent(value, spikes[index])
            outputs.append(self.readout(value))
        return torch.stack(outputs)


def recurrent_net(width: int, depth: int = _DEPTH) -> nn.Module:
    """In single-step mode, as its forward calls it.

    >>> recurrent_net(8)(torch.zeros(4, 2, 8)).shape
    torch.Size([4, 2, 10])
    """
    return RecurrentNet(width, depth).eval()


class SnnTorchDense(nn.Module):
    """Two linear layers with a Leaky neuron (beta = 0.95) behind each; images ``[N, inputs]`` are seen at each step.

    Gives spikes and membrane potentials of the last layer, ``[T, N, classes]`` each; every call starts from silence.
    """

    def __init__(self, inputs: int, width: int, classes: int, steps: int):
        super().__init__()
        self.steps = steps
        self.fc1, self.lif1 = nn.Linear(inputs, width), snn.Leaky(beta=_BETA)
        self.fc2, self.lif2 = nn.Linear(width, classes), snn.Leaky(beta=_BETA)
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spikes, membranes = [], []
        for _ in range(self.steps):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spikes.append(spk2)
            membranes.append(mem2)
        return torch.stack(spikes), torch.stack(membranes)
