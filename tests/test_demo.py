"""The shipped network, its record, its training script, and the demo from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

pytest.importorskip("spikingjelly")

import demo
from digits import data, evaluate, net, train
from spikingjelly.activation_based import functional, neuron

NARROW = (4, 8, 8, 8)


@pytest.fixture(autouse=True)
def threads_kept():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def split():
    return data.load_split()


@pytest.fixture(scope="module")
def record():
    return json.loads(net.CHECKPOINT.with_suffix(".json").read_text())


class TestData:
    def test_split_is_stratified_disjoint_and_fixed(self, split):
        training, test = split
        assert len(training.labels) == 1437
        assert len(test.labels) == 360
        assert test.labels.bincount().tolist() == pytest.approx([36] * 10, abs=1)
        seen = {image.numpy().tobytes() for image in training.images}
        assert not any(image.numpy().tobytes() in seen for image in test.images)
        assert torch.equal(data.load_split()[1].images, test.images)

    def test_images_are_in_the_unit_range(self, split):
        assert split[0].images.min() == 0
        assert split[0].images.max() == 1

    def test_direct_encoding_repeats_the_image(self):
        x = torch.rand(2, 1, 3, 3)
        assert torch.equal(data.encode(x, 3), torch.stack([x, x, x]))


class TestCheckpoint:
    def test_fits_the_repository(self):
        assert net.CHECKPOINT.stat().st_size <= 6_000_000

    def test_stored_weights_reach_the_recorded_accuracy_and_densities(self, split, record):
        trained = net.load_checkpoint()
        some = data.Split(*(part[:120] for part in split[1]))
        mistakes = round(360 * (1 - record["test_accuracy"]))
        assert mistakes <= 0.03 * 360
        # One more than recorded: another processor's rounding may flip a spike.
        assert 120 * (1 - train.accuracy(trained, some)) <= mistakes + 1
        densities = train.densities(trained, some.images[:40])
        for kind in ("firing_rate", "input_density"):
            assert densities[kind] == pytest.approx(record[kind], rel=0.2)

    def test_every_neuron_layer_fires_sparsely(self, record):
        assert len(record["firing_rate"]) == 17
        assert all(0.03 <= rate <= 0.15 for rate in record["firing_rate"].values())

    def test_weights_are_fp32_after_loading(self):
        assert {p.dtype for p in net.load_checkpoint().parameters()} == {torch.float32}

    def test_round_trip_rounds_kernels_to_fp16_and_keeps_the_rest(self, tmp_path):
        small = net.DigitsResNet(NARROW)
        nn.init.normal_(small.bn1.running_mean)
        net.save_checkpoint(small, tmp_path / "net.pt")
        stored = torch.load(tmp_path / "net.pt", weights_only=True)
        assert stored["conv1.weight"].dtype == torch.float16
        assert torch.equal(stored["bn1.running_mean"], small.bn1.running_mean)
        assert stored["bn1.num_batches_tracked"].dtype == torch.int64


class TestTraining:
    def test_shift_moves_by_at_most_two_pixels_and_fills_with_zeros(self):
        image = torch.zeros(1, 1, 9, 9)
        image[..., 4, 4] = 1
        offsets = set()
        for _ in range(200):
            moved = train.shifted(image)
            assert moved.shape == image.shape
            assert moved.sum() == 1
            offsets.add(tuple((moved[0, 0].nonzero()[0] - 4).tolist()))
        assert offsets == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}

    def test_batches_cover_the_set_once_and_drop_the_rest(self):
        split = data.Split(torch.rand(10, 1, 8, 8), torch.arange(10))
        labels = [labels for _, labels in train.batches(split, 4)]
        assert [len(batch) for batch in labels] == [4, 4]
        assert len(torch.cat(labels).unique()) == 8

    def test_a_narrow_network_learns_to_tell_two_digits_apart(self, split):
        chosen = (split[0].labels < 2).nonzero()[:48, 0]
        few = data.Split(split[0].images[chosen], split[0].labels[chosen])
        small = net.DigitsResNet(NARROW)
        optimizer = torch.optim.AdamW(small.parameters(), lr=3e-2)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        losses = [train.train_epoch(small, few, optimizer, schedule, 24) for _ in range(14)]
        # Knowing that only two labels occur, and nothing of the images, is worth 0.92 at this label smoothing.
        assert losses[-1] < 0.85


class TestAnswers:
    def test_counts(self):
        answers = evaluate.Answers()
        dense = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        sparse = torch.tensor([[1.0, 0.0], [0.0, 1.5], [0.0, 1.0]])
        answers.add(dense, sparse, torch.tensor([0, 0, 1]))
        answers.add_spikes([torch.tensor([True, False, True])], [torch.tensor([True, True, False])])
        assert (answers.images, answers.correct_dense, answers.correct_sparse, answers.agreeing) == (3, 1, 2, 2)
        assert (answers.flips, answers.outputs, answers.spikes) == (2, 3, 2)
        assert answers.max_logit_error == 1.0

    def test_recorded_spikes_are_those_of_every_neuron_and_the_hooks_go(self):
        small = net.DigitsResNet(NARROW).eval()
        with evaluate.recorded_spikes(small) as spikes, torch.no_grad():
            small(torch.rand(2, 1, 1, 32, 32))
        neurons = [m for m in small.modules() if isinstance(m, neuron.BaseNode)]
        assert len(spikes) == len(neurons) == 17
        assert all(s.dtype == torch.bool and s.shape[:2] == (2, 1) for s in spikes)
        assert not any(m._forward_hooks for m in neurons)

    def test_state_does_not_leak_between_predictions(self, split):
        trained = net.load_checkpoint()
        first = evaluate.predict(trained, split[1].images[:2])
        assert torch.equal(evaluate.predict(trained, split[1].images[:2]), first)
        functional.reset_net(trained)


def test_demo_end_to_end(tmp_path, capsys):
    options = ["--images", "8", "--batch-sizes", "1", "4", "--calls", "2", "--out", str(tmp_path)]
    assert demo.main(options) == 0
    printed = capsys.readouterr().out
    for part in ("accuracy, sparseflow", "spike flips", "stages.3.1.conv2", "speedup", "neuron", "between modules"):
        assert part in printed
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["answers"]["images"] == 8
    assert found["answers"]["agreeing"] == 8
    assert [m["batch_size"] for m in found["measurements"]] == [1, 4]
    for m in found["measurements"]:
        assert set(m["ms"]) == {"dense", "sparseflow", "dense, channels_last"}
        fed = [layer for layer in m["report"]["layers"] if layer["provenance"] == "binary"]
        assert len(fed) == 19
        assert all(sum(layer["calls"].values()) > 0 for layer in fed)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report-batch4.html").exists()
