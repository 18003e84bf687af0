"""The gate of whole networks: green for ours, red when answers are wrong."""

from __future__ import annotations

import pytest
import torch

import sparseflow
from sparseflow.kernels.cpu import engine

pytest.importorskip("spikingjelly")
pytest.importorskip("snntorch")

from sparseflow.bench.suites import gate, nets, watch
from sparseflow.bench.suites.baselines import in_dtype

from .small import narrow, one_thread, tutorial

__all__ = ["one_thread"]
DigitsResNet = nets.from_checkout("digits.net").DigitsResNet


@pytest.fixture(scope="module")
def case():
    return narrow()


@pytest.fixture(scope="module")
def loop_case():
    return tutorial()


def sparse(net, case):
    return sparseflow.accelerate(net, case.inputs[0], mode="sparse")


def gate_of(net, case):
    return gate.verdict(gate.judged(case, {"level 2": net}), "level 2")


class TestGate:
    def test_accelerated_network_is_green(self, case):
        found = gate_of(sparse(case.build(), case), case)
        assert found["green"], found["why"]
        assert found["checked_layers"] > 0
        assert found["agreement"] == 1.0
        assert set(found["flips"]) == set(watch.neurons(case.build()))

    def test_loop_over_time_is_green(self, loop_case):
        judge = gate.judged(loop_case, {"level 2": sparse(loop_case.build(), loop_case)})
        found = gate.verdict(judge, "level 2")
        assert found["green"], found["why"]
        assert list(judge.densities) == ["lif1", "lif2", "lif3"]
        assert found["outputs"]["lif3"] == 25 * 4 * 10

    @pytest.mark.parametrize("recurrent", [False, True])
    def test_a_single_step_is_green(self, recurrent):
        case = nets.fully_connected(32, recurrent=recurrent, batch=2, steps=1, density=0.1, count=2)
        judge = gate.judged(case, {"level 2": sparse(case.build(), case)})
        found = gate.verdict(judge, "level 2")
        assert found["green"], found["why"]
        assert set(found["outputs"].values()) == {2 * 2 * 32}

    @pytest.mark.skipif(not engine.available(), reason="fused blocks need the native engine")
    def test_spikes_are_those_of_the_fused_blocks(self, case, loop_case):
        for each in (case, loop_case):
            fused_net = sparse(each.build(), each)
            layers = sparseflow.accelerate(each.build(), each.inputs[0], mode="sparse", fuse=False)
            judge = gate.judged(each, {"level 1": layers, "level 2": fused_net})
            watched = {name: gate.verdict(judge, name)["watched"] for name in judge.tallies}
            assert watched == {"dense": "layers", "level 1": "layers", "level 2": "fused blocks"}

    def test_wrong_threshold_is_red(self, case):
        net = sparse(case.build(), case)
        net.stages[0][0].sn1.v_threshold *= 1.02
        found = gate_of(net, case)
        assert not found["green"]
        assert found["flips"]["sn1"] == 0
        assert found["flips"]["stages.0.0.sn1"] > 0
        assert found["first_flip_in_budgets"] > 1
        assert sum(found["distances"].values()) == sum(found["flips"].values())

    def test_wrong_logits_are_red_without_a_flip(self, case):
        net = sparse(case.build(), case)
        with torch.no_grad():
            net.fc.bias += 1e-4
        found = gate_of(net, case)
        assert sum(found["flips"].values()) == 0
        assert [why for why in found["why"] if why.startswith("logits")]

    def test_answers_that_hooks_do_not_see_are_red(self, case):
        """A network that is right only while it is watched: the call without hooks counts as well."""
        net, wrong = case.build(), case.build()
        wrong.sn1.v_threshold *= 1.5

        def forward(x):
            watched = bool(net.sn1._forward_hooks)
            if watched:
                return DigitsResNet.forward(net, x)
            for theirs, ours in zip(watch.neurons(wrong).values(), watch.neurons(net).values(), strict=True):
                theirs.reset()
                ours.v = None
            output = wrong(x)
            for theirs, ours in zip(watch.neurons(wrong).values(), watch.neurons(net).values(), strict=True):
                ours.v = theirs.v
            return output

        sparse(net, case).forward = forward
        found = gate_of(net, case)
        assert sum(found["flips"].values()) == 0
        assert found["left"] == found["images"]
        assert not found["green"]

    def test_layer_outside_its_budget_is_red(self, case, monkeypatch):
        def mismatch(*args, **kwargs):
            raise sparseflow.MismatchError("conv: outside its error budget")

        net = sparse(case.build(), case)
        net.register_forward_pre_hook(mismatch)
        judge = gate.Judge(case)
        with torch.no_grad():
            judge.teacher_forced({"level 2": net}, case.inputs[0])
        assert gate.reasons(judge.tallies["level 2"], judge.tallies["dense"]) == ["conv: outside its error budget"]

    def test_first_flips_are_those_no_other_flip_can_have_caused(self):
        theirs = {"a": torch.zeros(3, 2, 4, dtype=torch.bool), "b": torch.zeros(3, 2, 5, dtype=torch.bool)}
        ours = {name: spikes.clone() for name, spikes in theirs.items()}
        ours["a"][1:, 0, 2] = True  # image 0 flips at steps 1 and 2
        ours["b"][2, :, 0] = True  # both images; in image 0 the layer before has flipped
        (_, first_a, clean_a), (_, first_b, clean_b) = gate.first_flips(ours, theirs)
        assert first_a.nonzero().tolist() == [[1, 0, 2]]
        assert first_b.nonzero().tolist() == [[2, 1, 0]]
        assert (clean_a.tolist(), clean_b.tolist()) == ([False, True], [False, False])

    def test_potentials_decide_the_spikes(self, case):
        net, x = case.build(), case.inputs[0]
        with torch.no_grad():
            seen = watch.see(case, net, x, potentials=True)
        for name, module in watch.neurons(net).items():
            assert torch.equal(seen.potentials[name] >= gate.threshold(module), seen.spikes[name])

    def test_magnitudes_bound_what_the_neurons_get(self, case, loop_case):
        for each in (case, loop_case):
            net, x = in_dtype(each.build(), torch.float64), each.inputs[0].double()
            with torch.no_grad():
                exact = watch.see(each, net, x)
                sums, answer = watch.magnitudes(each, net, x, exact.spikes)
                each.reset(net)
                with watch.watching(net) as (inputs, _):
                    net(x)
            for name, calls in inputs.items():
                assert bool((sums[name] >= watch._over_time(watch.neurons(net)[name], calls).abs() * (1 - 1e-12)).all())
            assert bool((answer >= exact.readout.abs() * (1 - 1e-12)).all())
