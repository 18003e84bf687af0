"""Trains the tutorial network from scratch on a CPU (a few minutes), and records what came out.

Run from the ``examples`` folder::

    python -m snntorch_digits.train

Writes ``digits_convnet.pt`` and ``digits_convnet.json`` (accuracy, densities, settings, versions). The same seed,
machine and number of threads give the same weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import snntorch as snn
import torch
from digits.data import Split
from digits.train import batches
from snntorch.functional import ce_rate_loss
from torch import nn

from snntorch_digits.net import CHECKPOINT, TIME_STEPS, ConvNet, load_checkpoint, load_split


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    return parser.parse_args()


def train_epoch(net: nn.Module, split: Split, optimizer: torch.optim.Optimizer, schedule, size: int) -> float:
    """One pass over the training set; returns the mean loss."""
    net.train()
    rate_loss, losses = ce_rate_loss(), []
    for images, labels in batches(split, size):
        loss = rate_loss(net(images)[0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def accuracy(net: nn.Module, split: Split, size: int = 60) -> float:
    """Share of images whose class spikes most; of equal counts, the lower class."""
    net.eval()
    correct = 0
    for images, labels in zip(split.images.split(size), split.labels.split(size), strict=True):
        correct += (net(images)[0].sum(0).argmax(1) == labels).sum().item()
    return correct / len(split.labels)


@torch.no_grad()
def densities(net: nn.Module, images: torch.Tensor) -> dict[str, dict[str, float]]:
    """Firing rate of every neuron layer, and input density of every convolution and linear layer, over all steps."""
    rates, inputs = defaultdict(list), defaultdict(list)
    handles = []
    for name, module in net.named_modules():
        if isinstance(module, snn.Leaky):
            hook = module.register_forward_hook(lambda _m, _i, out, n=name: rates[n].append(_share_nonzero(out[0])))
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            hook = module.register_forward_pre_hook(lambda _m, i, n=name: inputs[n].append(_share_nonzero(i[0])))
        else:
            continue
        handles.append(hook)
    net(images)
    for handle in handles:
        handle.remove()
    return {"firing_rate": _means(rates), "input_density": _means(inputs)}


def _share_nonzero(x: torch.Tensor) -> float:
    return x.count_nonzero().item() / x.numel()


def _means(steps: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(sum(values) / len(values), 5) for name, values in steps.items()}


def record(args: argparse.Namespace, train: Split, test: Split, seconds: float) -> dict:
    """What the JSON beside the checkpoint holds, measured on the stored weights."""
    net = load_checkpoint(args.checkpoint)
    return {
        "test_accuracy": accuracy(net, test),
        "train_accuracy": accuracy(net, train),
        "parameters": sum(p.numel() for p in net.parameters()),
        "time_steps": TIME_STEPS,
        **densities(net, test.images),
        "settings": {k: v for k, v in vars(args).items() if k != "checkpoint"},
        "training_minutes": round(seconds / 60, 1),
        "versions": {name: version(name) for name in ("torch", "snntorch", "scikit-learn")}
        | {"python": platform.python_version()},
    }


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train, test = load_split()
    net = ConvNet()
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    steps = args.epochs * (len(train.labels) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.2)
    started = time.perf_counter()
    for epoch in range(args.epochs):
        loss = train_epoch(net, train, optimizer, schedule, args.batch_size)
        minutes = (time.perf_counter() - started) / 60
        print(f"epoch {epoch + 1:2d}  loss {loss:.4f}  test {accuracy(net, test):.4f}  {minutes:.1f} min", flush=True)
    torch.save(net.state_dict(), args.checkpoint)
    result = record(args, train, test, time.perf_counter() - started)
    args.checkpoint.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
