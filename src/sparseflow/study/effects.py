"""What each choice does to the networks of a study: their outcomes, networks that differ in one choice, and intervals.

Spikes, cycles and latencies are compared as ratios (means of logarithms), accuracies as differences. Networks that
differ in nothing but their seed are repetitions of one configuration, so that an interval resamples configurations.
Where these are too few, it resamples networks, and then says nothing about other configurations.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from .records import Choice, Net, Neuron, Status, Surrogate

Interval = tuple[float, float]
Observation = tuple[Hashable, int, float]
"""Of a configuration, with a seed: a value."""

LEVEL = 0.95
ENOUGH = 6
"""Fewest observations that are judged: of 2^6 patterns of signs the two extreme ones make 3 %, of 2^5 they make 6 %."""
PARAMETERS = ("framework", "neuron", "surrogate", "beta", "threshold", "slope", "matched")
_BOOTSTRAPPED = 25
"""From so many observations on the bootstrap covers what it says: of ten, its 95 % intervals cover 88 %."""
_RESAMPLES, _SIGN_FLIPS = 1999, 9999


class Outcome(enum.StrEnum):
    """What a choice may change."""

    ACCURACY = "accuracy"
    SPIKES = "spikes"
    CYCLES = "cycles"
    ACCELERATED = "accelerated latency"
    DENSE = "dense latency"

    @property
    def unit(self) -> str:
        """Of :meth:`of`.

        >>> Outcome.DENSE.unit
        'ms per call'
        """
        return {"accuracy": "share", "spikes": "per image", "cycles": "per image"}.get(self, "ms per call")

    @property
    def change_unit(self) -> str:
        """Of a change: percentage points of accuracy, per cent of anything else."""
        return "points" if self is Outcome.ACCURACY else "%"

    def of(self, net: Net) -> float | None:
        """The outcome of a network (of a latency its median), ``None`` where it was not measured."""
        if self in _PATHS:
            quantiles = net.latency.get(_PATHS[self])
            return None if quantiles is None else quantiles[1]
        return getattr(net, self.value)

    def change(self, difference: float) -> float:
        """A difference of :meth:`Pair.difference` in :attr:`change_unit`.

        >>> round(Outcome.CYCLES.change(math.log(0.8))), Outcome.ACCURACY.change(0.03)
        (-20, 3.0)
        """
        return 100 * (difference if self is Outcome.ACCURACY else math.expm1(difference))


_PATHS = {Outcome.ACCELERATED: "accelerated", Outcome.DENSE: "dense"}


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two networks that differ in one choice only."""

    net: Net
    other: Net

    def difference(self, outcome: Outcome) -> float | None:
        """Logarithm of ``net / other``, of accuracies ``net - other``; ``None`` where one is missing or 0."""
        return difference(outcome, self.net, [self.other])

    def observation(self, outcome: Outcome) -> Observation | None:
        """:meth:`difference` with the configuration and the seed it belongs to."""
        found = self.difference(outcome)
        return None if found is None else (configuration(self.net.choice), self.net.choice.seed, found)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean or a correlation, and its interval: ``None`` where there are too few ``observations``.

    ``repetitions`` says that the observations are single networks and not configurations.
    """

    value: float
    interval: Interval | None
    observations: int
    repetitions: bool = False


@dataclasses.dataclass(frozen=True)
class Effect:
    """Marginal mean of an outcome over the networks with one value of a parameter, and the change this value makes.

    ``change`` compares networks that differ in this parameter only with the mean of its other values, in the outcome's
    ``change_unit``. Unlike the means, it is not moved by what else was chosen with this value.
    """

    dataset: str
    parameter: str
    value: str
    outcome: Outcome
    nets: int
    mean: float
    interval: Interval | None
    change: float | None
    change_interval: Interval | None
    pairs: int


def complete(nets: Iterable[Net]) -> list[Net]:
    """Those whose training was neither pruned nor failed."""
    return [net for net in nets if net.status is Status.COMPLETE]


def configuration(choice: Choice) -> Choice:
    """The choice without its seed."""
    return dataclasses.replace(choice, seed=0)


def difference(outcome: Outcome, net: Net, others: Sequence[Net]) -> float | None:
    """Logarithm of ``net`` over the geometric mean of ``others``, of accuracies the difference from their mean.

    ``None`` where a figure is missing, or is 0 and has no logarithm.
    """
    values = [outcome.of(one) for one in (net, *others)]
    scaled = [_scaled(outcome, value) for value in values if value is not None]
    finite = [value for value in scaled if math.isfinite(value)]
    if len(finite) < len(values):
        return None
    return finite[0] - sum(finite[1:]) / len(others)


def _scaled(outcome: Outcome, value: float) -> float:
    if outcome is Outcome.ACCURACY:
        return value
    return math.log(value) if value > 0 else -math.inf


def pairs(nets: Iterable[Net], parameter: str, value: Any, others: Sequence[Any] | None = None) -> list[Pair]:
    """Every complete network with ``value`` and every one with one of ``others`` (default: any other value) that share
    the seed and all other choices.

    A choice that changes nothing in one of the two networks does not tell them apart: see :func:`matters`. Surrogates
    are compared at their published slopes, since the same number is another steepness in each of their formulas.
    """
    blocks: dict[Hashable, list[Net]] = defaultdict(list)
    for net in complete(nets):
        if parameter != "surrogate" or net.choice.slope is None:
            blocks[_rest(net.choice, parameter)].append(net)
    found = []
    for block in blocks.values():
        compared = [net for net in block if _is_other(getattr(net.choice, parameter), value, others)]
        chosen = [net for net in block if getattr(net.choice, parameter) == value]
        found += [Pair(net, other) for net in chosen for other in compared if _share_what_matters(net, other)]
    return found


def matters(choice: Choice, parameter: str) -> bool:
    """Whether a choice changes anything: beta does not in an IF neuron, what is matched only in a Lapicque neuron, and
    the slope not in a stochastic spike operator.

    >>> from .records import Matched
    >>> matters(Choice("digits", "snntorch", Neuron.IF, Surrogate.ARCTAN, 1.0, 1.0, None, Matched.BETA, 0), "beta")
    False
    """
    if parameter == "beta":
        return choice.neuron is not Neuron.IF
    if parameter == "matched":
        return choice.neuron is Neuron.LAPICQUE
    return parameter != "slope" or choice.surrogate is not Surrogate.STOCHASTIC


def _rest(choice: Choice, parameter: str) -> Hashable:
    left_out = (parameter, *_TOLD_BY_NEURON) if parameter == "neuron" else (parameter,)
    names = [field.name for field in dataclasses.fields(choice) if field.name not in left_out]
    return tuple(getattr(choice, name) for name in names)


_TOLD_BY_NEURON = ("beta", "matched")  # whether they matter


def _share_what_matters(net: Net, other: Net) -> bool:
    return all(
        getattr(net.choice, name) == getattr(other.choice, name)
        for name in _TOLD_BY_NEURON
        if net.choice.neuron is not other.choice.neuron and matters(net.choice, name) and matters(other.choice, name)
    )


def _is_other(found: Any, value: Any, others: Sequence[Any] | None) -> bool:
    return found != value if others is None else found in others


def estimate(observed: Iterable[Observation]) -> Estimate | None:
    """Mean of the means of all configurations; ``None`` without an observation.

    The interval is the bias-corrected and accelerated bootstrap's, below 25 observations Student's.

    >>> steady = estimate((name, 0, value) for name, value in zip("abcdef", (1.0, 1.1, 0.9, 1.2, 1.0, 0.8)))
    >>> round(steady.value, 3), [round(end, 2) for end in steady.interval]
    (1.0, [0.85, 1.15])
    """
    values, repetitions = _observations(observed)
    if not len(values):
        return None
    interval = _mean_interval(values) if len(values) >= ENOUGH else None
    return Estimate(float(np.mean(values)), interval, len(values), repetitions)


def p_value(observed: Iterable[Observation]) -> float | None:
    """Of a mean of 0, by a permutation test that flips the signs of the observations of :func:`estimate`.

    It is exact up to 13 observations, and ``None`` where there are too few.

    >>> p_value((name, 0, value) for name, value in zip("abcdef", (1.0, 1.1, 0.9, 1.2, 1.0, 0.8)))
    0.03125
    """
    values, _ = _observations(observed)
    if len(values) < ENOUGH:
        return None
    flips = {"permutation_type": "samples", "vectorized": True, "axis": -1, "n_resamples": _SIGN_FLIPS}
    return float(stats.permutation_test((values,), np.mean, rng=np.random.default_rng(0), **flips).pvalue)


def _observations(observed: Iterable[Observation]) -> tuple[np.ndarray, bool]:
    """A value per configuration, or per configuration and seed where there are too few configurations."""
    repeated = _means(((group, seed), value) for group, seed, value in observed)
    grouped = _means((group, value) for (group, _), value in repeated.items())
    few = len(grouped) < ENOUGH <= len(repeated)
    return np.array(list((repeated if few else grouped).values())), few


def _means(values: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    found: dict[Any, list[float]] = defaultdict(list)
    for key, value in values:
        found[key].append(value)
    return {key: float(np.mean(members)) for key, members in found.items()}


def _mean_interval(values: np.ndarray) -> Interval:
    if np.ptp(values) < 1e-12 * np.abs(values).max():
        return float(values.min()), float(values.max())
    if len(values) >= _BOOTSTRAPPED:
        return _bootstrapped((values,), np.mean)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(LEVEL)
    return float(low), float(high)


def _bootstrapped(samples: Sequence[np.ndarray], statistic: Callable[..., Any]) -> Interval:
    how = {"vectorized": True, "axis": -1, "confidence_level": LEVEL, "n_resamples": _RESAMPLES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what they warn of is dealt with below
        rng = np.random.default_rng(0)
        found = stats.bootstrap(samples, statistic, paired=len(samples) > 1, method="BCa", rng=rng, **how)
        low, high = found.confidence_interval
        if not (np.isfinite(low) and np.isfinite(high)):
            # Not defined where resamples hardly differ: then whatever they gave.
            low, high = np.nanmin(found.bootstrap_distribution), np.nanmax(found.bootstrap_distribution)
    return float(low), float(high)


def rank_correlation(nets: Iterable[Net], first: Outcome, second: Outcome) -> Estimate | None:
    """Spearman's rank correlation of two outcomes over configurations; ``None`` where it is not defined.

    The interval is the bias-corrected and accelerated bootstrap's, below 25 configurations Fisher's.

    >>> from .records import Matched
    >>> def net(beta, accuracy, cycles):
    ...     choice = Choice("digits", "snntorch", Neuron.LIF, Surrogate.ARCTAN, beta, 1.0, None, Matched.BETA, 0)
    ...     return Net(choice, Status.COMPLETE, accuracy, cycles=cycles)
    >>> nets = [net(0.1 * i, 0.5 + 0.01 * i, 900.0 - i) for i in range(8)]
    >>> round(rank_correlation(nets, Outcome.ACCURACY, Outcome.CYCLES).value, 6)
    -1.0
    """
    measured = [(net, first.of(net), second.of(net)) for net in complete(nets)]
    both = [(net, x, y) for net, x, y in measured if x is not None and y is not None]
    xs = np.array(list(_means((configuration(net.choice), x) for net, x, _ in both).values()))
    ys = np.array(list(_means((configuration(net.choice), y) for net, _, y in both).values()))
    if len(xs) < 2 or not np.ptp(xs) or not np.ptp(ys):
        return None
    interval = _correlation_interval(xs, ys) if len(xs) >= ENOUGH else None
    return Estimate(float(_spearman(xs, ys).statistic), interval, len(xs))


def _correlation_interval(xs: np.ndarray, ys: np.ndarray) -> Interval:
    if len(xs) >= _BOOTSTRAPPED:
        return _bootstrapped((xs, ys), lambda x, y, axis: _spearman(x, y, axis).statistic)
    with np.errstate(divide="ignore"):  # of a perfect one
        low, high = _spearman(xs, ys).confidence_interval(LEVEL)
    return float(low), float(high)


def _spearman(xs: np.ndarray, ys: np.ndarray, axis: int = -1) -> Any:
    """Pearson's of the ranks, which scipy has along an axis."""
    return stats.pearsonr(stats.rankdata(xs, axis=axis), stats.rankdata(ys, axis=axis), axis=axis)


