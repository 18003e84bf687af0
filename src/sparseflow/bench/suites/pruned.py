"""Networks and layers pruned in blocks: what pruning costs in accuracy, and what skipping zero blocks brings.

Networks are the trained ones of the checkout, pruned to each density of weight blocks and fine-tuned with a fixed
seed. ``config`` has their test accuracy before, after pruning, and after fine-tuning. The gate compares with the pruned
network in float64: exact means exact for that network. Baselines are the same pruned network, dense, and the
accelerated network as it was before pruning.

Layers have random weights of which a random share of the blocks is there. Baselines are the best dense way to run that
layer, and the sparse layer with all its weights on the same spikes.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import sparseflow
from sparseflow.bench.records import Gate, Metric, Point, Quantiles, Scope
from sparseflow.kernels.weight_blocks import present_blocks, spread

from . import Case, Options, Row, layers, models, nets
from .baselines import Workload
from .gate import judged, verdict
from .shapes import SHAPES, Shape

SUITE, FAMILY = "pruned", "block-sparse"
UNPRUNED = "level 2 before pruning"
FULL = "sparse layer with all its weights"
_NET_DENSITIES, _LAYER_DENSITIES = (0.5, 0.25, 0.125), (1.0, 0.5, 0.25, 0.125)
_SPIKES = (0.02, 0.05, 0.1, 0.2)
_LAYERS = ("3x3 128@28", "3x3 256@14", "3x3 512@7", "linear 4096->4096, T*N 1", "linear 4096->4096, T*N 32")
_BATCH, _TRAINING_BATCH, _EPOCHS = 8, 32, 6


def run(options: Options) -> Iterator[Case]:
    """The suite: networks by density of their weight blocks, and layers."""
    for name in () if options.quick else RECIPES:
        for density in _NET_DENSITIES:
            case = _case(name, density)
            yield Case(case, functools.partial(network_points, case, name, density, options))
    for name, density in [("3x3 256@14", 0.25)] if options.quick else itertools.product(_LAYERS, _LAYER_DENSITIES):
        case = _case(name, density)
        yield Case(case, functools.partial(layer_points, case, _shape(name), density, options))


def _case(name: str, density: float) -> str:
    return f"{name}, {density:.1%} of the blocks"


def _shape(name: str) -> Shape:
    return next(shape for shape in SHAPES if shape.name == name)


# ---- networks


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a trained network of the checkout is measured and trained on: its modules, and a learning rate."""

    workload: Callable[[int], Workload]
    data: str
    training: str
    rate: float


RECIPES = {
    "digits resnet18 @32": Recipe(nets.digits, "digits.data", "digits.train", 1e-3),
    "snnTorch convnet @28, T = 25": Recipe(nets.snntorch_convnet, "snntorch_digits.net", "snntorch_digits.train", 2e-3),
}


def fine_tuned(recipe: Recipe, density: float, epochs: int = _EPOCHS) -> tuple[nn.Module, dict[str, float]]:
    """The network pruned to ``density`` and trained on, and its test accuracy on the way."""
    training = nets.from_checkout(recipe.training)
    train, test = nets.from_checkout(recipe.data).load_split()
    net = recipe.workload(_BATCH).build()
    found = {"accuracy": training.accuracy(net, test)}
    found["block_density"] = sparseflow.prune_blocks(net, density=density).density
    found["accuracy_pruned"] = training.accuracy(net, test)
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.rate, weight_decay=0.02)
    steps = epochs * (len(train.labels) // _TRAINING_BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps, pct_start=0.2)
    for _ in range(epochs):
        training.train_epoch(net, train, optimizer, schedule, _TRAINING_BATCH)
    return net.eval(), found | {"accuracy_fine_tuned": training.accuracy(net, test), "epochs": epochs}


def network_points(case: str, name: str, density: float, options: Options) -> Iterator[Row]:
    """The pruned network with fused blocks, over itself dense and over the accelerated one before pruning."""
    recipe = RECIPES[name]
    net, found = fine_tuned(recipe, density)
    unpruned = recipe.workload(_BATCH)
    pruned = dataclasses.replace(unpruned, name=case, build=functools.partial(copy.deepcopy, net))
    level2 = sparseflow.accelerate(pruned.build(), pruned.inputs[0])
    judge = judged(pruned, {"level 2": level2})
    gate = models.gate_of(verdict(judge, "level 2"))
    both = {"level 2": level2, UNPRUNED: sparseflow.accelerate(unpruned.build(), unpruned.inputs[0])}
    ms = models.timed(pruned, both, options) if gate.green else {}
    densities = {layer: round(value, 5) for layer, value in judge.densities.items()}
    about = {"config": unpruned.config | found, "rho": sum(densities.values()) / len(densities), "densities": densities}
    yield from points(case, gate, ms, about, "level 2", models.strongest(ms))


def points(
    case: str, gate: Gate, ms: dict[str, Quantiles], about: dict[str, Any], kernel: str, best: str | None
) -> Iterator[Point]:
    """One point for every baseline; behind a red gate a single one without figures."""
    common: dict[str, Any] = {"suite": SUITE, "case": case, "kernel": f"{kernel}, pruned", "family": FAMILY}
    common |= {"scope": Scope.PRUNED, "metric": Metric.LATENCY, "gate": gate, **about}
    if not gate.green:
        yield Point(**common, value=None, baseline="eager", baseline_value=None, honest=False)
        return
    for baseline in (name for name in ms if name != kernel):
        times = {"value": ms[kernel], "baseline": baseline, "baseline_value": ms[baseline]}
        yield Point(**common, **times, honest=baseline == best)


# ---- layers


def with_zero_blocks(layer: Any, share: float) -> Any:
    """``layer`` with a random ``share`` of its weight blocks left."""
    generator = torch.Generator().manual_seed(0)
    blocks = present_blocks(layer.weight)
    order = torch.rand(blocks.numel(), generator=generator).argsort().argsort().view(blocks.shape)
    with torch.no_grad():
        layer.weight.mul_(spread(order < round(share * blocks.numel()), layer.weight.shape))
    return layer


def layer_points(case: str, shape: Shape, share: float, options: Options) -> Iterator[Row]:
    """One layer at every spike density."""
    plain, full = with_zero_blocks(shape.layer(), share), shape.layer()
    runs = {"sparse": layers.swapped(plain, "sparse"), FULL: layers.swapped(full, "sparse")}
    for density in _SPIKES:
        inputs = spikes(shape, density)
        gate = layers.gate_of(runs["sparse"], plain, inputs[:2])
        ms = layers.timed(plain, runs, inputs, options.repeats) if gate.green else {}
        shown = layers.over(ms) | {name: ms[name] for name in runs} if ms else {}
        config = {"batch": shape.size[0], "block_density": share, "density set": density}
        yield from points(case, gate, shown, {"config": config, "rho": density}, "sparse", "best dense fp32")


def spikes(shape: Shape, density: float) -> list[Tensor]:
    """Independent spikes, four inputs."""
    generator = torch.Generator().manual_seed(int(density * 1e6))
    return [(torch.rand(shape.size, generator=generator) < density).float() for _ in range(4)]
