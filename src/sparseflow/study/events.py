"""Spikes made from images and from motion: rate coding, a camera that makes saccades, and shapes that move.

All are ``[T, N, C, H, W]``, binary, float32. Event streams have two channels: 0 is ON (it became brighter), 1 is OFF.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# The dark current of a photodiode: it keeps the logarithm finite and limits the contrast, as in a real sensor.
_DARK = 0.1
_SUBSTEPS = 4  # camera positions per time step: an edge that passes a pixel within a step is still seen
_REACH = 0.2  # of the image's side that a saccade covers; the digits of N-MNIST move by about this much
_CORNERS = ((0.0, 0.0), (0.5, 1.0), (1.0, 0.0), (0.0, 0.0))

DIRECTIONS = ("right", "left", "down", "up", "down right", "up left", "down left", "up right")
"""What the labels of :func:`moving_shapes` mean; with four directions only the first four occur."""
_AXES = ((0, 1), (1, 0), (1, 1), (1, -1))  # (down, right) of directions 0, 2, 4, 6; the odd ones go the other way


def poisson(images: Tensor, steps: int, generator: torch.Generator | None = None) -> Tensor:
    """Rate coding: each value is the probability of a spike per step, clipped to 0..1.

    Args:
        images: ``[N, ...]``.
        steps: T.
        generator: of the draws.

    Returns:
        ``[T, N, ...]``, 0 or 1.

    >>> poisson(torch.tensor([[0.0, 1.0]]), 2)
    tensor([[[0., 1.]],
    <BLANKLINE>
            [[0., 1.]]])
    """
    return (torch.rand(steps, *images.shape, generator=generator) < images).float()


def saccade_events(
    images: Tensor,
    steps: int,
    *,
    threshold: float = 0.4,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """What an event camera sees of still images while it makes three saccades along an isosceles triangle.

    The recipe of N-MNIST (Orchard, Jayawant, Cohen and Thakor, "Converting Static Image Datasets to Spiking
    Neuromorphic Datasets Using Saccades", Frontiers in Neuroscience 9:437, 2015): T steps are split evenly over the
    three sides of the triangle, and the camera rests at the corners. A pixel gives an event whenever the logarithm of
    its brightness has changed by ``threshold`` since its last one (Lichtsteiner, Posch and Delbruck, IEEE J.
    Solid-State Circuits 43(2), 2008); events of a pixel within one step count once.

    Args:
        images: ``[N, 1, H, W]`` in 0..1; around them it is dark.
        steps: T.
        threshold: contrast that makes an event, in units of the natural logarithm.
        noise: probability per pixel, polarity and step of an event without a cause.
        generator: of the noise.

    Returns:
        ``[T, N, 2, H, W]``, 0 or 1; channel 0 is ON, channel 1 OFF.

    Raises:
        ValueError: another shape, or a threshold that is not positive.

    >>> events = saccade_events(torch.eye(8).reshape(1, 1, 8, 8), 6)
    >>> events.shape, bool(events[:, :, 0].any()), bool(events[:, :, 1].any())
    (torch.Size([6, 1, 2, 8, 8]), True, True)
    """
    if images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"saccade_events expects images [N, 1, H, W], got {list(images.shape)}")
    if threshold <= 0:
        raise ValueError(f"threshold must be positive, got {threshold}")
    positions = _saccades(steps * _SUBSTEPS, _REACH * images.shape[-1])
    seen = _log_brightness(images, positions[0])
    events = torch.zeros(steps, len(images), 2, *images.shape[2:], dtype=torch.bool)
    for index, position in enumerate(positions[1:]):
        crossed = ((_log_brightness(images, position) - seen) / threshold).trunc()
        seen = seen + crossed * threshold
        events[index // _SUBSTEPS, :, 0] |= crossed > 0
        events[index // _SUBSTEPS, :, 1] |= crossed < 0
    return _with_noise(events, noise, generator)


def _saccades(moves: int, reach: float) -> Tensor:
    """Camera positions ``[moves + 1, 2]`` in pixels (right, down), around (0, 0)."""
    progress = torch.linspace(0, 3, moves + 1)
    side = progress.floor().clamp(max=2).long()
    eased = (1 - torch.cos(math.pi * (progress - side))) / 2  # it starts and stops at rest
    corners = torch.tensor(_CORNERS) * reach
    path = corners[side] + (corners[side + 1] - corners[side]) * eased[:, None]
    return path - reach / 2


def _log_brightness(images: Tensor, position: Tensor) -> Tensor:
    """``[N, H, W]`` as seen from ``position``, between pixels by bilinear interpolation."""
    height, width = images.shape[2:]
    shift = position * 2 / torch.tensor([width, height])  # grid_sample counts in half images
    view = torch.cat([torch.eye(2), shift[:, None]], dim=1).expand(len(images), 2, 3)
    grid = F.affine_grid(view, list(images.shape), align_corners=False)
    return (F.grid_sample(images, grid, align_corners=False)[:, 0] + _DARK).log()


def moving_shapes(
    count: int,
    steps: int,
    *,
    size: int = 32,
    directions: int = 4,
    speed: int = 1,
    shape_size: int | tuple[int, int] = (5, 9),
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Event streams whose class, a direction, is only in the order of events: summed over time they say nothing.

    A shape (square, disc, diamond or cross, of random size, place and contrast) moves steadily in the direction of the
    class; what leaves at one border comes in at the opposite one. Three things would give the direction away to a
    method that ignores order, and are prevented:

    - *Polarity.* The leading edge of a bright shape gives ON events and that of a dark one OFF events. Shapes are
      bright or dark at random.
    - *The axis.* A moving shape sums up to a streak. So there is one shape for every axis (two axes, with eight
      directions four), and those on the other axes go through the same motion with their time steps in random order:
      they have the same streak, and no direction.
    - *The ends of the streak.* Starts are uniform on the torus, so that the streaks of opposite directions have the
      same distribution.

    Args:
        count: N.
        steps: T, frames.
        size: side of the image in pixels.
        directions: 4 or 8, see :data:`DIRECTIONS`.
        speed: pixels per step (along both axes of the image for diagonals).
        shape_size: diameter in pixels, or the smallest and the largest one.
        noise: probability per pixel, polarity and step of an event without a cause.
        generator: of all that is random.

    Returns:
        Events ``[T, N, 2, H, W]`` (channel 0 ON, 1 OFF) and labels ``[N]`` (int64).

    Raises:
        ValueError: other numbers of directions, a speed at which a direction cannot be told from its opposite, or
            shapes larger than the image.

    >>> events, labels = moving_shapes(3, 10, size=16, generator=torch.Generator().manual_seed(0))
    >>> events.shape, labels.shape
    (torch.Size([10, 3, 2, 16, 16]), torch.Size([3]))
    """
    if directions not in (4, 8):
        raise ValueError(f"directions must be 4 or 8, got {directions}")
    if not 0 < 2 * speed < size:
        raise ValueError(f"speed must be positive and below half the size {size}, got {speed}")
    diameters = (shape_size, shape_size) if isinstance(shape_size, int) else shape_size
    if not 0 < diameters[0] <= diameters[1] < size:
        raise ValueError(f"shape_size must be increasing, positive and below the size {size}, got {shape_size}")
    labels = torch.randint(directions, (count,), generator=generator)
    events = torch.zeros(steps, count, 2, size, size, dtype=torch.bool)
    for axis in range(directions // 2):
        target = labels // 2 == axis
        reverse = torch.where(target, labels % 2, torch.randint(2, (count,), generator=generator))
        velocity = (1 - 2 * reverse)[:, None] * torch.tensor(_AXES[axis]) * speed
        scrambled = torch.rand(steps, count, generator=generator).argsort(0)
        when = torch.where(target, torch.arange(steps)[:, None], scrambled)
        start = torch.randint(size, (count, 2), generator=generator)
        edges = _edges(_shapes(count, size, diameters, generator), velocity)
        bright = torch.rand(count, generator=generator) < 0.5
        edges = torch.where(bright[:, None, None, None], edges, edges.flip(1))
        for step, moment in enumerate(when):
            events[step] |= _rolled(edges, start + moment[:, None] * velocity)
    return _with_noise(events, noise, generator), labels


def _shapes(count: int, size: int, diameters: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """``[N, H, W]``: one shape each, in the middle."""
    radius = torch.randint(diameters[0], diameters[1] + 1, (count, 1, 1), generator=generator) / 2
    kind = torch.randint(4, (count, 1, 1), generator=generator)
    distance = (torch.arange(size) - size // 2).abs()
    down, right = distance[:, None], distance[None, :]
    inside = torch.maximum(down, right) <= radius
    square, disc, diamond = inside, down**2 + right**2 <= radius**2, down + right <= radius
    cross = inside & (torch.minimum(down, right) <= radius / 3)
    return torch.where(kind == 0, square, torch.where(kind == 1, disc, torch.where(kind == 2, diamond, cross)))


def _edges(shapes: Tensor, velocity: Tensor) -> Tensor:
    """Events ``[N, 2, H, W]`` of bright shapes ``[N, H, W]`` that move by ``velocity [N, 2]``."""
    moved = _rolled(shapes[:, None], velocity)[:, 0]
    return torch.stack([moved & ~shapes, shapes & ~moved], dim=1)


def _rolled(images: Tensor, shift: Tensor) -> Tensor:
    """Images ``[N, C, H, W]``, each moved by its own ``shift [N, 2]`` (down, right), around the border."""
    size = images.shape[-1]
    rows, columns = ((torch.arange(size) - shift[:, axis, None]) % size for axis in (0, 1))
    sample = torch.arange(len(images))[:, None, None]
    return images.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _with_noise(events: Tensor, noise: float, generator: torch.Generator | None) -> Tensor:
    if noise:
        events = events | (torch.rand(events.shape, generator=generator) < noise)
    return events.float()
