"""The data sets of a study by name, as spikes ``[T, N, C, H, W]`` in a training, a validation and a test part."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseflow.errors import SparseflowError

from .events import poisson, saccade_events

_HELD_OUT = 0.2  # for the test, and as much again for validation
_SIDE = 16


class DataError(SparseflowError):
    """A data set cannot be had: it is unknown, its package is not installed, or its files are not there."""


@dataclasses.dataclass(frozen=True)
class Split:
    """``spikes [T, N, C, H, W]``, 0 or 1 as ``uint8``, and ``labels [N]``."""

    spikes: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Split:
        """The first ``count`` samples; all of them for ``None``."""
        return Split(self.spikes[:, :count].contiguous(), self.labels[:count])


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set in spikes; ``description`` says how they were made.

    Networks are trained on ``train``; when to stop is decided on ``validation``; ``test`` is for the figures of the
    trained network and nothing else.
    """

    name: str
    classes: int
    train: Split
    validation: Split
    test: Split
    description: str

    @property
    def steps(self) -> int:
        """T."""
        return self.train.spikes.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one step."""
        channels, height, width = self.train.spikes.shape[2:]
        return channels, height, width

    def save(self, path: Path) -> None:
        """Write it to a file."""
        parts = {part: vars(getattr(self, part)) for part in _PARTS}
        torch.save({"name": self.name, "classes": self.classes, "description": self.description, **parts}, path)

    @classmethod
    def load(cls, path: Path) -> DataSet:
        """Read what :meth:`save` wrote; the spikes stay in the file until they are used."""
        record = torch.load(str(path), weights_only=True, mmap=True)
        return cls(**(record | {part: Split(**record[part]) for part in _PARTS}))


_PARTS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Recording:
    """A data set that was recorded with an event camera, as tonic has it."""

    kind: str  # its class in tonic.datasets, and the name of the folder that tonic saves it in
    classes: int
    steps: int
    pooled: int  # pixels of the sensor per pixel of a frame, each way
    has_test: bool = True


RECORDED = {
    "nmnist": Recording("NMNIST", classes=10, steps=12, pooled=1),
    "dvs128-gesture": Recording("DVSGesture", classes=11, steps=20, pooled=4),
    "cifar10-dvs": Recording("CIFAR10DVS", classes=10, steps=10, pooled=4, has_test=False),
}


def load(name: str, *, folder: Path | None = None, steps: int | None = None, limit: int | None = None) -> DataSet:
    """A data set by name; the same call gives the same spikes.

    - ``digits``: scikit-learn's 1,797 handwritten digits (8 x 8 pixels, enlarged to 16 x 16), rate coded
      (:func:`~sparseflow.study.events.poisson`; brightness is the probability of a spike), T = 10, one channel;
    - ``digits-events``: the same digits through an event camera that makes saccades
      (:func:`~sparseflow.study.events.saccade_events`), as in N-MNIST, T = 12, two channels;
    - ``nmnist``, ``dvs128-gesture``, ``cifar10-dvs``: recorded with an event camera, read with the package tonic.
      Events are summed up in T = 12, 20 and 10 intervals of equal length, of the latter two over 4 x 4 pixels, and a
      value is 1 where there was one.

    Args:
        name: one of :data:`NAMES`.
        folder: where tonic has saved the recordings; nothing is downloaded.
        steps: T; default: as above.
        limit: of the number of samples for training, and for validation and test half as much each.

    Raises:
        DataError: unknown name, tonic or scikit-learn is not installed, or the files are not in ``folder``.

    >>> data = load("digits", steps=4)
    >>> data.train.spikes.shape, len(data.validation), len(data.test), data.classes
    (torch.Size([4, 1077, 1, 16, 16]), 360, 360, 10)
    """
    if name in RECORDED:
        found = _recorded(name, RECORDED[name], folder, steps or RECORDED[name].steps, limit)
    elif name in _MADE:
        found = _MADE[name](steps)
    else:
        raise DataError(f"there is no data set {name!r}; there are {', '.join(NAMES)}")
    held_out = None if limit is None else max(1, limit // 2)
    parts = {"train": found.train.first(limit), "validation": found.validation.first(held_out)}
    return dataclasses.replace(found, **parts, test=found.test.first(held_out))


def _digits(steps: int | None) -> DataSet:
    images, labels = _images(_SIDE)
    spikes = poisson(images, steps or 10, torch.Generator().manual_seed(0))
    what = "scikit-learn's digits enlarged to 16 x 16, rate coded: brightness is the probability of a spike per step"
    return _divided("digits", spikes, labels, what)


def _digit_events(steps: int | None) -> DataSet:
    images, labels = _images(_SIDE - 4)
    events = saccade_events(F.pad(images, [2, 2, 2, 2]), steps or 12)
    what = "scikit-learn's digits enlarged to 12 x 12, seen by a simulated event camera that makes three saccades"
    return _divided("digits-events", events, labels, what)


_MADE: dict[str, Callable[[int | None], DataSet]] = {"digits": _digits, "digits-events": _digit_events}
NAMES = (*_MADE, *RECORDED)


def _images(side: int) -> tuple[Tensor, Tensor]:
    """Digits ``[1797, 1, side, side]`` in 0..1, and what they are."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"the digits come with scikit-learn ({error}): pip install sparseflow[study]") from error
    digits: Any = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    enlarged = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
    return enlarged, torch.from_numpy(digits.target).long()


