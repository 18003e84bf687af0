"""Small spiking nets in plain PyTorch, and inputs for them."""

from __future__ import annotations

import torch
from torch import nn

import sparseflow


class Fire(nn.Module):
    """A stateless neuron with a straight-through gradient: enough to be a source of spikes."""

    def forward(self, v):
        spike = (v >= 1.0).to(v.dtype)
        return spike.detach() + (v - v.detach()) if torch.is_grad_enabled() and v.requires_grad else spike


def conv_net(width: int = 32, bias: bool = True) -> nn.Sequential:
    """Stem, two spike-fed convolutions, pooling, a spike-fed linear layer."""
    torch.manual_seed(1)
    sparseflow.register_neuron(Fire, overwrite=True)
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=bias),
        Fire(),
        nn.Conv2d(width, width, 3, padding=1, bias=bias),
        Fire(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, width, 3, stride=2, padding=1, bias=bias),
        Fire(),
        nn.Flatten(),
        nn.Linear(width * 4, 10),
    )
    with torch.no_grad():  # PyTorch's default weights leave every layer behind the first silent
        for name in ("2", "5"):
            net.get_submodule(name).weight.mul_(5.0)
    return net


SPIKE_FED = ("2", "5", "8")


def images(batch: int = 2) -> torch.Tensor:
    """Images that make the stem fire in about a tenth of its neurons."""
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(5)) * 1.5


def dense_and_sparse(model, x):
    """Outputs of the same model dense and as it runs."""
    with torch.no_grad():
        with sparseflow.disabled(model):
            dense = model(x)
        return dense, model(x)
