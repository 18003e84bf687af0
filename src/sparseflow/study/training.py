"""Trains one network: Adam, cross entropy on the mean output over time, the best epoch on the validation set."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseflow.errors import SparseflowError

from . import nets
from .datasets import DataSet, Split
from .records import Choice

_EVALUATED = 256  # samples of one call without gradients
_EPSILON = 1e-15  # of Adam: behind two narrow surrogates gradients are smaller than its default of 1e-8


class DivergedError(SparseflowError):
    """The loss of a training is no longer a number."""


@dataclasses.dataclass(frozen=True)
class Training:
    """How networks are trained, the same for all of a study.

    Args:
        epochs: at most.
        batch: samples per step.
        rate: learning rate of Adam.
        patience: epochs without a better validation accuracy after which training stops.
        width: channels of the first convolution.
        prune: stop what is worse than the median of the other trainings at the same epoch: right for finding a good
            network, wrong for comparing choices, of which the worse would then be missing.
    """

    epochs: int = 10
    batch: int = 32
    rate: float = 5e-3
    patience: int = 4
    width: int = nets.WIDTH
    prune: bool = False


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network in eval mode with the weights of its best epoch, and how it got there."""

    network: nn.Module
    epochs: int
    validation: float  # accuracy
    pruned: bool


def train(choice: Choice, data: DataSet, training: Training, stop: Callable[[int, float], bool]) -> Trained:
    """Train the network of ``choice``; the same seed, machine and number of threads give the same weights.

    Args:
        choice: the network; its seed is that of the weights, the order of samples and a stochastic surrogate.
        data: its validation part decides when to stop and which epoch was best; its test part is not looked at.
        training: settings.
        stop: gets the epoch, from 0, and its validation accuracy; whether to stop now, as a pruned training.

    Raises:
        ChoiceError: there is no such network.
        DivergedError: the loss became infinite or NaN.
    """
    torch.manual_seed(choice.seed)
    network = nets.build(choice, data.shape, data.classes, training.width)
    network.to(memory_format=torch.channels_last)  # of which PyTorch's max-pooling is five times as fast
    optimizer = torch.optim.Adam(network.parameters(), lr=training.rate, eps=_EPSILON)
    best, best_epoch, weights, pruned, epoch = -1.0, 0, {}, False, -1
    for epoch in range(training.epochs):
        loss = _train_epoch(network, data.train, optimizer, training.batch)
        if not math.isfinite(loss):
            raise DivergedError(f"the loss was {loss} in epoch {epoch + 1}")
        found = accuracy(network, data.validation)
        if found > best:
            best, best_epoch = found, epoch
            weights = {name: value.clone() for name, value in network.state_dict().items()}
        pruned = stop(epoch, found)
        if pruned or epoch - best_epoch >= training.patience:
            break
    network.load_state_dict(weights)
    return Trained(network.eval(), epoch + 1, best, pruned)


def _train_epoch(network: nn.Module, data: Split, optimizer: torch.optim.Optimizer, batch: int) -> float:
    """One pass; returns the mean loss."""
    network.train()
    losses = []
    for spikes, labels in _batches(data, batch, torch.randperm(len(data))):
        loss = F.cross_entropy(nets.run(network, spikes).mean(0), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def accuracy(network: nn.Module, data: Split) -> float:
    """Share of samples whose class has the largest output, averaged over time."""
    network.eval()
    order = torch.arange(len(data))
    hits = [
        (nets.run(network, spikes).mean(0).argmax(1) == labels).sum().item()
        for spikes, labels in _batches(data, _EVALUATED, order)
    ]
    return sum(hits) / len(data)


def _batches(data: Split, size: int, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for part in order.split(size):
        yield data.spikes[:, part].float(), data.labels[part]
