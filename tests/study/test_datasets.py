"""Data sets: parts, repeatability, and recordings through a stand-in for tonic."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from sparseflow.study import datasets
from sparseflow.study.datasets import DataError, DataSet, load

SENSOR = {"NMNIST": (34, 34, 2), "DVSGesture": (128, 128, 2), "CIFAR10DVS": (128, 128, 2)}
COUNT = 40


def recordings(kind, has_test):
    """A class like tonic's: in order of the class, downloads what is not complete, a transform makes the frames."""

    class Recordings:
        sensor_size = SENSOR[kind]

        def __init__(self, save_to, transform, **train):
            assert set(train) == ({"train"} if has_test else set())
            self.location_on_system = f"{save_to}/{type(self).__name__}"
            self.transform, self.offset = transform, 100 if train.get("train") is False else 0
            self.targets = [index * 4 // COUNT for index in range(COUNT)]
            if not self.complete():
                self.download()

        def complete(self):
            with open(f"{self.location_on_system}/complete") as file:
                return file.read() == "yes"

        def download(self):
            raise AssertionError("nothing is downloaded")

        def __len__(self):
            return COUNT

        def __getitem__(self, index):
            return self.transform(index + self.offset), self.targets[index]

    Recordings.__name__ = kind
    return Recordings


class ToFrame:
    """Of recording number i: at step t, i + 1 events in one pixel of channel i % 2."""

    def __init__(self, sensor_size, n_time_bins):
        self.width, self.height, self.channels = sensor_size
        self.steps = n_time_bins

    def __call__(self, index):
        frames = np.zeros((self.steps, self.channels, self.height, self.width), dtype=np.int16)
        for step in range(self.steps):
            frames[step, index % 2, index % self.height, step] = index + 1
        return frames


@pytest.fixture
def tonic(monkeypatch, tmp_path):
    fake, sets, transforms = (types.ModuleType(name) for name in ("tonic", "tonic.datasets", "tonic.transforms"))
    for kind in SENSOR:
        setattr(sets, kind, recordings(kind, kind != "CIFAR10DVS"))
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "complete").write_text("yes")
    transforms.ToFrame = ToFrame
    fake.datasets, fake.transforms = sets, transforms
    for module in (fake, sets, transforms):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return tmp_path


class TestDigits:
    @pytest.mark.parametrize(("name", "channels", "steps"), [("digits", 1, 10), ("digits-events", 2, 12)])
    def test_parts_are_spikes_of_all_classes(self, name, channels, steps):
        data = load(name)
        assert (data.steps, data.shape, data.classes) == (steps, (channels, 16, 16), 10)
        assert [len(part) for part in (data.train, data.validation, data.test)] == [1077, 360, 360]
        for part in (data.train, data.validation, data.test):
            assert part.spikes.dtype == torch.uint8
            assert part.spikes.shape[:2] == (steps, len(part))
            assert part.spikes.max() == 1
            assert 0.01 < part.spikes.float().mean() < 0.5
            assert part.labels.unique().tolist() == list(range(10))

    def test_parts_share_no_digit(self):
        data = load("digits-events")
        seen = [
            sample.numpy().tobytes()
            for part in (data.train, data.validation, data.test)
            for sample in part.spikes.unbind(1)
        ]
        assert len(set(seen)) > 0.99 * len(seen)

    def test_same_at_every_call(self):
        first, second = load("digits", steps=3), load("digits", steps=3)
        assert torch.equal(first.train.spikes, second.train.spikes)
        assert torch.equal(first.test.labels, second.test.labels)

    def test_steps_and_number_of_samples(self):
        data = load("digits", steps=3, limit=100)
        assert data.steps == 3
        assert [len(part) for part in (data.train, data.validation, data.test)] == [100, 50, 50]

    def test_file_reads_back(self, tmp_path):
        data = load("digits", steps=2, limit=20)
        data.save(tmp_path / "digits.pt")
        found = DataSet.load(tmp_path / "digits.pt")
        assert (found.name, found.classes, found.description) == (data.name, data.classes, data.description)
        for part in ("train", "validation", "test"):
            assert torch.equal(getattr(found, part).spikes, getattr(data, part).spikes)
            assert torch.equal(getattr(found, part).labels, getattr(data, part).labels)
        assert (tmp_path / "digits.pt").stat().st_size < 40_000, "only the samples asked for are in the file"

    def test_unknown_name(self):
        with pytest.raises(DataError, match="no data set 'mnist'; there are digits, digits-events, nmnist"):
            load("mnist")


class TestRecordings:
    @pytest.mark.parametrize(
        ("name", "shape", "steps", "classes"),
        [
            ("nmnist", (2, 34, 34), 12, 10),
            ("dvs128-gesture", (2, 32, 32), 20, 11),
            ("cifar10-dvs", (2, 32, 32), 10, 10),
        ],
    )
    def test_frames_are_binary_and_pooled(self, tonic, name, shape, steps, classes):
        data = load(name, folder=tonic)
        assert (data.shape, data.steps, data.classes) == (shape, steps, classes)
        for part in (data.train, data.validation, data.test):
            assert part.spikes.max() == 1
            assert (part.spikes.sum((0, 2, 3, 4)) == steps).all(), "one pixel a step"

    def test_test_part_is_the_recorded_one(self, tonic):
        data = load("nmnist", folder=tonic)
        assert [len(part) for part in (data.train, data.validation, data.test)] == [32, 8, 40]
        rows = data.test.spikes[0].sum((1, 3)).argmax(1)
        assert sorted(rows.tolist()) == sorted((index + 100) % 34 for index in range(COUNT))

    def test_labels_belong_to_the_frames(self, tonic):
        data = load("dvs128-gesture", folder=tonic)
        rows = data.train.spikes[0].sum((1, 3)).argmax(1)
        expected = {(index % 128 // 4, index * 4 // COUNT) for index in range(COUNT)}
        assert set(zip(rows.tolist(), data.train.labels.tolist(), strict=True)) <= expected

    def test_without_a_test_part_some_are_held_out(self, tonic):
        data = load("cifar10-dvs", folder=tonic)
        assert [len(part) for part in (data.train, data.validation, data.test)] == [25, 7, 8]

    def test_number_of_samples_is_what_is_read(self, tonic):
        data = load("nmnist", folder=tonic, limit=6)
        assert [len(part) for part in (data.train, data.validation, data.test)] == [6, 3, 3]
        assert len(data.test.labels.unique()) > 1, "recordings are in order of the class"

    def test_package_that_is_not_there_is_named(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "tonic", None)
        with pytest.raises(DataError, match=r"package tonic .*pip install tonic"):
            load("nmnist", folder=tmp_path)

    def test_folder_that_is_not_there_is_named(self, tonic, tmp_path):
        with pytest.raises(DataError, match=r"no folder .*elsewhere.NMNIST.*--data DIR"):
            load("nmnist", folder=tmp_path / "elsewhere")
        with pytest.raises(DataError, match="--data DIR"):
            load("cifar10-dvs")

    def test_nothing_is_downloaded(self, tonic):
        (tonic / "DVSGesture" / "complete").write_text("no")
        with pytest.raises(DataError, match="does not hold all files of DVSGesture"):
            load("dvs128-gesture", folder=tonic)


def test_every_name_can_be_asked_for():
    assert set(datasets.NAMES) == {"digits", "digits-events", "nmnist", "dvs128-gesture", "cifar10-dvs"}
