"""Whole networks: dense against sparse layers (level 1) and fused blocks (level 2), in alternation in one process.

    python -m benchmarks.fused [--only NAME] [--out benchmarks/results/fused.json] [--repeats N] [--no-compile]
    python -m benchmarks.fused --growth        time against T, batch, width and resolution; docs/images/fused_growth.png

Dense baselines of the same run: the user's eager model (of snnTorch: the user's own loop over time), eager
channels_last, and ``torch.compile`` in fp32 and bf16, with inductor freezing (not for snnTorch, which replaces a buffer
in every call); all steps in one call. Resetting the neurons and packing spikes is inside the timer. The gate
(:mod:`benchmarks.gate`) comes first, and no time is reported of a case whose gate is red.

Memory is the growth of the resident set during one warm call, in a fresh process a variant in which the C allocator
gives freed blocks back at once: it sees the engine's and oneDNN's buffers, which torch's own profiler does not. Linux
counts it to about a quarter of a MB.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import os
import pathlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet, spiking_resnet
from torch import Tensor, nn

import sparseflow
from sparseflow.bench.compare import alternate, quantiles
from sparseflow.env import environment

from . import trained
from .baselines import Call, Case, baselines, compiled, fresh_compiler
from .gate import judged, verdict
from .stand_ins import IF_DENSITY, LIF_DENSITY, activity, fire_like_trained

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import digits.data
import digits.net
import snntorch_digits.net
from digits.data import encode

LEVELS = {"level 1": False, "level 2": True}
NEVER_BELOW = 0.98  # of the speed of the eager model: what acceleration promises of any model
_TIME_STEPS = 4
_IMAGES = 16  # that the gate sees at least
_MEMORY = ("eager", "eager channels_last", *LEVELS)
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_MAX_": "1000000"}


def accelerated(net: nn.Module, x: Any, fuse: bool) -> nn.Module:
    """Level 1 or level 2 of a dense network; level 1 both times while ``accelerate`` has no ``fuse``."""
    options = {"fuse": fuse} if "fuse" in inspect.signature(sparseflow.accelerate).parameters else {}
    return sparseflow.accelerate(net, x, **options)


def inputs_of(batch: int) -> int:
    """How many inputs a case has, so that the gate sees enough images."""
    return max(4, _IMAGES // batch)


def digits_case(batch: int, steps: int = _TIME_STEPS) -> Case:
    """The demo's trained net on test images."""
    images = digits.data.load_split()[1].images[: inputs_of(batch) * batch]
    inputs = tuple(encode(part, steps) for part in images.split(batch))
    return Case(f"digits resnet18 @32, batch {batch}", "trained", digits.net.load_checkpoint, inputs)


def snntorch_case(batch: int) -> Case:
    """The tutorial net of snnTorch on test images, its loop over T = 25 steps in the user's forward."""
    images = snntorch_digits.net.load_split()[1].images[: inputs_of(batch) * batch]
    name, build = f"snnTorch convnet @28, T = 25, batch {batch}", snntorch_digits.net.load_checkpoint
    inputs = images.split(batch)
    return Case(name, "trained", build, inputs, reset=_rests_itself, readout=_spike_rate, freeze=False)


def _rests_itself(_net: nn.Module) -> None:
    """The forward calls ``init_leaky``."""


def _spike_rate(output: tuple[Tensor, Tensor]) -> Tensor:
    return output[0].mean(0)


def resnet18_case(batch: int, side: int) -> Case:
    """The trained ResNet-18 on photographs it has not seen; its stand-in where there is no checkpoint."""
    name = f"spiking_resnet18 @{side}, batch {batch}"
    if not trained.CHECKPOINT.exists():
        return stand_in_case(name, _spiking_resnet18, LIF_DENSITY, batch, side)
    _, inputs = trained.resnet18(side, batch, inputs_of(batch))
    return Case(name, "trained", trained.load, inputs)


