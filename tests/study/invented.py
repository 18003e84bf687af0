"""Invented studies with effects that are known: ``python -m tests.study.invented report.html`` writes their page."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from sparseflow.study.records import Choice, Layer, LayerShape, Matched, Net, Neuron, Status, Study, Surrogate

DEFAULT = Choice("digits", "snntorch", Neuron.LIF, Surrogate.ARCTAN, 0.9, 1.0, None, Matched.BETA, 0)
SHAPES = (
    LayerShape("conv1", 1, 16, (3, 3), (1, 1), (1, 1), 1, (16, 16), (16, 16)),
    LayerShape("conv2", 16, 32, (3, 3), (1, 1), (1, 1), 1, (8, 8), (8, 8)),
    LayerShape("fc", 512, 10),
)
ENVIRONMENT = {"cpu": "invented", "threads": 2, "torch": "2.15.0", "commit": "invented"}
Effect = Callable[[Choice], float]


def choice(**changes) -> Choice:
    """The default choice, changed."""
    return dataclasses.replace(DEFAULT, **changes)


def net(accuracy: float | None = 0.9, cycles: float | None = 1000.0, ms: float | None = 2.0, **changes) -> Net:
    """A complete network whose spikes follow its cycles; ``changes`` are of the choice."""
    return Net(
        choice=choice(**changes),
        status=Status.COMPLETE,
        accuracy=accuracy,
        epochs=5,
        steps=8,
        spikes=None if cycles is None else cycles / 10,
        layers=tuple(Layer(shape, 50.0 / (i + 1), 0.2 / (i + 1)) for i, shape in enumerate(SHAPES)),
        latency={} if ms is None else {"dense": (2.9, 3.0, 3.2), "accelerated": (0.9 * ms, ms, 1.2 * ms)},
        predicted={} if ms is None else {"dense": 3.3, "accelerated": 1.1 * ms, "H200": 0.1},
        cycles=cycles,
    )


def ended(status: Status, error: str = "", **changes) -> Net:
    """A network that was pruned or failed, and has no figures."""
    return Net(choice(**changes), status, epochs=2, error=error)


def grid(
    neurons: Iterable[Neuron] = (Neuron.LIF, Neuron.LAPICQUE, Neuron.IF),
    surrogates: Iterable[Surrogate] = tuple(Surrogate),
    betas: Iterable[float] = (0.5, 0.9),
    seeds: Iterable[int] = (0, 1, 2),
    **fixed,
) -> Iterator[Choice]:
    """Every combination; Lapicque neurons at equal beta and at equal time constant."""
    for neuron, surrogate, beta, seed in itertools.product(neurons, surrogates, betas, seeds):
        for matched in Matched if neuron is Neuron.LAPICQUE else [Matched.BETA]:
            yield choice(neuron=neuron, surrogate=surrogate, beta=beta, matched=matched, seed=seed, **fixed)


def study(
    cost: Effect = lambda choice: 0.0,
    accuracy: Effect = lambda choice: 0.0,
    *,
    choices: Iterable[Choice] | None = None,
    noise: float = 0.01,
    seed: int = 0,
) -> Study:
    """Networks with cycles (and latency) of 1000 times ``exp(cost)`` and accuracies of 0.9 plus ``accuracy``.

    ``noise`` is the standard deviation of cycles and latency in logarithms; that of accuracies is 0.001.
    """
    random = np.random.default_rng(seed)

    def measured(found: Choice) -> Net:
        cycles = 1000.0 * math.exp(cost(found) + noise * random.standard_normal())
        ms = 2.0 * math.exp(cost(found) + noise * random.standard_normal())
        exact = 0.9 + accuracy(found) + 0.001 * random.standard_normal()
        return dataclasses.replace(net(exact, cycles, ms), choice=found)

    return Study(ENVIRONMENT, tuple(measured(found) for found in (grid() if choices is None else choices)))


def of(parameter: str, value: object, effect: float) -> Effect:
    """An effect that one value has."""
    return lambda choice: effect if getattr(choice, parameter) == value else 0.0


def everything() -> Study:
    """Two datasets, both frameworks, every status; effects of the surrogate, the neuron, beta and the threshold."""
    random = np.random.default_rng(7)
    nets = [_invented(found, random) for found in _choices()]
    return Study(ENVIRONMENT, tuple(nets), settings={"training": {"epochs": 12, "batch": 64}, "samples": None})


def _choices() -> Iterator[Choice]:
    for dataset, threshold in (("digits", 0.5), ("digits", 1.0), ("saccades", 1.0)):
        yield from grid(seeds=(0, 1), dataset=dataset, threshold=threshold)
        yield from grid(
            seeds=(0, 1),
            neurons=(Neuron.LIF, Neuron.IF, Neuron.PLIF),
            surrogates=(Surrogate.ARCTAN, Surrogate.SIGMOID),
            dataset=dataset,
            threshold=threshold,
            framework="spikingjelly",
        )


_FIRING = {
    Neuron.LAPICQUE: -0.25, Neuron.IF: 0.4, Surrogate.SPIKE_RATE_ESCAPE: -0.15, Surrogate.SIGMOID: 0.1,
    Surrogate.STOCHASTIC: 0.05,
}  # fmt: skip
_LEARNED = {Surrogate.STOCHASTIC: -0.08, Surrogate.SPIKE_RATE_ESCAPE: -0.01, Neuron.IF: -0.02}


def _invented(found: Choice, random: np.random.Generator) -> Net:
    kind = random.random()
    if kind < 0.03:
        return Net(found, Status.FAILED, epochs=1, error="DivergedError: the loss was nan in epoch 2")
    if kind < 0.12:
        return Net(found, Status.PRUNED, epochs=3)
    firing = sum(_FIRING.get(value, 0.0) for value in (found.neuron, found.surrogate))
    firing += 0.5 * (found.beta - 0.5) - 0.4 * (found.threshold - 0.5) + 0.05 * random.standard_normal()
    rate = (0.12 if found.dataset == "digits" else 0.05) * math.exp(firing)
    densities = [0.15, *(rate * factor * math.exp(0.1 * random.standard_normal()) for factor in (1.0, 0.7))]
    spikes = [density * shape.inputs for density, shape in zip(densities, SHAPES, strict=True)]
    cycles = 8 * (9 * sum(spikes) + 3000)
    dense, ours = (figure * math.exp(0.03 * random.standard_normal()) for figure in (2.4, 0.4 + 9 * rate))
    learned = sum(_LEARNED.get(value, 0.0) for value in (found.neuron, found.surrogate))
    return Net(
        choice=found,
        status=Status.COMPLETE,
        accuracy=min(0.99, 0.93 + learned + 0.01 * random.standard_normal()),
        epochs=int(random.integers(6, 13)),
        steps=8,
        spikes=8 * sum(spikes[1:]),
        layers=tuple(Layer(*row) for row in zip(SHAPES, spikes, densities, strict=True)),
        latency={"dense": _around(dense), "accelerated": _around(ours)},
        predicted={"dense": 2.5, "accelerated": 0.42 + 8.5 * rate, "H200": 0.08},
        cycles=cycles,
    )


def _around(value: float) -> tuple[float, float, float]:
    return 0.96 * value, value, 1.08 * value


if __name__ == "__main__":
    from sparseflow.study import page

    page.write(everything(), Path(sys.argv[1]))
