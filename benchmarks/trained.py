"""A spiking ResNet-18 trained on what is installed anyway: scikit-learn's digits drawn on crops of bundled photographs.

``python -m benchmarks.train_resnet18`` makes the checkpoint, ``out/resnet18.pt``, which is too large for git; without
it the suites use a stand-in (:mod:`sparseflow.bench.suites.nets`). A frame has a digit in every 64 x 64 pixels, all of
one class, so that a net trained at 64 pixels sees the same kind of image at any resolution.
"""

from __future__ import annotations

import functools
import pathlib
import sys

import matplotlib
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model import spiking_resnet
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

from digits.data import Split, encode, load_split

CHECKPOINT = pathlib.Path(__file__).parents[1] / "out" / "resnet18.pt"
TIME_STEPS = 4
_CELL, _SMALLEST, _LARGEST = 64, 40, 60  # pixels: a frame's share for one digit, and the digits' sizes
_DIMMED = 0.5  # brightness of the photographs behind the digits
_HELD_OUT = 3  # the right third of every photograph is for testing
_MEAN, _STD = 0.29, 0.25  # of the frames, over all channels


@functools.cache
def photographs(train: bool) -> tuple[Tensor, ...]:
    """Parts ``[3, H, W]`` in 0..1 of three photographs; the parts for training and testing share no pixel."""
    hopper = pathlib.Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    images = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    images.append(pil_to_tensor(Image.open(hopper)))
    cuts = [image.shape[-1] - image.shape[-1] // _HELD_OUT for image in images]
    parts = [image[..., :cut] if train else image[..., cut:] for image, cut in zip(images, cuts, strict=True)]
    return tuple(part / 255 for part in parts)


def digits_on_photographs(count: int, side: int, *, train: bool, generator: torch.Generator) -> Split:
    """``count`` normalised frames ``[N, 3, side, side]`` and their digits ``[N]``; digits and crops are of one split.

    >>> frames, labels = digits_on_photographs(2, 64, train=False, generator=torch.Generator().manual_seed(0))
    >>> frames.shape, labels.shape
    (torch.Size([2, 3, 64, 64]), torch.Size([2]))
    """
    digits = _digits()[0 if train else 1]
    chosen = torch.randint(len(digits.labels), (count,), generator=generator)
    frames = [_frame(digits.images[index], photographs(train), side, generator) for index in chosen]
    return Split((torch.stack(frames) - _MEAN) / _STD, digits.labels[chosen])


_digits = functools.cache(load_split)


def _frame(digit: Tensor, photos: tuple[Tensor, ...], side: int, generator: torch.Generator) -> Tensor:
    frame = _DIMMED * _crop(photos[_draw(0, len(photos), generator)], side, generator)
    cells = max(1, side // _CELL)
    cell = side // cells
    for top in range(0, cells * cell, cell):
        for left in range(0, cells * cell, cell):
            _paint(frame[:, top : top + cell, left : left + cell], digit, generator)
    return frame


def _crop(image: Tensor, side: int, generator: torch.Generator) -> Tensor:
    top, left = (_draw(0, size - side + 1, generator) for size in image.shape[-2:])
    return image[:, top : top + side, left : left + side]


def _paint(cell: Tensor, digit: Tensor, generator: torch.Generator) -> None:
    """Draw ``digit`` into ``cell [3, h, w]`` in a light colour, at a random size and place."""
    size = _draw(_SMALLEST, _LARGEST + 1, generator)
    ink = nn.functional.interpolate(digit[None], size=(size, size), mode="bilinear")[0]
    colour = 1 - torch.rand(3, 1, 1, generator=generator) / 4
    _crop(cell, size, generator).lerp_(colour, ink.expand(3, -1, -1))


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high, (), generator=generator))


def build() -> nn.Module:
    """SpikingJelly's spiking_resnet18 for the ten digits, multi-step; LIF with tau = 2, hard reset and ATan."""
    net = spiking_resnet.spiking_resnet18(
        spiking_neuron=neuron.LIFNode, tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True, num_classes=10
    )
    functional.set_step_mode(net, "m")
    return net


def load(path: pathlib.Path = CHECKPOINT) -> nn.Module:
    """The trained network in eval mode. Raises ``FileNotFoundError``, and says what to do, without a checkpoint."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: python -m benchmarks.train_resnet18 (15 minutes on two cores)")
    net = build()
    net.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return net.eval()


def held_out(side: int, count: int) -> Split:
    """``count`` test frames at ``side`` pixels, the same at every call."""
    return digits_on_photographs(count, side, train=False, generator=torch.Generator().manual_seed(side))


def resnet18(side: int, batch: int = 1, count: int = 4) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The trained network and ``count`` inputs ``[T, batch, 3, side, side]`` it was not trained on.

    Raises ``FileNotFoundError`` without a checkpoint, see :func:`load`.
    """
    net, frames = load(), held_out(side, batch * count).images
    return net, tuple(encode(part, TIME_STEPS) for part in frames.split(batch))
