"""Trains the demo network from scratch on a CPU (about 15 minutes on two cores), and records what came out.

Run from the ``examples`` folder::

    python -m digits.train

Writes ``digits_resnet18.pt`` and ``digits_resnet18.json`` (accuracy and densities of the stored fp16 weights, settings,
versions). The same seed, machine and number of threads give the same weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, neuron
from torch import nn

from digits.data import Split, encode, load_split
from digits.net import CHECKPOINT, TIME_STEPS, DigitsResNet, load_checkpoint, save_checkpoint

MAX_SHIFT = 2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    return parser.parse_args()


def shifted(images: torch.Tensor) -> torch.Tensor:
    """Move the whole batch ``[N, 1, H, W]`` by one random offset of at most ``MAX_SHIFT`` pixels, zeros coming in."""
    size = images.shape[-1]
    top, left = torch.randint(0, 2 * MAX_SHIFT + 1, (2,)).tolist()
    return F.pad(images, [MAX_SHIFT] * 4)[..., top : top + size, left : left + size]


def batches(split: Split, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Shuffled batches; the incomplete last one is dropped, because batch norm is noisy on few images."""
    order = torch.randperm(len(split.labels))
    for chunk in order.split(size):
        if len(chunk) == size:
            yield shifted(split.images[chunk]), split.labels[chunk]


def train_epoch(net: nn.Module, split: Split, optimizer: torch.optim.Optimizer, schedule, size: int) -> float:
    """One pass over the training set; returns the mean loss."""
    net.train()
    losses = []
    for images, labels in batches(split, size):
        functional.reset_net(net)
        logits = net(encode(images, TIME_STEPS)).mean(0)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def accuracy(net: nn.Module, split: Split, size: int = 60) -> float:
    """Share of correct predictions, logits averaged over T."""
    net.eval()
    correct = 0
    for images, labels in zip(split.images.split(size), split.labels.split(size), strict=True):
        functional.reset_net(net)
        correct += (net(encode(images, TIME_STEPS)).mean(0).argmax(1) == labels).sum().item()
    return correct / len(split.labels)


@torch.no_grad()
def densities(net: nn.Module, images: torch.Tensor) -> dict[str, dict[str, float]]:
    """Firing rate of every neuron layer, and input density of every convolution and linear layer."""
    rates: dict[str, float] = {}
    inputs: dict[str, float] = {}

    def share_nonzero(x: torch.Tensor) -> float:
        return round(x.count_nonzero().item() / x.numel(), 5)

    handles = []
    for name, module in net.named_modules():
        if isinstance(module, neuron.BaseNode):
            hook = module.register_forward_hook(lambda _m, _i, out, n=name: rates.__setitem__(n, share_nonzero(out)))
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            hook = module.register_forward_pre_hook(lambda _m, i, n=name: inputs.__setitem__(n, share_nonzero(i[0])))
        else:
            continue
        handles.append(hook)
    functional.reset_net(net)
    net(encode(images, TIME_STEPS))
    for handle in handles:
        handle.remove()
    return {"firing_rate": rates, "input_density": inputs}


def record(args: argparse.Namespace, train: Split, test: Split, seconds: float) -> dict:
    """What the JSON beside the checkpoint holds, measured on the weights as stored."""
    net = load_checkpoint(args.checkpoint)
    return {
        "test_accuracy": accuracy(net, test),
        "train_accuracy": accuracy(net, train),
        "parameters": sum(p.numel() for p in net.parameters()),
        "time_steps": TIME_STEPS,
        **densities(net, test.images),
        "settings": {k: v for k, v in vars(args).items() if k != "checkpoint"},
        "training_minutes": round(seconds / 60, 1),
        "versions": {name: version(name) for name in ("torch", "spikingjelly", "scikit-learn")}
        | {"python": platform.python_version()},
    }


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train, test = load_split()
    net = DigitsResNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    steps = args.epochs * (len(train.labels) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.2)
    started = time.perf_counter()
    for epoch in range(args.epochs):
        loss = train_epoch(net, train, optimizer, schedule, args.batch_size)
        minutes = (time.perf_counter() - started) / 60
        print(f"epoch {epoch + 1:2d}  loss {loss:.4f}  test {accuracy(net, test):.4f}  {minutes:.1f} min", flush=True)
    save_checkpoint(net, args.checkpoint)
    result = record(args, train, test, time.perf_counter() - started)
    args.checkpoint.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
