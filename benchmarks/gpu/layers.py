"""The layers that are measured: ResNet-18 and ResNet-50, the predecessor's two, and large linear layers."""

from __future__ import annotations

import dataclasses
import math

from sparseflow.kernels.base import Call, ConvCall, LinearCall

STEPS = 4


@dataclasses.dataclass(frozen=True)
class Pruned:
    """How a weight is pruned: the share of its blocks of 16 x 16 channels that is left, at random places.

    ``together``: the same input channels and taps for all outputs, so that wide blocks are absent as often.
    """

    share: float
    together: bool = False

    @property
    def name(self) -> str:
        """For the name of a layer.

        >>> Pruned(0.25).name
        '25% of 16x16 blocks'
        """
        return f"{self.share:.0%} of 16x16 blocks{' for all outputs' if self.together else ''}"


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """A layer as a network has it, for one image and time step; ``size`` is that of the input, ``()`` if linear."""

    name: str
    c_in: int
    c_out: int
    size: tuple[int, ...] = ()
    kernel: int = 1
    stride: int = 1
    pruned: Pruned | None = None

    @property
    def call(self) -> Call:
        """The call's arguments, with the padding that keeps the size at stride 1."""
        if not self.size:
            return LinearCall()
        dims, pad = len(self.size), self.kernel // 2
        return ConvCall((self.stride,) * dims, ((pad, pad),) * dims, (1,) * dims, 1)

    @property
    def w_shape(self) -> tuple[int, ...]:
        """``[C_out, C_in, *kernel]``."""
        return (self.c_out, self.c_in, *(self.kernel for _ in self.size))

    def x_shape(self, steps_times_batch: int) -> tuple[int, ...]:
        """``[T * N, C_in, *size]``."""
        return (steps_times_batch, self.c_in, *self.size)

    @property
    def out_pixels(self) -> int:
        """Output positions of one image."""
        return math.prod((size - 1) // self.stride + 1 for size in self.size)

    @property
    def flops(self) -> int:
        """Operations of the dense layer for one image and time step."""
        return 2 * self.out_pixels * self.c_out * self.c_in * self.kernel ** len(self.size)


def pruned(layer: LayerShape, share: float, *, together: bool = False) -> LayerShape:
    """``layer`` with a pruned weight.

    >>> pruned(LayerShape("linear 64->32", 64, 32), 0.5).name
    'linear 64->32, 50% of 16x16 blocks'
    """
    how = Pruned(share, together)
    return dataclasses.replace(layer, name=f"{layer.name}, {how.name}", pruned=how)


def resnet18(side: int) -> tuple[LayerShape, ...]:
    """The distinct spike-fed convolutions of ResNet-18 for images of ``side`` pixels.

    >>> [layer.name for layer in resnet18(224)][:2]
    ['3x3 64@56', '3x3 64->128@56 stride 2']
    """
    layers, first = [], side // 4
    for stage, width in enumerate((64, 128, 256, 512)):
        size = first >> stage
        if stage:
            layers += _entry(width // 2, width, 2 * size, kernel=3)
        layers.append(_conv(width, width, size, 3))
    return tuple(layers)


def resnet50(side: int) -> tuple[LayerShape, ...]:
    """The distinct spike-fed convolutions of ResNet-50 for images of ``side`` pixels (stride in the 3x3)."""
    layers, first, before = [], side // 4, 64
    for stage, width in enumerate((64, 128, 256, 512)):
        size = first >> stage
        if stage:
            layers += [_conv(before, width, 2 * size, 1), _conv(width, width, 2 * size, 3, stride=2)]
            layers.append(_conv(before, 4 * width, 2 * size, 1, stride=2))
        else:
            layers.append(_conv(before, width, size, 1))
        layers += [_conv(width, width, size, 3), _conv(width, 4 * width, size, 1), _conv(4 * width, width, size, 1)]
        before = 4 * width
    return tuple(layers)


def _entry(before: int, width: int, size: int, kernel: int) -> list[LayerShape]:
    return [_conv(before, width, size, kernel, stride=2), _conv(before, width, size, 1, stride=2)]


def _conv(c_in: int, c_out: int, side: int, kernel: int, stride: int = 1) -> LayerShape:
    channels = f"{c_in}" if c_in == c_out else f"{c_in}->{c_out}"
    name = f"{kernel}x{kernel} {channels}@{side}" + (f" stride {stride}" if stride > 1 else "")
    return LayerShape(name, c_in, c_out, (side, side), kernel, stride)


# spiking_resnet18 of the SpikingJelly zoo on 224 pixels; the densities are 1 - the sparsity of the published headline.
HEADLINE = (
    (dataclasses.replace(_conv(64, 64, 56, 3), name="layer1.0.conv2: 3x3 64@56"), 0.015),
    (dataclasses.replace(_conv(128, 128, 28, 3), name="layer2.1.conv2: 3x3 128@28"), 0.0),
)
LINEAR = (LayerShape("linear 25088->4096", 25088, 4096), LayerShape("linear 4096->4096", 4096, 4096))
EFFICIENCY = (_conv(64, 64, 56, 3), _conv(128, 128, 28, 3), _conv(256, 256, 14, 3), _conv(64, 256, 56, 1))
PRUNED = tuple(
    pruned(layer, share, together=together)
    for share, together in ((0.1, False), (0.25, False), (0.25, True))
    for layer in EFFICIENCY[:3]
)
PRUNED_LINEAR = tuple(pruned(LINEAR[1], share) for share in (0.1, 0.25))
