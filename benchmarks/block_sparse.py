"""Networks and layers pruned in blocks: what pruning costs in accuracy, and what skipping zero blocks brings.

    python -m benchmarks.block_sparse [--only NAME] [--out benchmarks/results/block_sparse.json] [--repeats N]

Networks: the trained digits nets, pruned from their checkpoint to each block density and fine-tuned with a fixed seed.
Timed in alternation: the fine-tuned net accelerated (level 2), the same net dense and compiled (frozen where possible),
and the unpruned net accelerated. Accuracy on the test set is in the configuration of each point. The gate
(:mod:`benchmarks.gate`) compares with the pruned net in float64: exact means exact for that net.

Layers: prescan and kernel on float32 spikes, channels last, of a layer with random blocks set to zero, against the best
dense way (eager, or compiled and frozen) to run it, and against the event kernels that do not look at blocks. The gate
is the float64 error budget. The fastest of the engine's variants counts, as the dispatcher would choose it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import sparseflow
from sparseflow.bench.compare import alternate, quantiles
from sparseflow.bench.records import Gate, Metric, Point, Results, Scope
from sparseflow.env import environment
from sparseflow.kernels.cpu import engine
from sparseflow.kernels.cpu.records import Structure
from sparseflow.kernels.reference import excess
from sparseflow.kernels.weight_blocks import present_blocks, present_share, spread

from .baselines import Call, Case, compiled, fresh_compiler
from .cpu_kernels import Layer
from .fused import accelerated, digits_case, snntorch_case
from .gate import judged, verdict

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import digits.data
import digits.train
import snntorch_digits.net
import snntorch_digits.train

SUITE, FAMILY, SEED = "block_sparse", "block-sparse", 0
NET_DENSITIES, LAYER_DENSITIES = (0.5, 0.25, 0.125), (1.0, 0.5, 0.25, 0.125)
SPIKE_DENSITIES = (0.02, 0.05, 0.1, 0.2)
COMPILED, UNPRUNED = "compiled fp32, same pruned net", "level 2 of the unpruned net"
DENSE, EVENTS = "best dense fp32", "events, blocks not skipped"
_BATCH_SIZE = 32


# ---- networks --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A trained net: its case by batch size, its data, one epoch of training, its accuracy, and a learning rate."""

    case: Callable[[int], Case]
    data: Callable[[], tuple[digits.data.Split, digits.data.Split]]
    epoch: Callable[..., float]
    accuracy: Callable[[nn.Module, digits.data.Split], float]
    lr: float


RECIPES = {
    "digits": Recipe(digits_case, digits.data.load_split, digits.train.train_epoch, digits.train.accuracy, 1e-3),
    "snntorch": Recipe(
        *(snntorch_case, snntorch_digits.net.load_split),
        *(snntorch_digits.train.train_epoch, snntorch_digits.train.accuracy, 2e-3),
    ),
}


