"""Whole models, dense and accelerated, in alternation on real data, against the strongest dense baselines.

    python -m benchmarks.end_to_end [--out benchmarks/results/end_to_end.json] [--no-compile] [--only NAME]

Baselines, all multi-step (every T in one call): ``eager`` as the user wrote it, ``eager channels_last``, ``compiled``
(``torch.compile`` with inductor freezing: batch norm folded, weights prepacked) in fp32 and bf16. ``sparseflow`` is the
accelerated eager model, ``sparseflow compiled`` the same under ``torch.compile``. Compiling takes a minute a case and
is done for the digits net at batch 1. The digits net is trained; the ResNet-18 is a stand-in with random weights
that fires like a trained one (:mod:`benchmarks.stand_ins`), labelled as such.
The gate: every sparse layer inside its float64 error budget, and the share of equal predictions is printed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import warnings
from collections.abc import Iterator

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model import spiking_resnet
from torch import Tensor, nn

import sparseflow
from sparseflow.bench.compare import alternate, quantiles
from sparseflow.env import environment

from .baselines import Call, Case, baselines, compiled, fresh_compiler
from .stand_ins import activity, fire_like_trained

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

from digits.data import encode, load_split
from digits.net import TIME_STEPS, load_checkpoint

_INPUTS = 4


def digits(batch: int) -> Case:
    """The trained digits net on test images."""
    images = load_split()[1].images[: _INPUTS * batch]
    inputs = tuple(encode(part, TIME_STEPS) for part in images.split(batch))
    return Case(f"digits resnet18 @32, batch {batch}", "trained", load_checkpoint, inputs, compiled=batch == 1)


def stand_in_resnet18(batch: int, side: int) -> Case:
    """SpikingJelly's spiking_resnet18 at random weights, on smooth random images."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(_INPUTS * batch, 3, side // 8, side // 8, generator=generator)
    images = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    inputs = tuple(encode(part, TIME_STEPS) for part in images.split(batch))
    return Case(
        f"spiking_resnet18 @{side}, batch {batch}",
        activity(),
        lambda: _resnet18(inputs[0]),
        inputs,
        compiled=False,
    )


def _resnet18(x: Tensor) -> nn.Module:
    torch.manual_seed(0)
    net = spiking_resnet.spiking_resnet18(
        spiking_neuron=neuron.LIFNode, surrogate_function=surrogate.ATan(), detach_reset=True, num_classes=10
    )
    functional.set_step_mode(net, "m")
    return fire_like_trained(net, x)


def run(case: Case, repeats: int, with_compile: bool) -> dict:
    """Times in ms, answers and the report of one case."""
    fresh_compiler()
    net = sparseflow.accelerate(case.build(), case.inputs[0], fuse=False)
    with torch.no_grad():
        with sparseflow.verify(net) as watch:
            ours = [_logits(net, x) for x in case.inputs]
        with sparseflow.disabled(net):
            dense = [_logits(net, x) for x in case.inputs]
        agreement = float((torch.cat(ours).argmax(1) == torch.cat(dense).argmax(1)).float().mean())
        runs = {name: Call(other, case.inputs, dtype) for name, other, dtype in baselines(case, with_compile)}
        runs["sparseflow"] = Call(net, case.inputs, torch.float32)
        if with_compile:
            twin = sparseflow.accelerate(case.build(), case.inputs[0], fuse=False)
            runs["sparseflow compiled"] = Call(compiled(twin, case.inputs[0]), case.inputs, torch.float32)
        alternate(runs, 3)
        times = {name: quantiles(values) for name, values in alternate(runs, repeats).items()}
    row = {"case": case.name, "activity": case.activity, "T": case.inputs[0].shape[0]}
    row |= {"checked_layers": watch.checked, "worst_error_in_budgets": watch.worst, "agreement": agreement}
    report = sparseflow.report(net).to_dict()
    return {**row, "ms": times, "report": report}


def _logits(net: nn.Module, x: Tensor) -> Tensor:
    functional.reset_net(net)
    return net(x).mean(0)


def cases() -> Iterator[Case]:
    """Everything that is timed."""
    for batch in (1, 8, 32):
        yield digits(batch)
    for batch, side in ((1, 64), (1, 160)):
        yield stand_in_resnet18(batch, side)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/end_to_end.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--only", default="", help="substring of the cases to run")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes minutes)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    rows = []
    for case in cases():
        if options.only in case.name:
            row = run(case, options.repeats, case.compiled and not options.no_compile)
            rows.append(row)
            medians = ", ".join(f"{name} {ms[1]:.2f}" for name, ms in row["ms"].items())
            print(f"{row['case']:36} ms: {medians}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"schema": 1, "environment": environment(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
