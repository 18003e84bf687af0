"""Which published findings hold in a study, which do not, and which cannot be said.

The findings are those of "Surrogates, Spikes, and Sparsity" (arXiv 2603.24891), about cycles of an event-driven
accelerator. They are judged on that cost and on the accelerated latency of this machine, each dataset by itself.
How: ``docs/study.md``.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy import stats

from .effects import (
    ENOUGH,
    Estimate,
    Interval,
    Observation,
    Outcome,
    Pair,
    changes,
    complete,
    configuration,
    difference,
    estimate,
    p_value,
    pairs,
    rank_correlation,
)
from .records import Choice, Matched, Net, Neuron, Study, Surrogate

COMPARABLE = 0.10
"""Largest difference of accuracy within a pair: a network that did not learn costs nothing and means nothing."""
POOR = 0.5
"""Rank correlations closer to 0 predict poorly: they explain less than a quarter of the variance of ranks."""
_SIGNIFICANT = 0.05
_FEWEST_CANDIDATES = 3
_JUDGED_COSTS = (Outcome.CYCLES, Outcome.ACCELERATED)


class Verdict(enum.StrEnum):
    """What a study says of a published finding."""

    HOLDS = "holds"
    DOES_NOT_HOLD = "does not hold"  # an effect worth having is ruled out
    OPPOSITE = "opposite"
    UNDECIDED = "cannot be said"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A published finding, what the study measured of it, and the verdict.

    ``estimate`` and its 95 % ``interval`` are in ``unit``: per cent of change, points of accuracy, or a rank
    correlation. ``published_value`` is what was published in that unit. ``p_value`` is adjusted for all effects that
    were tested; a rank correlation has none, because its interval alone is judged.
    """

    name: str
    dataset: str
    published: str
    estimate: float | None
    interval: Interval | None
    unit: str
    pairs: int
    verdict: Verdict
    sentence: str
    published_value: float | None = None
    p_value: float | None = None


@dataclasses.dataclass(frozen=True)
class _Claim:
    """A published effect: ``value`` instead of ``others`` changes an outcome by ``published_value``."""

    text: str
    published: str
    published_value: float
    outcome: Outcome

    @property
    def sign(self) -> int:
        """Of the change that is claimed, which is an improvement."""
        return 1 if self.outcome is Outcome.ACCURACY else -1

    @property
    def worth(self) -> float:
        """The smallest improvement worth having: a point of accuracy, 5 % of a cost."""
        return 1.0 if self.outcome is Outcome.ACCURACY else 5.0

    @property
    def worth_text(self) -> str:
        """:attr:`worth` with its unit."""
        return "one point" if self.outcome is Outcome.ACCURACY else f"{self.worth:.0f} %"

    @property
    def name(self) -> str:
        """Of the finding."""
        return f"{self.text}: {self.outcome}"


@dataclasses.dataclass(frozen=True)
class _Test:
    """A claim with the observations it is judged by, within one dataset."""

    claim: _Claim
    dataset: str
    observed: tuple[Observation, ...]
    counted: int
    of: str  # what was counted
    note: str


def findings(study: Study) -> tuple[Finding, ...]:
    """Every published finding for every dataset and cost; those that cannot be judged are among them.

    >>> findings(Study({}, ()))
    ()
    """
    tests, correlations = [], []
    for dataset in dict.fromkeys(net.choice.dataset for net in study.nets):
        nets = [net for net in complete(study.nets) if net.choice.dataset == dataset]
        tests += _surrogate_tests(dataset, nets) + _neuron_tests(dataset, nets) + _selection_tests(dataset, nets)
        correlations += _correlations(dataset, nets)
    return *_judged(tests), *correlations


# ---- one choice against another ----------------------------------------------------------------------------


def _surrogate_tests(dataset: str, nets: Sequence[Net]) -> list[_Test]:
    published = "up to 12.2 % less latency (DVS128-Gesture)"
    found = pairs(nets, "surrogate", Surrogate.SPIKE_RATE_ESCAPE)
    text = "spike rate escape instead of other surrogates"
    return [_choice_test(_Claim(text, published, -12.2, cost), dataset, found) for cost in _JUDGED_COSTS]


