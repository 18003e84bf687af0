"""scikit-learn's handwritten digits, upsampled to 32x32, with one fixed stratified split."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

IMAGE_SIZE = 32
SPLIT_SEED = 0


class Split(NamedTuple):
    """Images ``[N, 1, 32, 32]`` in 0..1 and labels ``[N]``."""

    images: torch.Tensor
    labels: torch.Tensor


def load_split() -> tuple[Split, Split]:
    """Training and test set: 1437 and 360 of the 1797 images, the same at every call.

    >>> train, test = load_split()
    >>> train.images.shape, test.images.shape
    (torch.Size([1437, 1, 32, 32]), torch.Size([360, 1, 32, 32]))
    """
    bundle = load_digits()
    indices = range(len(bundle.target))
    train, test = train_test_split(indices, test_size=0.2, stratify=bundle.target, random_state=SPLIT_SEED)
    small = torch.from_numpy(bundle.images).float().div(16)[:, None]
    images = F.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(bundle.target).long()
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def encode(images: torch.Tensor, steps: int) -> torch.Tensor:
    """Direct encoding: ``[N, C, H, W]`` repeated over time to ``[T, N, C, H, W]``."""
    return images.repeat(steps, 1, 1, 1, 1)