def effects(nets: Sequence[Net], outcomes: Sequence[Outcome] = tuple(Outcome)) -> list[Effect]:
    """Of every value of every parameter that varies within a dataset, on every outcome that was measured.

    Networks in which the parameter changes nothing (:func:`matters`) are left out.
    """
    found = []
    for dataset in dict.fromkeys(net.choice.dataset for net in nets):
        members = [net for net in complete(nets) if net.choice.dataset == dataset]
        for parameter in PARAMETERS:
            concerned = [net for net in members if matters(net.choice, parameter)]
            values = sorted({getattr(net.choice, parameter) for net in concerned}, key=_order)
            if len(values) > 1:
                found += [_effect(concerned, parameter, value, outcome) for value in values for outcome in outcomes]
    return [effect for effect in found if effect is not None]


def _order(value: Any) -> tuple[bool, float, str]:
    number = value if isinstance(value, int | float) else 0.0
    return value is not None, number, str(value)


def _effect(nets: Sequence[Net], parameter: str, value: Any, outcome: Outcome) -> Effect | None:
    """Of one value within one dataset; ``None`` where none of its networks has the outcome."""
    chosen = [(net.choice, outcome.of(net)) for net in nets if getattr(net.choice, parameter) == value]
    measured = [(configuration(choice), choice.seed, figure) for choice, figure in chosen if figure is not None]
    mean = estimate(measured)
    if mean is None:
        return None
    paired = [pair.observation(outcome) for pair in pairs(nets, parameter, value)]
    compared = [observation for observation in paired if observation is not None]
    change = estimate(compared)
    return Effect(
        dataset=nets[0].choice.dataset,
        parameter=parameter,
        value=value_name(value),
        outcome=outcome,
        nets=len(measured),
        mean=mean.value,
        interval=mean.interval,
        change=None if change is None else outcome.change(change.value),
        change_interval=None if change is None else changes(outcome, change.interval),
        pairs=len(compared),
    )