def _neuron_tests(dataset: str, nets: Sequence[Net]) -> list[_Test]:
    published = "up to 28 % less latency"
    tests = []
    for matched in Matched:
        found = [pair for pair in _lapicque_pairs(nets) if pair.net.choice.matched is matched]
        text = f"Lapicque instead of LIF at equal {matched}"
        tests += [_choice_test(_Claim(text, published, -28.0, cost), dataset, found) for cost in _JUDGED_COSTS]
    return tests


def _lapicque_pairs(nets: Sequence[Net]) -> list[Pair]:
    return pairs(nets, "neuron", Neuron.LAPICQUE, [Neuron.LIF])


def _choice_test(claim: _Claim, dataset: str, found: Sequence[Pair]) -> _Test:
    measured = [(pair, pair.observation(claim.outcome)) for pair in found]
    fair = [(pair, observation) for pair, observation in measured if observation is not None and _comparable(pair)]
    unfair = sum(observation is not None for _, observation in measured) - len(fair)
    note = _accuracy_note([pair for pair, _ in fair])
    if unfair:
        note += f" Left out: {unfair} pairs whose accuracies are more than {100 * COMPARABLE:.0f} points apart."
    return _Test(claim, dataset, tuple(observation for _, observation in fair), len(fair), "pairs", note.strip())


def _comparable(pair: Pair) -> bool:
    gap = pair.difference(Outcome.ACCURACY)
    return gap is not None and abs(gap) <= COMPARABLE


def _accuracy_note(fair: Sequence[Pair]) -> str:
    observed = [pair.observation(Outcome.ACCURACY) for pair in fair]
    found = estimate(observation for observation in observed if observation is not None)
    return "" if found is None else f"In the same pairs, accuracy changes by {100 * found.value:+.1f} points."


# ---- selection by sparsity ---------------------------------------------------------------------------------


def _selection_tests(dataset: str, nets: Sequence[Net]) -> list[_Test]:
    claims = [_Claim("selection by sparsity", "9.1 % more accuracy", 9.1, Outcome.ACCURACY)]
    published = "latency better by more than 2x"
    claims += [_Claim("selection by sparsity", published, -50.0, cost) for cost in _JUDGED_COSTS]
    picked = list(_selections(nets))
    return [_selection_test(claim, dataset, picked) for claim in claims]


def _selection_test(claim: _Claim, dataset: str, picked: Sequence[tuple[Net, list[Net]]]) -> _Test:
    observed = []
    for net, candidates in picked:
        change = difference(claim.outcome, net, candidates)
        if change is not None:
            observed.append((_group(net.choice), net.choice.seed, change))
    note = "Picked by the other seeds (fewest spikes with at least median accuracy), compared with all candidates."
    note = note if observed else "It takes two seeds, and three settings of a neuron model."
    return _Test(claim, dataset, tuple(observed), len(observed), "selections", note)


def _group(choice: Choice) -> tuple[Any, ...]:
    """Candidates share what a user would not select by sparsity: the framework and the neuron model."""
    return choice.framework, choice.neuron, choice.matched


def _selections(nets: Sequence[Net]) -> Iterator[tuple[Net, list[Net]]]:
    """The network picked for every group and seed by what the other seeds gave, and all its candidates.

    A network picked by its own figures would look better than it is.
    """
    groups: dict[Any, list[Net]] = defaultdict(list)
    for net in nets:
        if net.accuracy is not None and net.spikes is not None:
            groups[_group(net.choice)].append(net)
    for members in groups.values():
        for seed in sorted({net.choice.seed for net in members}):
            picked = _pick(members, seed)
            if picked is not None:
                yield picked


