"""Whole networks: dense against sparse layers (level 1) and fused blocks (level 2), in alternation in one process.

Dense baselines of the same run: the user's eager model (of snnTorch: the user's own loop over time), eager
channels_last, and ``torch.compile`` in fp32 and bf16, with inductor freezing (not for snnTorch, which replaces a buffer
in every call); all steps in one call. Resetting the neurons and packing spikes is inside the timer. The gate
(:mod:`sparseflow.bench.suites.gate`) comes first, for each level, and what fails it is not timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

import sparseflow
from sparseflow.bench.compare import alternate, quantiles
from sparseflow.bench.records import Gate, Layer, Metric, Point, Quantiles, Scope

from . import Case, Options, Row, nets
from .baselines import Call, Workload, baselines, fresh_compiler
from .gate import judged, verdict
from .phases import phases_of

SUITE = "models"
LEVELS = {"level 1": False, "level 2": True}
FAMILIES = {"level 1": "sparse layers", "level 2": "fused blocks"}
WHAT = (
    "fused blocks and sparse layers inside their float64 budgets, first spike flips in the rounding band around the "
    "threshold, the same class in every image without a flip"
)
_QUICK_IMAGES = 2
_FP32 = ("eager", "eager channels_last", "compiled fp32")


def run(options: Options) -> Iterator[Case]:
    """The suite: trained networks, SpikingJelly's zoo, and networks that fire so often that dense should run."""
    for name, make in _quick() if options.quick else everything():
        yield Case(name, functools.partial(_measured, make, options))


def _measured(make: Callable[[], Workload], options: Options) -> Iterable[Row]:
    workload = make()
    return measure(workload, options, levels(workload, ["level 2"] if options.quick else LEVELS))


def _quick() -> Iterator[nets.Made]:
    """A network of either framework; both exist without a checkout."""
    if nets.checkout() is not None:
        yield "digits resnet18 @32, batch 1", functools.partial(nets.digits, 1, images=_QUICK_IMAGES)
    name = "snnTorch dense net, width 1000, T = 25, batch 1"
    yield name, functools.partial(nets.snntorch_dense, 1, images=_QUICK_IMAGES)


def everything() -> Iterator[nets.Made]:
    """Every workload: its name, and what makes it."""
    for batch in (1, 8, 32):
        yield f"digits resnet18 @32, batch {batch}", functools.partial(nets.digits, batch)
        yield f"snnTorch convnet @28, T = 25, batch {batch}", functools.partial(nets.snntorch_convnet, batch)
        name = f"snnTorch dense net, width 1000, T = 25, batch {batch}"
        yield name, functools.partial(nets.snntorch_dense, batch)
    for batch, side in ((1, 64), (8, 64), (1, 160), (8, 160)):
        yield f"spiking_resnet18 @{side}, batch {batch}", functools.partial(nets.spiking_resnet18, batch, side)
    yield from _stand_ins()


def _stand_ins() -> Iterator[nets.Made]:
    """Other networks of the zoo, and ones that fire often, on which acceleration must not cost time."""
    often = [(f"spiking_resnet18 at {density:.0%}", nets.RESNET18, density) for density in (0.3, 0.45, 0.6)]
    zoo = [
        ("sew_resnet18 IF", "sew_resnet.sew_resnet18", nets.IF_DENSITY),
        ("spiking_vgg11_bn", "spiking_vgg.spiking_vgg11_bn", nets.LIF_DENSITY),
    ]
    for label, model, density in [*zoo, *often]:
        name = f"{label} @64, batch 1"
        yield name, functools.partial(nets.stand_in, name, model, density, batch=1, side=64)


def levels(workload: Workload, names: Iterable[str] = LEVELS) -> dict[str, nn.Module]:
    """The accelerated networks by name."""
    return {name: sparseflow.accelerate(workload.build(), workload.inputs[0], fuse=LEVELS[name]) for name in names}


def measure(
    workload: Workload, options: Options, networks: dict[str, nn.Module] | None = None, *, suite: str = SUITE
) -> Iterator[Row]:
    """Rows of one workload: of every network in ``networks`` over every dense baseline; a red one is not timed."""
    networks = levels(workload) if networks is None else networks
    judge = judged(workload, networks)
    gates = {name: gate_of(verdict(judge, name)) for name in networks}
    green = {name: net for name, net in networks.items() if gates[name].green}
    ms = timed(workload, green, options, with_bf16=suite == SUITE)
    densities = {name: round(density, 5) for name, density in judge.densities.items()}
    about = {"config": workload.config, "rho": sum(densities.values()) / len(densities), "densities": densities}
    yield from points(suite, workload.name, gates, ms, about)
    if suite == SUITE:
        yield from layers_of(workload.name, list(networks.values())[-1])
        for name, net in green.items():
            yield from phases_of(workload, name, net, options.repeats)


def gate_of(found: dict[str, Any]) -> Gate:
    """The record of a :func:`~sparseflow.bench.suites.gate.verdict`."""
    return Gate(found["green"], WHAT, tuple(found["why"]))


def timed(
    workload: Workload, networks: dict[str, nn.Module], options: Options, *, with_bf16: bool = True
) -> dict[str, Quantiles]:
    """20 %, 50 % and 80 % quantiles in ms of every variant, in alternation; nothing where no network passed."""
    if not networks:
        return {}
    fresh_compiler()
    with torch.no_grad():
        dense = baselines(workload, options.compile and not options.quick, with_bf16)
        runs = {name: Call(net, workload, dtype) for name, net, dtype in dense}
        runs |= {name: Call(net, workload) for name, net in networks.items()}
        alternate(runs, 3)
        return {name: quantiles(values) for name, values in alternate(runs, options.repeats).items()}


def points(
    suite: str, case: str, gates: dict[str, Gate], ms: dict[str, Quantiles], about: dict[str, Any]
) -> Iterator[Point]:
    """A point for every network and baseline; a red network has one, against the eager model and without figures."""
    best = strongest(ms)
    for kernel, gate in gates.items():
        common = {"suite": suite, "case": case, "kernel": kernel, "family": FAMILIES[kernel], "scope": Scope.EXACT}
        common |= {"metric": Metric.LATENCY, "gate": gate, **about}
        if not gate.green:
            yield Point(**common, value=None, baseline="eager", baseline_value=None, honest=False)
            continue
        for baseline in (name for name in ms if name not in gates):
            times = {"value": ms[kernel], "baseline": baseline, "baseline_value": ms[baseline]}
            yield Point(**common, **times, honest=baseline == best)


def strongest(ms: dict[str, Quantiles]) -> str | None:
    """The fastest dense fp32 variant by median; ``None`` where compiled was left out, since it could have been that.

    >>> strongest({"eager": (1, 2.0, 3), "compiled fp32": (1, 2.5, 3), "compiled bf16": (1, 1.0, 2)})
    'eager'
    >>> strongest({"eager": (1, 2.0, 3), "level 2": (1, 1.0, 2)})
    """
    found = {name: ms[name][1] for name in _FP32 if name in ms}
    return min(found, key=lambda name: found[name]) if "compiled fp32" in found else None


def layers_of(case: str, net: nn.Module) -> Iterator[Layer]:
    """What runs where in an accelerated network, from its report."""
    for layer in sparseflow.report(net).to_dict()["layers"]:
        fields = ("name", "kind", "density", "occupancy", "path", "dense_ms", "sparse_ms")
        reason = f"{layer['reason']} ({layer['detail']})" if layer["detail"] else layer["reason"]
        yield Layer(case, **{field: layer[field] for field in fields}, reason=reason)