def fine_tuned(recipe: Recipe, density: float, epochs: int) -> tuple[nn.Module, dict[str, float]]:
    """The net pruned to ``density`` and trained on, and its test accuracy on the way."""
    torch.manual_seed(SEED)
    train, test = recipe.data()
    net = recipe.case(1).build()
    found = {"accuracy": recipe.accuracy(net, test)}
    found["block_density"] = sparseflow.prune_blocks(net, density=density).density
    found["accuracy_pruned"] = recipe.accuracy(net, test)
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=0.02)
    steps = epochs * (len(train.labels) // _BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps, pct_start=0.2)
    for _ in range(epochs):
        recipe.epoch(net, train, optimizer, schedule, _BATCH_SIZE)
    return net.eval(), found | {"accuracy_fine_tuned": recipe.accuracy(net, test), "epochs": epochs}


def network_points(recipe: Recipe, batch: int, net: nn.Module, found: dict[str, float], options) -> Iterator[Point]:
    """The pruned net accelerated, against both baselines."""
    unpruned = recipe.case(batch)
    case = dataclasses.replace(unpruned, build=functools.partial(copy.deepcopy, net))
    ours = accelerated(case.build(), case.inputs[0], fuse=True)
    judge = judged(case, {"level 2": ours})
    gates = {name: verdict(judge, name) for name in ("dense", "level 2")}
    why = tuple(why for gate in gates.values() for why in gate["why"])
    gate = Gate(not why, "flips within rounding of the threshold, layers in their float64 budgets", why)
    nets = {"ours": ours, UNPRUNED: accelerated(unpruned.build(), unpruned.inputs[0], fuse=True)}
    times = timed(case, nets, options) if gate.green else {}
    densities = {name: round(value, 5) for name, value in judge.densities.items()}
    rho = sum(densities.values()) / len(densities)
    for baseline in (COMPILED, UNPRUNED):
        if times and baseline not in times:
            continue
        values = times.get("ours"), times.get(baseline)
        config = {"batch": batch, **found}
        label = f"{case.name}, block density {found['block_density']:.3f}"
        yield _point(label, config, rho, baseline, values, baseline == COMPILED, gate, densities)


def timed(case: Case, nets: dict[str, nn.Module], options) -> dict[str, tuple[float, float, float]]:
    """Quantiles in ms of every run, in alternation, neurons reset inside the timer."""
    fresh_compiler()
    with torch.no_grad():
        runs = {name: Call(net, case.inputs, reset=case.reset) for name, net in nets.items()}
        if not options.no_compile:
            fast = compiled(case.build(), case.inputs[0], case.reset, case.freeze)
            runs[COMPILED] = Call(fast, case.inputs, reset=case.reset)
        alternate(runs, 3)
        return {name: quantiles(values) for name, values in alternate(runs, options.repeats).items()}


def run_networks(results: Results, options) -> None:
    """Every net at every density and batch size."""
    for name, recipe in RECIPES.items():
        if options.only not in name:
            continue
        for density in options.densities or NET_DENSITIES:
            net, found = fine_tuned(recipe, density, options.epochs)
            figures = "  ".join(f"{key} {value:.4g}" for key, value in found.items())
            print(f"{name:10} {density:.3f}  {figures}", flush=True)
            for batch in options.batches:
                keep(results, network_points(recipe, batch, net, found, options), options.out)


# ---- layers ----------------------------------------------------------------------------------------------------------


def _conv(channels: int, side: int) -> Layer:
    return Layer(f"3x3 {channels}@{side}", (4, channels, side, side), (channels, channels, 3, 3))


LAYERS = (
    _conv(128, 28),
    _conv(256, 14),
    _conv(512, 7),
    Layer("linear 4096, T*N 1", (1, 4096), (4096, 4096)),
    Layer("linear 4096, T*N 32", (32, 4096), (4096, 4096)),
)


def weight_of(layer: Layer, share: float) -> Tensor:
    """Random weights of unit gain, of whose blocks of 16 x 16 a random ``share`` is there."""
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(layer.w_shape, generator=generator) / layer.w_shape[1] ** 0.5
    blocks = present_blocks(weight)
    order = torch.rand(blocks.numel(), generator=generator).argsort().argsort().view(blocks.shape)
    return weight * spread(order < round(share * blocks.numel()), weight.shape)


def spikes_of(layer: Layer, rho: float) -> Tensor:
    """Independent spikes in the layout the convolutions of a multi-step model get."""
    x = (torch.rand(layer.x_shape, generator=torch.Generator().manual_seed(SEED + 1)) < rho).float()
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def sparse_runs(layer: Layer, weight: Tensor, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Prescan and kernel of every variant of the engine, by variant name."""
    share = present_share(weight)
    if len(layer.w_shape) == 2:
        rows, features = layer.x_shape
        variants = engine.linear_variants(rows, features, layer.w_shape[0], x.dtype, share)
        geometry = None
    else:
        geometry = engine.ConvGeometry.from_call(layer.x_shape, layer.w_shape, (1, 1), (1, 1), (1, 1), 1)
        variants = engine.conv_variants(geometry, x.dtype, share)

    def run(variant: engine.Variant, packed: engine.Packed) -> Tensor:
        if geometry is None:
            out = torch.empty(layer.x_shape[0], layer.w_shape[0])
            return engine.linear(x, engine.prescan_linear(x), packed, None, variant, out)
        return engine.conv(x, engine.prescan_conv(x, geometry), packed, None, geometry, variant, channels_last=True)

    return {v.name: functools.partial(run, v, engine.pack_weight(weight, 1, v)) for v in variants}


def dense_runs(layer: Layer, weight: Tensor, x: Tensor, with_compile: bool) -> dict[str, Callable[[], Tensor]]:
    """The layer in PyTorch, eager and compiled with its weights frozen."""
    linear = len(layer.w_shape) == 2
    outputs, inputs = layer.w_shape[:2]
    dense = nn.Linear(inputs, outputs, bias=False) if linear else nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    dense.weight.data = weight if linear else weight.contiguous(memory_format=torch.channels_last)
    runs = {"eager": functools.partial(dense.eval(), x)}
    if with_compile:
        runs["compiled"] = functools.partial(compiled(dense, x, lambda _: None), x)
    return runs


def layer_points(layer: Layer, share: float, rho: float, options) -> Iterator[Point]:
    """One cell, against both baselines."""
    weight, x = weight_of(layer, share), spikes_of(layer, rho)
    fresh_compiler()
    with torch.no_grad():
        sparse, dense = sparse_runs(layer, weight, x), dense_runs(layer, weight, x, not options.no_compile)
        worst = max(excess(run(), x, weight, None, layer.call) for run in sparse.values())
        runs = {**sparse, **dense}
        alternate(runs, 3)
        times = {name: quantiles(values) for name, values in alternate(runs, options.repeats).items()}
    blocks = [name for name in sparse if name.startswith(Structure.BLOCKS)]
    events = min((times[name] for name in sparse if name not in blocks), key=_median)
    fastest = min((times[name] for name in blocks), key=_median, default=events)
    gate = Gate(worst <= 1.0, "float64 error budget", () if worst <= 1.0 else (f"{worst:.2f} budgets",))
    config = {"weight_density": share, "batch": layer.x_shape[0]}
    label = f"{layer.name}, block density {share:g}"
    for baseline, value in ((DENSE, min((times[name] for name in dense), key=_median)), (EVENTS, events)):
        values = (fastest, value) if gate.green else (None, None)
        yield _point(label, config, rho, baseline, values, baseline == DENSE and not options.no_compile, gate, {})


def _median(times: tuple[float, float, float]) -> float:
    return times[1]


def run_layers(results: Results, options) -> None:
    """Every layer at every density of blocks and spikes."""
    for layer in LAYERS:
        for share in options.densities or LAYER_DENSITIES:
            for rho in SPIKE_DENSITIES:
                if options.only in layer.name:
                    keep(results, layer_points(layer, share, rho, options), options.out)


# ---- results ---------------------------------------------------------------------------------------------------------


def _point(label, config, rho, baseline, values, honest, gate, densities) -> Point:
    ours, theirs = values if gate.green else (None, None)
    head = (SUITE, label, FAMILY, FAMILY, Scope.PRUNED, config, rho, Metric.LATENCY)
    return Point(*head, ours, baseline, theirs, honest, gate, densities=densities)


def keep(results: Results, points: Iterator[Point], path: pathlib.Path) -> None:
    """Add points, say them, and write what there is so far."""
    for point in points:
        results.points.append(point)
        said = f"{point.speedup:.2f}x" if point.speedup else "RED: " + "; ".join(point.gate.why)
        print(f"{point.case:50} spikes {point.rho:6.1%}  over {point.baseline:32} {said}", flush=True)
    results.save(path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/block_sparse.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--epochs", type=int, default=6, help="of fine-tuning")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8], help="batch sizes of the networks")
    parser.add_argument("--densities", type=float, nargs="*", default=[], help="block densities, instead of all")
    parser.add_argument("--only", default="", help="substring of the networks (digits, snntorch) and layers to run")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes minutes)")
    return parser.parse_args()


def main() -> None:
    """Command line."""
    options = parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    results = Results(environment(), SEED)
    run_networks(results, options)
    run_layers(results, options)


if __name__ == "__main__":
    main()
