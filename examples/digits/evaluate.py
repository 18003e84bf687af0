"""Dense against accelerated on the test set: the answers first, then the times."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

import sparseflow
from digits.data import Split, encode
from digits.net import TIME_STEPS


@dataclass
class Answers:
    """How the two runs of the test set compare. ``flips`` of ``spikes`` neuron outputs differ; both are counts."""

    images: int = 0
    correct_dense: int = 0
    correct_sparse: int = 0
    agreeing: int = 0
    flips: int = 0
    outputs: int = 0
    spikes: int = 0
    max_logit_error: float = 0.0

    def add(self, dense: Tensor, sparse: Tensor, labels: Tensor) -> None:
        """Count one batch of logits ``[N, 10]``."""
        ours, theirs = sparse.argmax(1), dense.argmax(1)
        self.images += len(labels)
        self.correct_dense += int((theirs == labels).sum())
        self.correct_sparse += int((ours == labels).sum())
        self.agreeing += int((ours == theirs).sum())
        self.max_logit_error = max(self.max_logit_error, float((sparse - dense).abs().max()))

    def add_spikes(self, dense: list[Tensor], sparse: list[Tensor]) -> None:
        """Count the spikes of every neuron layer in one batch."""
        for theirs, ours in zip(dense, sparse, strict=True):
            self.flips += int((theirs != ours).sum())
            self.outputs += theirs.numel()
            self.spikes += int(theirs.sum())


@torch.no_grad()
def predict(net: nn.Module, images: Tensor) -> Tensor:
    """Logits ``[N, 10]``, averaged over T, of images ``[N, 1, 32, 32]``; neuron state starts afresh."""
    functional.reset_net(net)
    return net(encode(images, TIME_STEPS)).mean(0)


def compare_answers(net: nn.Module, test: Split, batch_size: int) -> Answers:
    """Run the test set dense and accelerated; in every fourth batch, starting with the first, each sparse layer is
    checked against its float64 error budget.

    Raises :class:`sparseflow.MismatchError` when a layer leaves it.
    """
    answers = Answers()
    with sparseflow.verify(net, every=4):
        for images, labels in _batches(test, batch_size):
            with sparseflow.disabled(net), recorded_spikes(net) as dense_spikes:
                dense = predict(net, images)
            with recorded_spikes(net) as sparse_spikes:
                sparse = predict(net, images)
            answers.add(dense, sparse, labels)
            answers.add_spikes(dense_spikes, sparse_spikes)
    return answers


def _batches(split: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(split.images.split(size), split.labels.split(size), strict=True)


@contextlib.contextmanager
def recorded_spikes(net: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of every neuron layer, in order of execution, as booleans."""
    spikes: list[Tensor] = []
    neurons = [m for m in net.modules() if isinstance(m, neuron.BaseNode)]
    handles = [m.register_forward_hook(lambda _m, _args, out: spikes.append(out.bool())) for m in neurons]
    try:
        yield spikes
    finally:
        for handle in handles:
            handle.remove()


Run = tuple[nn.Module, Callable[[], contextlib.AbstractContextManager[None]]]


def time_alternately(runs: dict[str, Run], test: Split, batch_size: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds per forward call over the full batches of the test set: each batch goes through every run in turn.

    A run is a network and the context it is called in, which is entered outside the timer.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    batches = [images for images, _ in _batches(test, batch_size) if len(images) == batch_size]
    for net, context in runs.values():
        with context():
            predict(net, batches[0])
    for images in batches * rounds:
        for name, (net, context) in runs.items():
            with context():
                times[name].append(_time_once(net, images))
    return times


@torch.no_grad()
def _time_once(net: nn.Module, images: Tensor) -> float:
    functional.reset_net(net)
    x = encode(images, TIME_STEPS)
    start = time.perf_counter()
    net(x)
    return 1e3 * (time.perf_counter() - start)


@torch.no_grad()
def profile_by_kind(net: nn.Module, images: Tensor, repeats: int) -> dict[str, float]:
    """Milliseconds per forward call, by kind of module (``conv``, ``neuron``, ``norm``...)."""
    x = encode(images, TIME_STEPS)
    with sparseflow.profile(net) as profile:
        for _ in range(repeats):
            functional.reset_net(net)
            net(x)
    return {kind: total / repeats for kind, total in profile.result().by_kind.items()}
