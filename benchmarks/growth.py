"""How the time of a call grows with T, batch, width and resolution: the digits net family, dense against level 2.

``python -m benchmarks.fused --growth`` runs it. Along T, batch and resolution the network is the trained one; those of
other widths are stand-ins (:mod:`benchmarks.stand_ins`). Every point passes the gate of :mod:`benchmarks.gate` first.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import nn

from .baselines import Case
from .fused import accelerated, line, measure, save
from .stand_ins import activity, fire_like_trained

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

from digits.data import IMAGE_SIZE, encode, load_split
from digits.net import TIME_STEPS, DigitsResNet, load_checkpoint

IMAGE = pathlib.Path("docs/images/fused_growth.png")
AXES = {
    "T": (1, 2, 4, 8, 16, 32, 64),
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "width": (8, 16, 32, 64, 128),
    "resolution": (16, 32, 64, 128),
}
_UNITS = {
    "T": "time steps",
    "batch": "images a call",
    "width": "channels of the first stage",
    "resolution": "pixels a side",
}
_LINES = {"eager": "#999999", "eager channels_last": "#0072b2", "level 2": "#d55e00"}
_INPUTS = 2


def case(axis: str, value: int) -> Case:
    """The digits net with one of its four sizes changed; the others are T = 4, batch 1, width 32 and 32 pixels.

    >>> case("batch", 2).inputs[0].shape
    torch.Size([4, 2, 1, 32, 32])
    """
    sizes = {"T": TIME_STEPS, "batch": 1, "width": 32, "resolution": IMAGE_SIZE} | {axis: value}
    images = load_split()[1].images[: _INPUTS * sizes["batch"]]
    images = nn.functional.interpolate(images, size=(sizes["resolution"],) * 2, mode="bilinear")
    inputs = tuple(encode(part, sizes["T"]) for part in images.split(sizes["batch"]))
    if axis == "width":
        return Case(f"width {value}", activity(), functools.partial(_of_width, value, inputs[0]), inputs)
    return Case(f"{axis} {value}", "trained", load_checkpoint, inputs)


def _of_width(width: int, x: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    return fire_like_trained(DigitsResNet((width, 2 * width, 4 * width, 8 * width)), x)


def points() -> Iterator[tuple[str, int, Callable[[], Case]]]:
    """Every axis, value and what makes the case."""
    for axis, values in AXES.items():
        for value in values:
            yield axis, value, functools.partial(case, axis, value)


def run(options: argparse.Namespace, path: pathlib.Path) -> None:
    """Measure every point, dense eager against level 2, into ``path``; then draw :data:`IMAGE`."""
    rows: list[dict[str, Any]] = []
    for axis, value, make in points():
        if options.only in f"{axis} {value}":
            point = make()
            nets = {"level 2": accelerated(point.build(), point.inputs[0], fuse=True)}
            row = {"axis": axis, "value": value, **measure(point, options.repeats, with_compile=False, nets=nets)}
            rows.append(row)
            print(line(row), flush=True)
            save(path, rows)
    plot(json.loads(path.read_text())["rows"], IMAGE)


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """One panel an axis: median ms of a call, the 20 % to 80 % band, and what level 2 gains over the best dense."""
    rows = [row for row in rows if row["ms"]]
    axes = [axis for axis in AXES if any(row["axis"] == axis for row in rows)]
    figure, panels = plt.subplots(1, len(axes), figsize=(3.4 * len(axes), 3.0), sharey=True, squeeze=False)
    for panel, axis in zip(panels.flat, axes, strict=True):
        _panel(panel, axis, [row for row in rows if row["axis"] == axis])
    panels[0, 0].set_ylabel("ms a call")
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(panel: Any, axis: str, rows: list[dict[str, Any]]) -> None:
    values = [row["value"] for row in rows]
    for name, colour in _LINES.items():
        low, middle, high = zip(*(row["ms"][name] for row in rows), strict=True)
        panel.plot(values, middle, color=colour, marker=".", label=name)
        panel.fill_between(values, low, high, color=colour, alpha=0.2, linewidth=0)
    for row in rows:
        over = f"{row['over']['best dense fp32']:.1f}x"
        panel.annotate(over, (row["value"], row["ms"]["level 2"][1]), (0, -11), textcoords="offset points", fontsize=7)
    panel.set(xscale="log", yscale="log", xlabel=_UNITS[axis], title=axis)
    panel.set_xticks(values, [str(value) for value in values])
    panel.minorticks_off()