def stand_in_case(name: str, build: Callable[[], nn.Module], density: float, batch: int, side: int) -> Case:
    """A network at random weights that fires with ``density`` in every layer, on smooth random images."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(inputs_of(batch) * batch, 3, side // 8, side // 8, generator=generator)
    images = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    inputs = tuple(encode(part, _TIME_STEPS) for part in images.split(batch))
    return Case(name, activity(density), lambda: _firing(build, inputs[0], density), inputs)


def _firing(build: Callable[[], nn.Module], x: Tensor, density: float) -> nn.Module:
    torch.manual_seed(0)
    net = build()
    functional.set_step_mode(net, "m")
    return fire_like_trained(net, x, density)


def _spiking_resnet18() -> nn.Module:
    return spiking_resnet.spiking_resnet18(
        spiking_neuron=neuron.LIFNode, surrogate_function=surrogate.ATan(), detach_reset=True, num_classes=10
    )


def _sew_resnet18() -> nn.Module:
    return sew_resnet.sew_resnet18(
        cnf="ADD", spiking_neuron=neuron.IFNode, surrogate_function=surrogate.ATan(), detach_reset=True, num_classes=10
    )


def cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    """Everything that is timed: names, and what makes the case when it is its turn."""
    for batch in (1, 8, 32):
        yield f"digits resnet18 @32, batch {batch}", functools.partial(digits_case, batch)
        yield f"snnTorch convnet @28, T = 25, batch {batch}", functools.partial(snntorch_case, batch)
    for batch, side in ((1, 64), (8, 64), (1, 160), (8, 160)):
        yield f"spiking_resnet18 @{side}, batch {batch}", functools.partial(resnet18_case, batch, side)
    yield from _stand_ins()


def _stand_ins() -> Iterator[tuple[str, Callable[[], Case]]]:
    """Networks that fire often, on which acceleration must not cost time."""
    dense = [(f"spiking_resnet18 at {density:.0%}", _spiking_resnet18, density) for density in (0.3, 0.45, 0.6)]
    for label, build, density in [("sew_resnet18 IF", _sew_resnet18, IF_DENSITY), *dense]:
        name = f"{label} @64, batch 1"
        yield name, functools.partial(stand_in_case, name, build, density, batch=1, side=64)


def levels(case: Case) -> dict[str, nn.Module]:
    """The accelerated networks by name."""
    return {name: accelerated(case.build(), case.inputs[0], fuse) for name, fuse in LEVELS.items()}


def measure(case: Case, repeats: int, with_compile: bool, nets: dict[str, nn.Module] | None = None) -> dict[str, Any]:
    """The row of one case. Without a green gate of every network in ``nets`` it has no times."""
    nets = levels(case) if nets is None else nets
    judge = judged(case, nets)
    gates = {name: verdict(judge, name) for name in ("dense", *nets)}
    green = all(gate["green"] for gate in gates.values())
    ms = timed(case, nets, repeats, with_compile) if green else {}
    densities = {name: round(density, 5) for name, density in judge.densities.items()}
    row = {"case": case.name, "activity": case.activity, "input": list(case.inputs[0].shape), "densities": densities}
    row |= {"mean_density": sum(densities.values()) / len(densities), "gate": gates, "green": green}
    reports = {name: sparseflow.report(net).to_dict() for name, net in nets.items()}
    return {**row, "ms": ms, "over": speedups(ms), "reports": reports}


def timed(case: Case, nets: dict[str, nn.Module], repeats: int, with_compile: bool) -> dict[str, tuple[float, ...]]:
    """20 %, 50 % and 80 % quantiles in ms of every variant, in alternation."""
    fresh_compiler()
    with torch.no_grad():
        runs = {name: Call(net, case.inputs, dtype, case.reset) for name, net, dtype in baselines(case, with_compile)}
        runs |= {name: Call(net, case.inputs, reset=case.reset) for name, net in nets.items()}
        if with_compile:
            twin = accelerated(case.build(), case.inputs[0], fuse=False)
            fast = compiled(twin, case.inputs[0], case.reset, case.freeze)
            runs["level 1 compiled"] = Call(fast, case.inputs, reset=case.reset)
        alternate(runs, 3)
        return {name: quantiles(values) for name, values in alternate(runs, repeats).items()}


def speedups(ms: dict[str, tuple[float, ...]]) -> dict[str, float]:
    """Median time of every other variant over that of level 2, and of the fastest dense fp32 variant.

    >>> speedups({"eager": (1, 4.0, 5), "compiled bf16": (1, 1.0, 2), "level 2": (1, 2.0, 3)})
    {'eager': 2.0, 'compiled bf16': 0.5, 'best dense fp32': 2.0}
    """
    if "level 2" not in ms:
        return {}
    mine = ms["level 2"][1]
    over = {name: value[1] / mine for name, value in ms.items() if name != "level 2"}
    dense = [ratio for name, ratio in over.items() if not name.startswith("level") and "bf16" not in name]
    return over | {"best dense fp32": min(dense)}


def memory(name: str, threads: int) -> dict[str, dict[str, float]]:
    """MB of every variant of a case, each in a process of its own: what stays after a call, and what a call adds."""
    found = {}
    for variant in _MEMORY:
        command = [sys.executable, "-m", "benchmarks.fused", "--only", name, "--memory-of", variant]
        run = subprocess.run(
            [*command, "--threads", str(threads)],
            env=os.environ | _MALLOC,
            cwd=pathlib.Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        )
        found[variant] = json.loads(run.stdout.splitlines()[-1])
    return found


def memory_of(case: Case, variant: str) -> dict[str, float]:
    """``resident``: MB of the network with its packed weights; ``call``: MB that one more call needs at its peak."""
    before = _resident("VmRSS")
    with torch.no_grad():
        call = Call(_variant(case, variant), case.inputs, reset=case.reset)
        for _ in range(3):
            call()
        resident = _resident("VmRSS")
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        call()
    return {"resident": resident - before, "call": _resident("VmHWM") - resident}


def _variant(case: Case, name: str) -> nn.Module:
    if name in LEVELS:
        return accelerated(case.build(), case.inputs[0], LEVELS[name])
    return next(net for label, net, _ in baselines(case, with_compile=False) if label == name)


def _resident(field: str) -> float:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def line(row: dict[str, Any]) -> str:
    """One row for the terminal."""
    if not row["green"]:
        return f"{row['case']:42} RED: " + "; ".join(why for gate in row["gate"].values() for why in gate["why"])
    medians = ", ".join(f"{name} {ms[1]:.2f}" for name, ms in row["ms"].items())
    slow = row["over"].get("eager", 1.0) < NEVER_BELOW
    return f"{row['case']:42} {row['mean_density']:.1%}  ms: {medians}" + ("  BELOW THE DENSE MODEL" if slow else "")


def save(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Write what there is so far, with the environment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": 1, "environment": environment(), "rows": rows}, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="default: benchmarks/results/fused.json or fused_growth.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--only", default="", help="substring of the cases to run")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes minutes)")
    parser.add_argument("--no-memory", action="store_true", help="leave the processes that measure memory out")
    parser.add_argument("--growth", action="store_true", help="time against T, batch, width and resolution")
    parser.add_argument("--memory-of", choices=_MEMORY, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_cases(options: argparse.Namespace, path: pathlib.Path) -> None:
    """Measure what was asked for; the file is complete up to the last case at any time."""
    rows = []
    for name, make in cases():
        if options.only in name:
            row = measure(make(), options.repeats, not options.no_compile)
            row["memory_mb"] = memory(name, options.threads) if row["green"] and not options.no_memory else {}
            rows.append(row)
            print(line(row), flush=True)
            save(path, rows)


def main() -> None:
    """Command line."""
    options = parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    results = pathlib.Path("benchmarks/results")
    if options.memory_of:
        make = dict(cases())[options.only]
        print(json.dumps(memory_of(make(), options.memory_of)))
    elif options.growth:
        from . import growth

        growth.run(options, options.out or results / "fused_growth.json")
    else:
        run_cases(options, options.out or results / "fused.json")


if __name__ == "__main__":
    main()
