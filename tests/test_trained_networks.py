"""The trained networks the benchmarks bring along: snnTorch's tutorial net and the ResNet-18, with their data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("spikingjelly")
pytest.importorskip("snntorch")

from benchmarks import train_resnet18, trained

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from snntorch_digits import net as tutorial
from snntorch_digits import train as tutorial_train


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def record():
    return json.loads(tutorial.CHECKPOINT.with_suffix(".json").read_text())


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
