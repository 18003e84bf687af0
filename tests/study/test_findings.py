"""Known effects are found with the right verdict, intervals cover them, and what cannot be said is not said."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseflow.study import effects
from sparseflow.study.effects import ENOUGH, Outcome, Pair
from sparseflow.study.findings import COMPARABLE, Finding, Verdict, findings, judge
from sparseflow.study.records import Choice, Matched, Neuron, Status, Study, Surrogate

from .invented import choice, ended, everything, grid, net, of, study

ESCAPE = Surrogate.SPIKE_RATE_ESCAPE
NOT_SAID = {Verdict.DOES_NOT_HOLD, Verdict.UNDECIDED}
SURROGATE = "spike rate escape instead of other surrogates: cycles"
BETA, TIME_CONSTANT = (f"Lapicque instead of LIF at equal {matched}: cycles" for matched in Matched)
PREDICTOR = "accuracy is a poor predictor: cycles"


def by_name(found: Study) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings(found)}


def percent(effect: float) -> float:
    return 100 * math.expm1(effect)


class TestPairs:
    def test_they_differ_in_that_choice_only(self):
        nets = study().nets
        found = effects.pairs(nets, "surrogate", ESCAPE)
        assert len(found) == len([each for each in nets if each.choice.surrogate is ESCAPE]) * 4
        for pair in found:
            assert pair.net.choice.surrogate is ESCAPE
            assert pair.other.choice.surrogate is not ESCAPE
            assert dataclasses.replace(pair.other.choice, surrogate=ESCAPE) == pair.net.choice

    def test_neurons_are_compared_whatever_their_beta_is_matched_by(self):
        found = effects.pairs(study().nets, "neuron", Neuron.LAPICQUE, [Neuron.LIF])
        assert {pair.net.choice.matched for pair in found} == set(Matched)
        for pair in found:
            same = dataclasses.replace(pair.other.choice, neuron=Neuron.LAPICQUE, matched=pair.net.choice.matched)
            assert same == pair.net.choice
            assert pair.other.choice.neuron is Neuron.LIF

    def test_an_if_neuron_is_compared_with_those_of_every_beta(self):
        nets = [net(beta=0.5), net(beta=0.9), net(neuron=Neuron.PLIF, beta=0.9), net(neuron=Neuron.IF, beta=1.0)]
        betas = lambda neuron: [  # noqa: E731
            (pair.net.choice.beta, pair.other.choice.neuron, pair.other.choice.beta)
            for pair in effects.pairs(nets, "neuron", neuron)
        ]
        assert betas(Neuron.IF) == [(1.0, Neuron.LIF, 0.5), (1.0, Neuron.LIF, 0.9), (1.0, Neuron.PLIF, 0.9)]
        assert betas(Neuron.PLIF) == [(0.9, Neuron.LIF, 0.9), (0.9, Neuron.IF, 1.0)]

    def test_surrogates_are_compared_at_their_published_slopes(self):
        nets = [net(surrogate=surrogate, slope=slope) for surrogate in Surrogate for slope in (None, 5.0)]
        assert {pair.net.choice.slope for pair in effects.pairs(nets, "surrogate", ESCAPE)} == {None}
        assert len(effects.pairs(nets, "slope", 5.0)) == len(Surrogate)

    def test_what_did_not_end_is_in_no_pair(self):
        nets = [
            net(surrogate=ESCAPE),
            ended(Status.PRUNED),
            dataclasses.replace(net(surrogate=Surrogate.SIGMOID), status=Status.FAILED),
            net(surrogate=Surrogate.FAST_SIGMOID),
        ]
        assert [pair.other.choice.surrogate for pair in effects.pairs(nets, "surrogate", ESCAPE)] == [
            Surrogate.FAST_SIGMOID
        ]

    def test_no_partner_no_pair(self):
        nets = [net(surrogate=ESCAPE, seed=0), net(seed=1), net(seed=0, beta=0.5)]
        assert effects.pairs(nets, "surrogate", ESCAPE) == []

    def test_costs_are_compared_as_ratios_and_accuracies_as_differences(self):
        pair = Pair(net(0.8, 500.0), net(0.9, 1000.0))
        assert pair.difference(Outcome.CYCLES) == pytest.approx(math.log(0.5))
        assert pair.difference(Outcome.ACCURACY) == pytest.approx(-0.1)
        assert Outcome.CYCLES.change(math.log(0.5)) == pytest.approx(-50)

    @pytest.mark.parametrize("silent", [None, 0.0])
    def test_what_has_no_figure_or_no_logarithm_is_not_compared(self, silent):
        assert Pair(net(cycles=silent), net()).difference(Outcome.CYCLES) is None
        assert Pair(net(), net(cycles=silent)).difference(Outcome.CYCLES) is None


class TestEstimate:
    @pytest.mark.parametrize("count", [8, 30])
    def test_an_interval_covers_the_truth_as_often_as_it_says(self, count):
        random = np.random.default_rng(3)
        covered = 0
        for _ in range(100):
            values = random.normal(0.3, 1.0, count)
            low, high = effects.estimate((i, 0, value) for i, value in enumerate(values)).interval
            covered += low <= 0.3 <= high
        assert 90 <= covered <= 99

    def test_seeds_are_repetitions_and_not_observations(self):
        values = np.random.default_rng(1).normal(0.0, 1.0, 8)
        once = effects.estimate((i, 0, value) for i, value in enumerate(values))
        often = effects.estimate((i, seed, value) for i, value in enumerate(values) for seed in range(9))
        assert (often.value, often.observations) == (pytest.approx(once.value), 8)
        assert often.interval == pytest.approx(once.interval)
        assert not often.repetitions

    def test_too_few_configurations_fall_back_to_their_repetitions_and_say_so(self):
        found = effects.estimate((i, seed, 1.0 + 0.1 * seed) for i in range(2) for seed in range(5))
        assert (found.observations, found.repetitions) == (10, True)

    @pytest.mark.parametrize("count", [1, ENOUGH - 1])
    def test_too_few_have_a_mean_and_no_interval(self, count):
        found = effects.estimate((i, 0, 2.0) for i in range(count))
        assert (found.value, found.interval) == (2.0, None)
        assert effects.p_value((i, 0, 2.0) for i in range(count)) is None

    def test_none_at_all(self):
        assert effects.estimate([]) is None

    def test_values_that_are_all_the_same_have_an_interval_of_no_width(self):
        found = effects.estimate((i, 0, -0.5) for i in range(10))
        assert found.interval == pytest.approx((-0.5, -0.5))

    def test_p_values_of_nothing_are_rarely_small(self):
        random = np.random.default_rng(5)
        drawn = [effects.p_value((i, 0, value) for i, value in enumerate(random.normal(size=10))) for _ in range(100)]
        assert sum(found <= 0.05 for found in drawn) <= 12


class TestChoices:
    def test_a_saving_is_found_and_its_interval_covers_it(self):
        found = by_name(study(of("surrogate", ESCAPE, -0.13), seed=1))[SURROGATE]
        assert found.verdict is Verdict.HOLDS
        assert found.interval[0] <= percent(-0.13) <= found.interval[1]
        assert found.estimate == pytest.approx(percent(-0.13), abs=1)
        assert (found.unit, found.pairs, found.dataset) == ("%", 8 * 3 * 4, "digits")
        assert found.p_value <= 0.05

    def test_its_interval_covers_it_as_often_as_it_says(self):
        covered = 0
        for seed in range(40):
            found = effects.pairs(study(of("surrogate", ESCAPE, -0.13), seed=seed).nets, "surrogate", ESCAPE)
            low, high = effects.estimate(pair.observation(Outcome.CYCLES) for pair in found).interval
            covered += low <= -0.13 <= high
        assert covered >= 34

    @pytest.mark.parametrize(
        ("effect", "said"), [(-0.13, "As large as"), (-0.07, "Smaller than"), (-0.3, "Larger than")]
    )
    def test_the_sentence_compares_it_with_what_was_published(self, effect, said):
        found = by_name(study(of("surrogate", ESCAPE, effect), noise=0.03, seed=1))[SURROGATE]
        assert found.verdict is Verdict.HOLDS
        assert f"{said} published" in found.sentence

    def test_nothing_is_found_where_there_is_nothing(self):
        quiet = by_name(study())
        for name in (SURROGATE, BETA, TIME_CONSTANT):
            assert quiet[name].verdict is Verdict.DOES_NOT_HOLD
            assert "is ruled out" in quiet[name].sentence

    def test_noise_is_no_finding(self):
        choices = list(grid(surrogates=[Surrogate.ARCTAN, ESCAPE]))
        found = [by_name(study(noise=0.5, seed=seed, choices=choices))[SURROGATE] for seed in range(10)]
        verdicts = [finding.verdict for finding in found]
        assert verdicts.count(Verdict.UNDECIDED) >= 5
        assert sum(verdict not in NOT_SAID for verdict in verdicts) <= 1
        assert all("Neither" in finding.sentence for finding in found if finding.verdict is Verdict.UNDECIDED)

    def test_equal_beta_and_equal_time_constant_are_told_apart(self):
        def cost(found: Choice) -> float:
            if found.neuron is not Neuron.LAPICQUE:
                return 0.0
            return 0.2 if found.matched is Matched.BETA else -0.2

        found = by_name(study(cost))
        assert found[BETA].verdict is Verdict.OPPOSITE
        assert found[TIME_CONSTANT].verdict is Verdict.HOLDS
        assert found[BETA].interval[0] <= percent(0.2) <= found[BETA].interval[1]
        assert found[BETA].pairs == found[TIME_CONSTANT].pairs == 5 * 2 * 3

    def test_an_effect_of_something_else_is_no_effect_of_this(self):
        found = by_name(study(of("beta", 0.5, 0.8)))
        assert {found[name].verdict for name in (SURROGATE, BETA, TIME_CONSTANT)} == {Verdict.DOES_NOT_HOLD}

    def test_networks_that_did_not_learn_are_left_out(self):
        """Silent networks cost nothing; that is no saving."""
        assert COMPARABLE < 0.5
        lost = lambda found: -0.8 if found.surrogate is ESCAPE and found.beta == 0.5 else 0.0  # noqa: E731
        silent = lambda found: -2.0 if found.surrogate is ESCAPE and found.beta == 0.5 else 0.0  # noqa: E731
        choices = list(grid(betas=(0.5, 0.8, 0.9)))
        found = by_name(study(silent, lost, choices=choices))[SURROGATE]
        assert found.verdict is Verdict.DOES_NOT_HOLD
        assert found.pairs == 2 * 4 * 3 * 4
        assert f"Left out: {4 * 3 * 4} pairs" in found.sentence

    def test_the_sentence_says_what_it_costs_in_accuracy(self):
        found = by_name(study(of("surrogate", ESCAPE, -0.2), of("surrogate", ESCAPE, -0.05)))[SURROGATE]
        assert "accuracy changes by -5.0 points" in found.sentence

    def test_too_few_networks_are_not_judged(self):
        choices = list(grid(neurons=[Neuron.LIF], betas=[0.5, 0.9], seeds=[0]))
        found = by_name(study(of("surrogate", ESCAPE, -0.5), choices=choices))
        assert found[SURROGATE].verdict is Verdict.UNDECIDED
        assert found[SURROGATE].interval is None
        assert found[SURROGATE].estimate == pytest.approx(percent(-0.5), abs=3)
        assert "Too few" in found[SURROGATE].sentence
        assert found[BETA].verdict is Verdict.UNDECIDED
        assert found[BETA].estimate is None
        assert "There are no pairs" in found[BETA].sentence

    def test_seeds_of_one_configuration_are_judged_and_said_to_be_that(self):
        choices = list(grid(neurons=[Neuron.LIF], betas=[0.9], seeds=range(8)))
        found = by_name(study(of("surrogate", ESCAPE, -0.2), choices=choices))[SURROGATE]
        assert found.verdict is Verdict.HOLDS
        assert "repetitions of too few configurations" in found.sentence

    def test_datasets_are_judged_by_themselves(self):
        both = [*grid(), *grid(dataset="saccades")]
        found = findings(study(lambda one: -0.3 if one.surrogate is ESCAPE and one.dataset == "digits" else 0.0,
                               choices=both))  # fmt: skip
        verdicts = {finding.dataset: finding.verdict for finding in found if finding.name == SURROGATE}
        assert verdicts == {"digits": Verdict.HOLDS, "saccades": Verdict.DOES_NOT_HOLD}

    def test_p_values_are_corrected_for_the_number_of_tests(self):
        one = by_name(study(choices=list(grid(neurons=[Neuron.LIF], betas=[0.3, 0.5, 0.7, 0.8, 0.9, 0.95]))))
        tested = [finding for finding in one.values() if finding.p_value is not None]
        assert len(tested) == 2  # of the surrogate; there are no Lapicque neurons, and three selections are too few
        for finding in tested:
            assert f"after correction for {len(tested)} tests" in finding.sentence

    def test_nothing_is_claimed_of_no_networks(self):
        assert findings(Study({}, ())) == ()
        failed = findings(Study({}, (ended(Status.FAILED, "out of memory"),)))
        assert {finding.verdict for finding in failed} == {Verdict.UNDECIDED}
        assert all(finding.estimate is finding.interval is None for finding in failed)


class TestVerdict:
    @pytest.mark.parametrize(
        ("interval", "p_value", "verdict"),
        [
            ((-20.0, -1.0), 0.01, Verdict.HOLDS),
            ((-20.0, -1.0), 0.06, Verdict.UNDECIDED),  # not after correction
            ((-4.0, -1.0), 0.06, Verdict.DOES_NOT_HOLD),
            ((1.0, 20.0), 0.01, Verdict.OPPOSITE),
            ((-4.9, 20.0), 0.5, Verdict.DOES_NOT_HOLD),
            ((-5.1, 20.0), 0.5, Verdict.UNDECIDED),
        ],
    )
    def test_of_a_saving(self, interval, p_value, verdict):
        assert judge(-1, 5.0, interval, p_value) is verdict
        assert judge(1, 5.0, tuple(-end for end in interval), p_value) is verdict


class TestPredictor:
    def varied(self, linked: float, count: int = 40, **changes) -> Study:
        """Configurations whose accuracy is partly that of their cost."""
        random = np.random.default_rng(2)
        nets = []
        for i in range(count):
            cost, other = random.standard_normal(2)
            accuracy = 0.8 + 0.02 * (linked * cost + math.sqrt(1 - linked**2) * other)
            nets.append(net(accuracy, 1000 * math.exp(0.3 * cost), 2 * math.exp(0.3 * cost), beta=0.01 * i, **changes))
        return Study({}, tuple(nets))

    def test_unrelated_accuracy_is_a_poor_predictor(self):
        found = by_name(self.varied(0.0))[PREDICTOR]
        assert found.verdict is Verdict.HOLDS
        assert found.unit == "rank correlation"
        assert found.interval[0] < 0.0 < found.interval[1]
        assert "That of spikes and cycles is +1.00." in found.sentence

    @pytest.mark.parametrize("linked", [0.95, -0.95, 1.0])
    def test_accuracy_that_follows_the_cost_is_none(self, linked):
        found = by_name(self.varied(linked))[PREDICTOR]
        assert found.verdict is Verdict.DOES_NOT_HOLD
        assert found.estimate * linked > 0.8

    def test_too_few_configurations(self):
        assert by_name(self.varied(0.0, count=ENOUGH - 1))[PREDICTOR].verdict is Verdict.UNDECIDED
        assert by_name(self.varied(0.0, count=8))[PREDICTOR].verdict is Verdict.UNDECIDED

    def test_frameworks_have_other_latencies_and_are_judged_by_themselves(self):
        """Together they would be correlated, since one is faster and less accurate."""
        nets = self.varied(0.0).nets
        slower = [
            dataclasses.replace(
                each,
                choice=dataclasses.replace(each.choice, framework="spikingjelly"),
                accuracy=each.accuracy - 0.5,
                cycles=9 * each.cycles,
            )
            for each in nets
        ]
        found = [finding for finding in findings(Study({}, (*nets, *slower))) if finding.name == PREDICTOR]
        assert [finding.dataset for finding in found] == ["digits, snntorch", "digits, spikingjelly"]
        assert {finding.verdict for finding in found} == {Verdict.HOLDS}


class TestSelection:
    NAME = "selection by sparsity: cycles"

    def tuned(self, seeds=(0, 1, 2)) -> list[Choice]:
        """Seven groups of candidates: framework and neuron; what is tuned are surrogate, beta and threshold."""
        groups = [("snntorch", neuron) for neuron in Neuron] + [("spikingjelly", neuron) for neuron in Neuron]
        return [
            choice(framework=framework, neuron=neuron, beta=beta, threshold=threshold, seed=seed)
            for framework, neuron in groups
            for beta, threshold, seed in itertools.product((0.5, 0.8, 0.9), (0.5, 1.0), seeds)
        ]

    def test_sparser_candidates_cost_less(self):
        found = by_name(study(lambda one: -one.threshold - one.beta, choices=self.tuned()))[self.NAME]
        assert found.verdict is Verdict.HOLDS
        assert found.pairs == 8 * 3
        expected = percent(-1.9 - np.mean([-b - t for b in (0.5, 0.8, 0.9) for t in (0.5, 1.0)]))
        assert found.estimate == pytest.approx(expected, abs=8)  # the sparsest has not always the median accuracy

    def test_noise_alone_saves_nothing(self):
        """A network picked by its own spikes would save about one standard deviation."""
        found = by_name(study(noise=0.3, choices=self.tuned()))[self.NAME]
        assert found.interval[0] < 0 < found.interval[1]
        assert found.verdict in NOT_SAID

    def test_a_silent_network_that_learned_nothing_is_not_picked(self):
        lost = lambda one: -0.5 if (one.beta, one.threshold) == (0.9, 1.0) else 0.0  # noqa: E731
        silent = lambda one: -3.0 if (one.beta, one.threshold) == (0.9, 1.0) else 0.0  # noqa: E731
        found = by_name(study(silent, lost, choices=self.tuned()))
        assert found[self.NAME].estimate > 0
        assert found["selection by sparsity: accuracy"].estimate > 0

    def test_one_seed_cannot_be_held_out(self):
        found = by_name(study(choices=self.tuned(seeds=[0])))[self.NAME]
        assert (found.verdict, found.pairs) == (Verdict.UNDECIDED, 0)


class TestEffects:
    def test_means_are_over_configurations(self):
        nets = [net(cycles=cycles, beta=0.5, seed=seed) for seed, cycles in enumerate((100.0, 300.0))]
        nets += [net(cycles=800.0, beta=0.5, threshold=0.5), net(cycles=50.0)]
        found = {e.value: e for e in effects.effects(nets, [Outcome.CYCLES]) if e.parameter == "beta"}
        assert found["0.5"].mean == pytest.approx((200.0 + 800.0) / 2)
        assert (found["0.5"].nets, found["0.9"].nets) == (3, 1)
        assert found["0.5"].interval is None

    def test_a_change_is_between_networks_that_differ_in_nothing_else(self):
        """Thresholds of 2 were only run with a costly beta: their mean is high, and the change is not."""
        cost = lambda one: 2.0 * (one.beta > 0.8) - 0.2 * (one.threshold > 1)  # noqa: E731
        choices = [*grid(), *grid(betas=[0.9], threshold=2.0)]
        found = {e.value: e for e in effects.effects(study(cost, choices=choices).nets, [Outcome.CYCLES])
                 if e.parameter == "threshold"}  # fmt: skip
        assert found["2.0"].mean > found["1.0"].mean
        assert found["2.0"].change_interval[0] <= percent(-0.2) <= found["2.0"].change_interval[1]
        assert found["2.0"].change == pytest.approx(percent(-0.2), abs=1)

    def test_only_what_varies_has_an_effect(self):
        found = effects.effects(study().nets)
        assert {effect.parameter for effect in found} == {"neuron", "surrogate", "beta", "matched"}
        assert {effect.outcome for effect in found} == set(Outcome)
        assert [e.value for e in found if (e.parameter, e.outcome) == ("beta", Outcome.DENSE)] == ["0.5", "0.9"]

    def test_networks_in_which_a_choice_changes_nothing_are_not_asked_about_it(self):
        nets = [net(beta=0.5), net(beta=0.9), net(neuron=Neuron.IF, beta=1.0)]
        nets += [net(neuron=Neuron.LAPICQUE, matched=matched) for matched in Matched]
        found = effects.effects(nets, [Outcome.CYCLES])
        assert {(e.parameter, e.value): e.nets for e in found if e.parameter != "neuron"} == {
            ("beta", "0.5"): 1, ("beta", "0.9"): 3, ("matched", "beta"): 1, ("matched", "time constant"): 1,
        }  # fmt: skip

    def test_outcomes_that_were_not_measured_have_none(self):
        nets = [net(cycles=None, ms=None, beta=beta) for beta in (0.5, 0.9)]
        assert {effect.outcome for effect in effects.effects(nets)} == {Outcome.ACCURACY}

    def test_default_slopes_come_first(self):
        nets = [net(slope=slope) for slope in (5.0, None, 25.0)]
        found = effects.effects(nets, [Outcome.ACCURACY])
        assert [effect.value for effect in found] == ["default", "5.0", "25.0"]


class TestPareto:
    points = st.lists(
        st.tuples(st.sampled_from([0.5, 0.6, 0.7, 0.8]), st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0])), max_size=12
    )

    @given(points)
    def test_the_front_beats_everything_and_itself_not(self, points):
        nets = [net(accuracy, cycles, seed=i) for i, (accuracy, cycles) in enumerate(points)]
        front = effects.pareto(nets, Outcome.CYCLES)
        better = lambda a, b: a.accuracy >= b.accuracy and a.cycles <= b.cycles  # noqa: E731
        assert all(any(better(best, each) for best in front) for each in nets)
        assert not any(better(a, b) for a, b in itertools.permutations(front, 2))
        assert [each.cycles for each in front] == sorted(each.cycles for each in front)

    def test_only_complete_and_measured_networks(self):
        nets = [net(cycles=None), ended(Status.PRUNED, seed=1), net(0.1, 5.0, seed=2)]
        assert effects.pareto(nets, Outcome.CYCLES) == [nets[2]]


def test_every_sentence_of_a_large_study_stands_for_itself():
    found = findings(everything())
    assert len({(finding.name, finding.dataset) for finding in found}) == len(found) == 2 * (2 + 4 + 3 + 2 * 2)
    for finding in found:
        assert re.fullmatch(r"[A-Z].*[.]", finding.sentence)
        assert (finding.estimate is None) <= (finding.interval is None)