def value_name(value: Any) -> str:
    """A choice as text; ``None``, which is a surrogate's published slope, is ``default``.

    >>> value_name(None), value_name(0.9)
    ('default', '0.9')
    """
    return "default" if value is None else str(value)


def changes(outcome: Outcome, interval: Interval | None) -> Interval | None:
    """An interval of differences in the outcome's ``change_unit``."""
    return None if interval is None else (outcome.change(interval[0]), outcome.change(interval[1]))


def pareto(nets: Iterable[Net], cost: Outcome = Outcome.ACCELERATED) -> list[Net]:
    """The complete networks that no other beats in accuracy without a higher cost, cheapest first.

    >>> from .records import Matched
    >>> def net(seed, accuracy, cycles):
    ...     choice = Choice("digits", "snntorch", Neuron.LIF, Surrogate.ARCTAN, 0.9, 1.0, None, Matched.BETA, seed)
    ...     return Net(choice, Status.COMPLETE, accuracy, cycles=cycles)
    >>> nets = [net(0, 0.90, 100.0), net(1, 0.95, 200.0), net(2, 0.93, 300.0)]
    >>> [found.accuracy for found in pareto(nets, Outcome.CYCLES)]
    [0.9, 0.95]
    """
    measured = [(cost.of(net), net.accuracy, net) for net in complete(nets)]
    points = [(price, accuracy, net) for price, accuracy, net in measured if price is not None and accuracy is not None]
    front: list[Net] = []
    best = -math.inf
    for _, accuracy, net in sorted(points, key=lambda point: (point[0], -point[1])):
        if accuracy > best:
            front.append(net)
            best = accuracy
    return front
