"""Temporal aggregation measured: accuracy and speed of TAC and TAC-TP against exact networks, on three kinds of data.

    python -m benchmarks.temporal [--only speed|decisions|rate|motion|events|converted] [--seeds 0 1 2] [--threads 2]

Trains small spiking networks on rate-coded digits, on the event streams of a camera that makes saccades over digits,
and on shapes whose class is the direction they move in; aggregates the exact ones after training (``converted``, which
takes what the parts before it have left in ``out/temporal``, and trains what is missing); and asks ``mode="auto"`` what
it would do with variants of the data. Results go to ``benchmarks/results/temporal.json`` as they come; those of other
seeds stay. The baselines are one batched call over T and T calls one after another.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

import sparseflow
from sparseflow.bench.compare import alternate, quantiles
from sparseflow.env import environment
from sparseflow.study.events import moving_shapes, poisson, saccade_events
from sparseflow.temporal import TAC, TACTP, time_share

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

from digits.data import load_split

RESULTS = pathlib.Path(__file__).with_name("results") / "temporal.json"
WEIGHTS = pathlib.Path(__file__).parents[1] / "out" / "temporal"
STEPS, SIDE = 16, 16
SIZES = (2, 4, 8, 16)
LEARNED = "collapse, learned"
_BATCH, _RATE = 64, 3e-3
_FRAMES_RATE = 5e-2  # of logarithms, which start as far down as -9
_MOVING = {"count": 1440, "test": 480}
_CONVERTED = 240  # samples that a conversion is validated with, none of which is trained on or tested with


@dataclasses.dataclass(frozen=True)
class Data:
    """One kind of data: events ``[T, N, C, H, W]`` and labels, to train with, to choose K with, and to test with."""

    name: str
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int
    epochs: int


def lif() -> neuron.LIFNode:
    """LIF with tau = 2 and a soft reset."""
    return neuron.LIFNode(tau=2.0, v_reset=None, detach_reset=True, surrogate_function=surrogate.ATan(), step_mode="m")


class Net(nn.Module):
    """Two convolutional spiking layers and a linear readout, averaged over time: ``[T, N, C, H, W]`` to logits.

    ``method``: ``"exact"`` (SpikingJelly's own layers in multi-step mode), ``"collapse"`` (the first layer collapses
    time by K, the rest runs on what is left), ``"collapse, learned"`` (with weights of the frames that are trained),
    ``"preserve"`` (every convolution sees one frame for K).
    """

    def __init__(self, channels: int, classes: int, method: str = "exact", size: int = 1, widths: tuple = (16, 32)):
        super().__init__()
        first = _block(channels, widths[0], method, size)
        second = _block(widths[0], widths[1], "exact" if method.startswith("collapse") else method, size)
        pool = layer.AvgPool2d(2, step_mode="m")
        ends = layer.AdaptiveAvgPool2d((4, 4), step_mode="m"), layer.Flatten(step_mode="m")
        self.body = nn.Sequential(first, pool, second, *ends)
        self.head = layer.Linear(widths[1] * 16, classes, step_mode="m")

    def per_step(self, x: Tensor) -> Tensor:
        """Logits of every frame, or of one in single-step mode."""
        return self.head(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.per_step(x).mean(0)


def _block(inputs: int, outputs: int, method: str, size: int) -> nn.Module:
    conv, norm = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
    if method.startswith("collapse"):
        return TAC(conv, lif(), size, norm=norm, learn_weights=method == LEARNED)
    if method == "preserve":
        return TACTP(conv, lif(), size, norm=norm)
    conv = layer.Conv2d(inputs, outputs, 3, padding=1, bias=False, step_mode="m")
    return nn.Sequential(conv, layer.BatchNorm2d(outputs, step_mode="m"), lif())


def run(net: nn.Module, x: Tensor) -> Tensor:
    """Logits from rest."""
    functional.reset_net(net)
    return net(x)


class Sequential(nn.Module):
    """An exact network called T times, one step each: the published baseline."""

    def __init__(self, net: Net):
        super().__init__()
        self.net: Net = net
        functional.set_step_mode(net, "s")

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.net.per_step(frame) for frame in x]).mean(0)


# ---- data


def rate_coded(images: Tensor, steps: int = STEPS, seed: int = 0, gain: float = 0.8, noise: float = 0.02) -> Tensor:
    """Poisson spikes of images: ``gain`` times the brightness, and ``noise`` everywhere, per step."""
    rates = (images * gain + noise).clamp(max=1)
    return poisson(rates, steps, torch.Generator().manual_seed(seed))


def digits(side: int = SIDE) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images of scikit-learn's digits and labels: for training, validation and test."""
    (images, labels), (test, test_labels) = load_split()
    images, test = (F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False) for x in (images, test))
    kept = len(images) - _CONVERTED
    return (images[:kept], labels[:kept]), (images[kept:], labels[kept:]), (test, test_labels)


