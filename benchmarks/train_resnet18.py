"""Trains SpikingJelly's spiking_resnet18 on digits drawn on photographs, at 64 pixels, and records what came out.

    python -m benchmarks.train_resnet18 [--steps 600] [--threads 2]

Writes ``out/resnet18.pt`` and ``out/resnet18.json``: accuracy on held-out digits and photographs, and the density of
every layer, at 64 and 160 pixels. Takes 15 minutes on two cores. The same seed, machine and number of threads give the
same weights.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from importlib.metadata import version

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from .trained import CHECKPOINT, TIME_STEPS, build, digits_on_photographs, encode, held_out, load

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

from digits.train import accuracy, densities

_SIDE = 64
_SIDES = (64, 160)
_TESTED, _WATCHED = 360, 24  # frames for the accuracy, and for the densities


def train_step(net: nn.Module, optimizer: torch.optim.Optimizer, frames: Tensor, labels: Tensor) -> float:
    """One update on frames ``[N, 3, H, W]``, logits averaged over T; returns the loss."""
    net.train()
    functional.reset_net(net)
    loss = F.cross_entropy(net(encode(frames, TIME_STEPS)).mean(0), labels, label_smoothing=0.05)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def train(net: nn.Module, options: argparse.Namespace) -> float:
    """Train in place on frames drawn as it goes; returns the seconds it took."""
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps, pct_start=0.2)
    started, smooth = time.perf_counter(), 0.0
    for step in range(options.steps):
        batch = digits_on_photographs(options.batch_size, _SIDE, train=True, generator=generator)
        loss = train_step(net, optimizer, *batch)
        schedule.step()
        smooth = loss if step == 0 else 0.9 * smooth + 0.1 * loss
        if step % 10 == 0:
            print(f"step {step:4d}  loss {smooth:.3f}  {(time.perf_counter() - started) / 60:.1f} min", flush=True)
    return time.perf_counter() - started


def record(options: argparse.Namespace, seconds: float) -> dict:
    """What the JSON beside the checkpoint holds, measured on the weights as stored."""
    net = load(options.checkpoint)
    sides = {f"{side}": figures(net, side) for side in _SIDES}
    settings = {key: value for key, value in vars(options).items() if key != "checkpoint"}
    versions = {name: version(name) for name in ("torch", "spikingjelly", "scikit-learn", "matplotlib")}
    return {"sides": sides, "settings": settings, "training_minutes": round(seconds / 60, 1), "versions": versions}


def figures(net: nn.Module, side: int) -> dict:
    """Accuracy on held-out frames, firing rate and input density by layer, and the mean over the neuron layers."""
    test = held_out(side, _TESTED)
    found = densities(net, test.images[:_WATCHED])
    mean = sum(found["firing_rate"].values()) / len(found["firing_rate"])
    return {"test_accuracy": accuracy(net, test), "mean_firing_rate": round(mean, 4), **found}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=pathlib.Path, default=CHECKPOINT)
    return parser.parse_args()


def main() -> None:
    options = parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    net = build()
    seconds = train(net, options)
    options.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), options.checkpoint)
    result = record(options, seconds)
    options.checkpoint.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    for side, found in result["sides"].items():
        print(f"{side} pixels: accuracy {found['test_accuracy']:.3f}, mean firing rate {found['mean_firing_rate']:.3f}")


if __name__ == "__main__":
    main()
