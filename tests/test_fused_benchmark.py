"""The benchmark of fused networks: its gate turns red when answers are wrong, its rows are complete; no times asserted.

Also the networks it brings along: snnTorch's tutorial net with its checkpoint, and the data of the trained ResNet-18.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sparseflow
from sparseflow.kernels.cpu import engine

pytest.importorskip("spikingjelly")
pytest.importorskip("snntorch")

from benchmarks import fused, gate, growth, train_resnet18, trained, watch
from benchmarks.baselines import Case, in_dtype
from benchmarks.stand_ins import fire_like_trained

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from digits.data import encode, load_split
from digits.net import DigitsResNet
from snntorch_digits import net as tutorial
from snntorch_digits import train as tutorial_train

NARROW = (4, 8, 8, 8)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def record():
    return json.loads(tutorial.CHECKPOINT.with_suffix(".json").read_text())


def narrow_net(x):
    torch.manual_seed(0)
    return fire_like_trained(DigitsResNet(NARROW), x, density=0.1)


@pytest.fixture(scope="module")
def case():
    images = load_split()[1].images[:4]
    inputs = tuple(encode(part, 3) for part in nn.functional.avg_pool2d(images, 2).split(2))
    return Case("narrow", "made for this test", lambda: narrow_net(inputs[0]), inputs)


@pytest.fixture(scope="module")
def loop_case():
    images = tutorial.load_split()[1].images[:4]
    reset, readout = fused._rests_itself, fused._spike_rate
    return Case("loop", "trained", tutorial.load_checkpoint, images.split(2), reset=reset, readout=readout)


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
                assert bool((sums[name] >= watch._over_time(calls).abs() * (1 - 1e-12)).all())
            assert bool((answer >= exact.readout.abs() * (1 - 1e-12)).all())


class TestRows:
    def test_row_has_every_field(self, case):
        row = fused.measure(case, repeats=2, with_compile=False)
        assert row["green"]
        assert set(row["ms"]) == {"eager", "eager channels_last", "level 1", "level 2"}
        assert all(low <= middle <= high for low, middle, high in row["ms"].values())
        assert set(row["over"]) == {"eager", "eager channels_last", "level 1", "best dense fp32"}
        assert set(row["gate"]) == {"dense", "level 1", "level 2"}
        assert set(row["reports"]) == set(fused.LEVELS)
        assert len(row["densities"]) == 17
        assert 0 < row["mean_density"] < 0.3
        assert row["input"] == [3, 2, 1, 16, 16]
        assert json.loads(json.dumps(row))["case"] == "narrow"
        assert "level 2" in fused.line(row)

    def test_no_time_of_a_red_case(self, case, monkeypatch):
        monkeypatch.setattr(fused, "timed", None)
        wrong = sparse(case.build(), case)
        wrong.sn1.v_threshold *= 1.1
        row = fused.measure(case, repeats=2, with_compile=True, nets={"level 2": wrong})
        assert (row["green"], row["ms"], row["over"]) == (False, {}, {})
        assert "RED" in fused.line(row)

    def test_cases_are_named_and_can_be_made_by_name(self):
        names = [name for name, _ in fused.cases()]
        assert len(set(names)) == len(names) == 14
        made = dict(fused.cases())
        for name in ("digits resnet18 @32, batch 8", "snnTorch convnet @28, T = 25, batch 8"):
            case = made[name]()
            assert case.name == name
            assert sum(x.shape[-4] for x in case.inputs) >= 16

    def test_stand_in_where_there_is_no_checkpoint(self, monkeypatch, tmp_path):
        monkeypatch.setattr(trained, "CHECKPOINT", tmp_path / "none.pt")
        case = fused.resnet18_case(1, 64)
        assert case.activity.startswith("random weights")
        assert case.inputs[0].shape == (4, 1, 3, 64, 64)

    def test_accelerated_passes_fuse_where_it_exists(self, monkeypatch):
        monkeypatch.setattr(sparseflow, "accelerate", lambda net, x, *, fuse=True: fuse)
        assert [fused.accelerated(None, None, fuse) for fuse in fused.LEVELS.values()] == [False, True]
        monkeypatch.setattr(sparseflow, "accelerate", lambda net, x: "as it was")
        assert fused.accelerated(None, None, True) == "as it was"

    def test_spikes_keep_the_dtype_of_a_bf16_network(self, loop_case):
        net = in_dtype(loop_case.build(), torch.bfloat16)
        with torch.no_grad():
            assert net(loop_case.inputs[0].bfloat16())[0].dtype == torch.bfloat16

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the resident set's peak is Linux's")
    def test_memory_of_a_variant(self, case):
        found = fused.memory_of(case, "eager")
        assert set(found) == {"resident", "call"}
        assert found["call"] < 100

    def test_growth_changes_one_size(self):
        assert growth.case("T", 2).inputs[0].shape == (2, 1, 1, 32, 32)
        assert growth.case("resolution", 16).inputs[0].shape == (4, 1, 1, 16, 16)
        assert growth.case("width", 8).build().fc.in_features == 64
        assert len(list(growth.points())) == sum(len(values) for values in growth.AXES.values())

    def test_growth_is_drawn_without_red_points(self, tmp_path):
        ms = {"eager": (1, 2, 3), "eager channels_last": (1, 2, 3), "level 2": (0.5, 1, 2)}
        rows = [{"axis": "T", "value": v, "ms": ms, "over": {"best dense fp32": 2.0}} for v in (1, 4)]
        growth.plot([*rows, {"axis": "batch", "value": 1, "ms": {}, "over": {}}], tmp_path / "images" / "growth.png")
        assert (tmp_path / "images" / "growth.png").stat().st_size > 0


class TestTutorialNet:
    def test_checkpoint_is_small_and_good(self, record):
        assert tutorial.CHECKPOINT.stat().st_size <= 150_000
        assert record["test_accuracy"] > 0.95
        assert set(record["firing_rate"]) == {"lif1", "lif2", "lif3"}

    def test_accuracy_and_densities_are_those_of_the_record(self, record):
        test = tutorial.load_split()[1]
        part = type(test)(test.images[:60], test.labels[:60])
        net = tutorial.load_checkpoint()
        assert tutorial_train.accuracy(net, part) == pytest.approx(record["test_accuracy"], abs=0.06)
        found = tutorial_train.densities(net, part.images)
        for kind in ("firing_rate", "input_density"):
            assert found[kind] == pytest.approx(record[kind], rel=0.1)

    def test_training_lowers_the_loss(self):
        train = tutorial.load_split()[0]
        part = type(train)(train.images[:32], train.labels[:32])
        net = tutorial.load_checkpoint()
        nn.init.zeros_(net.fc1.weight)
        optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        losses = [tutorial_train.train_epoch(net, part, optimizer, schedule, 32) for _ in range(4)]
        assert losses[-1] < losses[0]


class TestTrainedResNet:
    def test_parts_of_the_photographs_share_no_pixel(self):
        for train, test in zip(trained.photographs(True), trained.photographs(False), strict=True):
            assert train.shape[:2] == test.shape[:2]
            assert train.shape[2] > test.shape[2] >= 160
            assert 0 <= test.min() < test.max() <= 1

    def test_frames_are_the_same_at_every_call(self):
        first, second = (trained.held_out(64, 3) for _ in range(2))
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.labels, second.labels)
        assert trained.held_out(160, 2).images.shape == (2, 3, 160, 160)

    def test_missing_checkpoint_says_how_to_make_it(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"python -m benchmarks\.train_resnet18"):
            trained.load(tmp_path / "resnet18.pt")

    def test_a_step_of_training_changes_the_weights(self):
        frames = trained.digits_on_photographs(2, 64, train=True, generator=torch.Generator().manual_seed(0))
        net = trained.build()
        before = net.fc.weight.detach().clone()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        assert train_resnet18.train_step(net, optimizer, *frames) > 0
        assert not torch.equal(net.fc.weight, before)