def rate() -> Data:
    """Rate-coded digits: the order of frames says nothing."""
    parts = [(rate_coded(x, seed=seed), y) for seed, (x, y) in enumerate(digits())]
    return Data("rate-coded digits", *parts, classes=10, epochs=10)


def events() -> Data:
    """Event streams of a camera that makes saccades over digits, in two polarities."""
    parts = [(_seen(x, seed), y) for seed, (x, y) in enumerate(digits())]
    return Data("N-MNIST-like digits", *parts, classes=10, epochs=10)


def _seen(images: Tensor, seed: int) -> Tensor:
    return saccade_events(images, STEPS, noise=0.005, generator=torch.Generator().manual_seed(seed))


def motion() -> Data:
    """Moving shapes whose class is their direction."""
    counts = (_MOVING["count"], _CONVERTED, _MOVING["test"])
    parts = [_moving(count, seed) for seed, count in enumerate(counts)]
    return Data("moving shapes", *parts, classes=4, epochs=20)


def _moving(count: int, seed: int, steps: int = STEPS, size: int = SIDE, **more) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    options = {"shape_size": (3, 5), "speed": 1, "noise": 0.005} | more
    return moving_shapes(count, steps, size=size, generator=generator, **options)


# ---- training


def trained(net: nn.Module, data: Data, seed: int) -> nn.Module:
    """Train in place with Adam and a cosine schedule."""
    torch.manual_seed(seed)
    x, y = data.train
    named = dict(net.named_parameters())
    frames = [named.pop(name) for name in list(named) if name.endswith("log_weights")]
    groups = [{"params": named.values()}, {"params": frames, "lr": _FRAMES_RATE, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups if frames else groups[:1], lr=_RATE, weight_decay=1e-4)
    batches = data.epochs * -(-len(y) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, batches)
    net.train()
    for _ in range(data.epochs):
        for chosen in torch.randperm(len(y)).split(_BATCH):
            loss = F.cross_entropy(run(net, x[:, chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of samples whose class is right."""
    found = [run(net, x[:, part]).argmax(-1) == y[part] for part in torch.arange(len(y)).split(120)]
    return float(torch.cat(found).float().mean())


def training(data: Data, seeds: Iterable[int]) -> Iterator[dict]:
    """Test accuracy of every method and K; the exact networks are kept for :func:`conversions`."""
    for seed in seeds:
        for method, size in _methods():
            net = _trained_anew(data, method, size, seed)
            yield {"data": data.name, "method": method, "K": size, "seed": seed, "accuracy": accuracy(net, *data.test)}


def _trained_anew(data: Data, method: str, size: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = trained(_net(data, method, size), data, seed)
    if method == "exact":
        WEIGHTS.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), _weights(data, seed))
    return net


def _net(data: Data, method: str = "exact", size: int = 1) -> Net:
    return Net(data.train[0].shape[2], data.classes, method, size)


def _weights(data: Data, seed: int) -> pathlib.Path:
    return WEIGHTS / f"{data.name.replace(' ', '-')}-{seed}.pt"


def _methods() -> Iterator[tuple[str, int]]:
    yield "exact", 1
    for size in SIZES:
        yield "collapse", size
        yield LEARNED, size
        yield "preserve", size


def conversions(seeds: Sequence[int]) -> Iterator[dict]:
    """Exact networks aggregated after training: every K both ways, and as ``mode="auto"`` decides."""
    for make in (rate, motion, events):
        data = make()
        for seed in seeds:
            yield from _converted(_exact(data, seed), data, seed)


def _exact(data: Data, seed: int) -> nn.Module:
    """The exact network that was trained with that seed."""
    if not _weights(data, seed).exists():
        return _trained_anew(data, "exact", 1, seed)
    net = _net(data)
    net.load_state_dict(torch.load(_weights(data, seed), weights_only=True))
    return net.eval()


def _converted(net: nn.Module, data: Data, seed: int) -> Iterator[dict]:
    batches = [data.validation]
    example = data.validation[0][:, :32]
    for mode in ("collapse", "preserve"):
        for size in SIZES:
            yield _conversion(net, data, seed, example, mode, {"mode": mode, "group_size": size, "validate": batches})
    yield _conversion(net, data, seed, example, "auto", {"validate": batches})


def _conversion(net: nn.Module, data: Data, seed: int, example: Tensor, asked: str, arguments: dict) -> dict:
    limit = 0.01 if asked == "auto" else 1.0
    found = sparseflow.aggregate(net, example, max_drop=limit, **arguments)
    report = found.report
    layers = [
        {"layer": row.name, "mode": str(row.mode), "K": row.group_size, "drift": row.drift, "ms": row.ms}
        for row in report.layers
    ]
    return {
        "data": data.name,
        "seed": seed,
        "asked": asked,
        "mode": str(report.mode),
        "K": max((row["K"] for row in layers), default=1),
        "time share": report.time_share,
        "order drop": report.order_drop,
        "accuracy": accuracy(found, *data.test),
        "exact accuracy": accuracy(net, *data.test),
        "ms": report.ms,
        "layers": layers,
    }


# ---- speed


def speed(repeats: int) -> Iterator[dict]:
    """ms of a training step and of an inference call on a batch of rate-coded digits, for every method and K."""
    x = rate_coded(digits()[0][0][:_BATCH])
    y = digits()[0][1][:_BATCH]
    nets: dict[str, nn.Module] = {"T calls": Sequential(Net(1, 10)), "one batched call": Net(1, 10)}
    nets |= {f"{method} {size}": Net(1, 10, method, size) for method, size in _methods() if size > 1}
    steps = {name: _training_step(net.train(), x, y) for name, net in nets.items()}
    alternate(steps, 2)
    training_ms = {name: quantiles(ms) for name, ms in alternate(steps, repeats).items()}
    calls = {name: _inference(net.eval(), x) for name, net in nets.items()}
    calls["one batched call, compiled"] = _compiled(Net(1, 10).eval(), x)
    with torch.no_grad():
        alternate(calls, 2)
        inference_ms = {name: quantiles(ms) for name, ms in alternate(calls, repeats).items()}
    for name, ms in inference_ms.items():
        yield {"method": name, "training ms": training_ms.get(name), "inference ms": ms, "batch": _BATCH, "T": STEPS}


def _training_step(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(run(net, x), y).backward()
        optimizer.step()

    return step


def _inference(net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: run(net, x)


def _compiled(net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    fast: Any = torch.compile(net)
    with torch.no_grad():
        for _ in range(3):
            run(fast, x)
    return _inference(fast, x)


# ---- decisions


def decisions() -> Iterator[dict]:
    """What ``mode="auto"`` does with data that nothing was tuned on, by its frames alone."""
    for name, right, x in _variants():
        net = Net(x.shape[2], 4).eval()
        found = sparseflow.aggregate(net, x, group_size=2).report
        yield {"data": name, "right": right, "mode": str(found.mode), "time share": time_share(x)}


def _variants() -> Iterator[tuple[str, str, Tensor]]:
    images = {side: digits(side)[2][0][:64] for side in (8, 16, 24, 32)}
    for side in images:
        yield f"rate-coded digits @{side}", "collapse", rate_coded(images[side], seed=side)
    for steps in (4, 8, 32, 64):
        yield f"rate-coded digits, T {steps}", "collapse", rate_coded(images[SIDE], steps, seed=steps)
    for noise in (0.1, 0.3):
        yield f"rate-coded digits, noise {noise}", "collapse", rate_coded(images[SIDE], noise=noise, seed=7)
    for gain in (0.1, 1.0):
        yield f"rate-coded digits, gain {gain}", "collapse", rate_coded(images[SIDE], gain=gain, seed=8)
    yield "digits repeated", "collapse", images[SIDE].expand(STEPS, *images[SIDE].shape)
    for side in images:
        yield f"N-MNIST-like digits @{side}", "preserve", saccade_events(images[side], STEPS)
    for steps in (6, 32):
        yield f"N-MNIST-like digits, T {steps}", "preserve", saccade_events(images[SIDE], steps)
    for noise in (0.02, 0.1):
        seen = saccade_events(images[SIDE], STEPS, noise=noise, generator=torch.Generator().manual_seed(9))
        yield f"N-MNIST-like digits, noise {noise}", "preserve", seen
    for option, values in {"speed": (1, 2, 3), "noise": (0.02, 0.1), "size": (24, 32), "steps": (8, 32)}.items():
        for value in values:
            yield f"moving shapes, {option} {value}", "preserve", _moving(64, 11, **{option: value})[0]


# ---- command line


def main() -> None:
    """Measure the parts that are asked for, and put them in the place of what there was of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("speed", "decisions", "rate", "motion", "events", "converted")
    parser.add_argument("--only", choices=names, action="append")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.only or names:
        rows = []
        for row in _part(name, options):
            rows.append(row)
            print({key: value for key, value in row.items() if key != "layers"}, flush=True)
            _save(options.out, name, rows, options.seeds)


def _part(name: str, options: argparse.Namespace) -> Iterator[dict]:
    if name == "speed":
        return speed(options.repeats)
    if name == "decisions":
        return decisions()
    if name == "converted":
        return conversions(options.seeds)
    return training({"rate": rate, "motion": motion, "events": events}[name](), options.seeds)


def _save(path: pathlib.Path, name: str, rows: list[dict], seeds: Sequence[int]) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    kept = [row for row in found.get(name, []) if row.get("seed", seeds[0]) not in seeds]
    found |= {name: kept + rows, "environment": environment()}
    path.write_text(json.dumps(found, indent=None, separators=(",", ":"), default=str) + "\n")


if __name__ == "__main__":
    main()