def _pick(members: Sequence[Net], seed: int) -> tuple[Net, list[Net]] | None:
    """For one seed: the fewest spikes at the other seeds, of those whose accuracy there is at least the median."""
    elsewhere: dict[Choice, list[tuple[float, float]]] = defaultdict(list)
    for net in members:
        if net.choice.seed != seed and net.accuracy is not None and net.spikes is not None:
            elsewhere[configuration(net.choice)].append((net.accuracy, net.spikes))
    candidates = [net for net in members if net.choice.seed == seed and configuration(net.choice) in elsewhere]
    if len(candidates) < _FEWEST_CANDIDATES:
        return None
    known = [np.mean(elsewhere[configuration(net.choice)], axis=0) for net in candidates]
    median = np.median([accuracy for accuracy, _ in known])
    accurate = [index for index, (accuracy, _) in enumerate(known) if accuracy >= median]
    return candidates[min(accurate, key=lambda index: known[index][1])], candidates


# ---- verdicts ----------------------------------------------------------------------------------------------


def _judged(tests: Sequence[_Test]) -> list[Finding]:
    tested = {test: found for test in tests if (found := p_value(test.observed)) is not None}
    adjusted = stats.false_discovery_control(list(tested.values())) if tested else ()
    p_values = dict(zip(tested, map(float, adjusted), strict=True))
    return [_finding(test, p_values.get(test), len(tested)) for test in tests]


def _finding(test: _Test, p_value: float | None, tested: int) -> Finding:
    claim, found = test.claim, estimate(test.observed)
    interval = None if found is None else changes(claim.outcome, found.interval)
    change = None if found is None else claim.outcome.change(found.value)
    verdict = judge(claim.sign, claim.worth, interval, p_value)
    parts = (_measured(test, found, change, interval), _because(claim, verdict, interval, p_value, tested), test.note)
    return Finding(
        name=claim.name,
        dataset=test.dataset,
        published=claim.published,
        estimate=change,
        interval=interval,
        unit=claim.outcome.change_unit,
        pairs=test.counted,
        verdict=verdict,
        sentence=" ".join(filter(None, parts)),
        published_value=claim.published_value,
        p_value=p_value,
    )


def judge(sign: int, worth: float, interval: Interval | None, p_value: float | None) -> Verdict:
    """The verdict on a claimed change with that sign, of which ``worth`` is the least worth having.

    It holds (or its opposite does) if the whole interval is on one side of 0 and the adjusted p-value is at most 0.05;
    otherwise it does not hold if the whole interval is below ``worth``, and cannot be said if it is not.

    >>> judge(-1, 5.0, (-20.0, -8.0), 0.001), judge(-1, 5.0, (-2.0, 3.0), 0.6)
    (<Verdict.HOLDS: 'holds'>, <Verdict.DOES_NOT_HOLD: 'does not hold'>)
    >>> judge(-1, 5.0, (-20.0, 3.0), 0.1), judge(-1, 5.0, None, None)
    (<Verdict.UNDECIDED: 'cannot be said'>, <Verdict.UNDECIDED: 'cannot be said'>)
    """
    if interval is None or p_value is None:
        return Verdict.UNDECIDED
    low, high = sorted(sign * end for end in interval)
    significant = p_value <= _SIGNIFICANT
    if significant and low > 0:
        return Verdict.HOLDS
    if significant and high < 0:
        return Verdict.OPPOSITE
    return Verdict.DOES_NOT_HOLD if high < worth else Verdict.UNDECIDED


def _measured(test: _Test, found: Estimate | None, change: float | None, interval: Interval | None) -> str:
    if found is None or change is None:
        return f"There are no {test.of} to judge the {test.claim.outcome} by."
    unit = test.claim.outcome.change_unit
    over = f"{test.counted} {test.of}, {found.observations} {_observation_name(test, found)}"
    text = f"{test.claim.text[0].upper()}{test.claim.text[1:]} changes {test.claim.outcome} by {change:+.1f} {unit}"
    if interval is None:
        return f"{text} ({over})."
    low, high = interval
    return f"{text} (95 % interval {low:+.1f} to {high:+.1f}; {over})."


def _observation_name(test: _Test, found: Estimate) -> str:
    if found.repetitions:
        return "repetitions of too few configurations to say anything of others"
    return "configurations" if test.of == "pairs" else "groups"