def _divided(name: str, spikes: Tensor, labels: Tensor, description: str) -> DataSet:
    """Split at random, always in the same way, with all classes equally often in each part."""
    rest, test = _two_parts(torch.arange(len(labels)), labels, _HELD_OUT)
    train, validation = _two_parts(rest, labels, _HELD_OUT / (1 - _HELD_OUT))
    train, validation, test = (
        Split(spikes[:, part].to(torch.uint8), labels[part]) for part in (train, validation, test)
    )
    return DataSet(name, int(labels.max()) + 1, train, validation, test, description)


def _two_parts(indices: Tensor, labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    from sklearn.model_selection import train_test_split

    large, small = train_test_split(indices.numpy(), test_size=share, random_state=0, stratify=labels[indices].numpy())
    return torch.from_numpy(large), torch.from_numpy(small)


def _recorded(name: str, recording: Recording, folder: Path | None, steps: int, limit: int | None) -> DataSet:
    tonic = _tonic(name)
    if folder is None or not (folder / recording.kind).is_dir():
        missing = f"there is no folder {folder / recording.kind}" if folder else "its files are needed"
        raise DataError(f"{name}: {missing}. Name the folder that tonic saved {recording.kind} in with --data DIR.")
    known = getattr(tonic.datasets, recording.kind)
    # tonic downloads what it does not find. Its folders are named after the class.
    kind = type(recording.kind, (known,), {"download": _no_download})
    options = {"transform": tonic.transforms.ToFrame(sensor_size=known.sensor_size, n_time_bins=steps)}
    if recording.has_test:
        rest, test = (kind(str(folder), train=train, **options) for train in (True, False))
        rest_indices, test_indices = torch.arange(len(rest)), torch.arange(len(test))
    else:
        rest = test = kind(str(folder), **options)
        rest_indices, test_indices = _two_parts(torch.arange(len(rest)), torch.as_tensor(rest.targets), _HELD_OUT)
    train, validation = _two_parts(rest_indices, torch.as_tensor(rest.targets), _HELD_OUT)
    half = None if limit is None else max(1, limit // 2)
    chosen = ((rest, train[:limit]), (rest, validation[:half]), (test, _shuffled(test_indices)[:half]))
    parts = [_frames(source, indices, recording.pooled) for source, indices in chosen]
    how = f"{recording.kind} as tonic has it: events in {steps} intervals of equal length"
    pooled = f", over {recording.pooled} x {recording.pooled} pixels" if recording.pooled > 1 else ""
    return DataSet(name, recording.classes, *parts, description=how + pooled)


def _tonic(name: str) -> Any:
    try:
        for part in ("datasets", "transforms"):
            importlib.import_module(f"tonic.{part}")
        return importlib.import_module("tonic")
    except ImportError as error:
        raise DataError(f"{name} is read with the package tonic ({error}): pip install tonic") from error


def _no_download(recordings: Any) -> None:
    raise DataError(
        f"{recordings.location_on_system} does not hold all files of {type(recordings).__name__}, and nothing is "
        "downloaded here. Let tonic download it first."
    )


def _shuffled(indices: Tensor) -> Tensor:
    """The same random order at every call: recordings are sorted by class."""
    return indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]


def _frames(recordings: Any, indices: Tensor, pooled: int) -> Split:
    frames, labels = [], []
    for index in indices.tolist():
        frame, label = recordings[index]
        frames.append((F.max_pool2d(torch.as_tensor(frame).float(), pooled) > 0).to(torch.uint8))
        labels.append(int(label))
    return Split(torch.stack(frames, dim=1), torch.tensor(labels))
