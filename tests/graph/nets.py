"""What networks of these tests are made of."""

from __future__ import annotations

import torch
from torch import nn


class Function(nn.Module):
    """A forward given as a function of the module and the input."""

    def __init__(self, forward, **children):
        super().__init__()
        self.function = forward
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.function(self, x)


def loud(net):
    """Weights large enough that the neurons fire."""
    torch.manual_seed(2)
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, 0.2, 1.0)
    return net
