"""How the time of a call grows with width, depth, T, batch and resolution: dense against level 2.

Fully connected networks, feed-forward and recurrent, on spike trains along width, depth, batch and T; a convolutional
one (the trained digits net of a source checkout, elsewhere SpikingJelly's ResNet-18 as a stand-in) along T, batch and
resolution. One size changes at a time, in fp32: what bf16 gives is in ``models``. Every point passes the gate of
:mod:`sparseflow.bench.suites.gate` first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import sparseflow

from . import Case, Options, Row, models, nets
from .baselines import Workload

SUITE = "scaling"
WIDTHS = (256, 512, 1024, 2048, 4096)
DENSE_AXES = {"batch": (1, 4, 16, 64), "T": (1, 4, 16, 64), "depth": (1, 2, 4, 8)}
CONV_AXES = {"T": (1, 4, 16, 64), "batch": (1, 4, 16, 32), "resolution": (16, 32, 64, 128)}
DENSITY = 0.05
_WIDTH, _STEPS, _DEPTH = 1024, 8, 2
_QUICK_WIDTHS = (256, 512)
_KINDS = {"feed-forward": False, "recurrent": True}


def run(options: Options) -> Iterator[Case]:
    """The suite: a case is one size of one network."""
    for name, make in _quick() if options.quick else everything():
        yield Case(name, functools.partial(_measured, make, options))


def _measured(make: Callable[[], Workload], options: Options) -> Iterable[Row]:
    workload = make()
    net = sparseflow.accelerate(workload.build(), workload.inputs[0])
    return models.measure(workload, options, {"level 2": net}, suite=SUITE)


def _quick() -> Iterator[nets.Made]:
    for width in _QUICK_WIDTHS:
        yield from _dense("feed-forward", width=width)
    yield from _dense("recurrent", width=_QUICK_WIDTHS[0])


def everything() -> Iterator[nets.Made]:
    """Every workload: its name, and what makes it."""
    for kind in _KINDS:
        for width in WIDTHS:
            yield from _dense(kind, width=width)
        for axis, values in DENSE_AXES.items():
            for value in values:
                yield from _dense(kind, **{axis: value})
    for axis, values in CONV_AXES.items():
        for value in values:
            yield _convolutional(axis, value)


def _dense(kind: str, **size: int) -> Iterator[nets.Made]:
    sizes = {"width": _WIDTH, "batch": 1, "T": _STEPS, "depth": _DEPTH} | size
    name = f"{kind}, " + ", ".join(f"{axis} {value}" for axis, value in size.items())
    make = functools.partial(
        nets.fully_connected,
        sizes["width"],
        recurrent=_KINDS[kind],
        batch=sizes["batch"],
        steps=sizes["T"],
        density=DENSITY,
        depth=sizes["depth"],
        name=name,
    )
    yield name, make


def _convolutional(axis: str, value: int) -> nets.Made:
    sizes = {"T": nets.TIME_STEPS, "batch": 1, "resolution": 32} | {axis: value}
    name = f"convolutional, {axis} {value}"
    return name, functools.partial(convolutional, name, sizes["T"], sizes["batch"], sizes["resolution"])


def convolutional(name: str, steps: int, batch: int, side: int) -> Workload:
    """The digits net of a checkout, or a stand-in of SpikingJelly's ResNet-18, at the given sizes."""
    if nets.checkout() is not None:
        return nets.digits(batch, steps, side, images=2, name=name)
    return nets.stand_in(name, nets.RESNET18, nets.LIF_DENSITY, batch, side, images=2, steps=steps)