def _because(claim: _Claim, verdict: Verdict, interval: Interval | None, p_value: float | None, tested: int) -> str:
    if interval is None or p_value is None:
        return f"Too few to judge: {ENOUGH} are needed."
    p_text = f"p = {p_value:.2g} after correction for {tested} tests"
    if verdict is Verdict.HOLDS:
        return f"{_against_published(claim, interval)} ({p_text})."
    if verdict is Verdict.OPPOSITE:
        return f"This is a change for the worse ({p_text})."
    if verdict is Verdict.DOES_NOT_HOLD:
        return f"An improvement of {claim.worth_text} is ruled out ({p_text})."
    return f"Neither an improvement of {claim.worth_text} nor none at all is ruled out ({p_text})."


def _against_published(claim: _Claim, interval: Interval) -> str:
    low, high = sorted(claim.sign * end for end in interval)
    published = claim.sign * claim.published_value
    if low <= published <= high:
        return "As large as published"
    return "Smaller than published" if high < published else "Larger than published"


# ---- accuracy as a predictor -------------------------------------------------------------------------------


def _correlations(dataset: str, nets: Sequence[Net]) -> list[Finding]:
    """Within one framework: the same network has other latencies in another one."""
    frameworks = list(dict.fromkeys(net.choice.framework for net in nets)) or [""]
    found = []
    for framework in frameworks:
        members = [net for net in nets if net.choice.framework == framework]
        name = dataset if len(frameworks) == 1 else f"{dataset}, {framework}"
        found += [_correlation(name, members, cost) for cost in _JUDGED_COSTS]
    return found


def _correlation(dataset: str, nets: Sequence[Net], cost: Outcome) -> Finding:
    found = rank_correlation(nets, Outcome.ACCURACY, cost)
    spikes = rank_correlation(nets, Outcome.SPIKES, cost)
    interval = None if found is None else found.interval
    verdict = judge_correlation(interval)
    parts = [_correlation_text(found, cost), _WHY_CORRELATED[verdict] if interval else f"{ENOUGH} are needed."]
    if spikes is not None:
        parts.append(f"That of spikes and {cost} is {spikes.value:+.2f}.")
    return Finding(
        name=f"accuracy is a poor predictor: {cost}",
        dataset=dataset,
        published="accuracy is a poor predictor of hardware cost",
        estimate=None if found is None else found.value,
        interval=interval,
        unit="rank correlation",
        pairs=0 if found is None else found.observations,
        verdict=verdict,
        sentence=" ".join(parts),
    )


def judge_correlation(interval: Interval | None) -> Verdict:
    """Accuracy predicts poorly if the whole interval is nearer to 0 than :data:`POOR`, and well if it is farther.

    >>> judge_correlation((-0.2, 0.3)).value, judge_correlation((0.6, 0.9)).value, judge_correlation((0.1, 0.7)).value
    ('holds', 'does not hold', 'cannot be said')
    """
    if interval is None:
        return Verdict.UNDECIDED
    low, high = interval
    if low > -POOR and high < POOR:
        return Verdict.HOLDS
    return Verdict.DOES_NOT_HOLD if low > POOR or high < -POOR else Verdict.UNDECIDED


_WHY_CORRELATED = {
    Verdict.HOLDS: f"All of it is below {POOR}: accuracy explains under a quarter of the variance of ranks.",
    Verdict.DOES_NOT_HOLD: f"All of it is beyond {POOR}: accuracy predicts this cost.",
    Verdict.UNDECIDED: f"It reaches from below {POOR} to beyond it.",
}


def _correlation_text(found: Estimate | None, cost: Outcome) -> str:
    if found is None:
        return f"No rank correlation of accuracy and {cost} can be computed:"
    text = f"The rank correlation of accuracy and {cost} is {found.value:+.2f}"
    if found.interval is None:
        return f"{text} ({found.observations} configurations):"
    low, high = found.interval
    return f"{text} (95 % interval {low:+.2f} to {high:+.2f}; {found.observations} configurations)."
