"""Measure on one GPU, in less than nine minutes, and go on where an earlier run stopped.

    python -m benchmarks.gpu --out DIR [--device N] [--budget-s 520] [--only TEXT] [--list]

Writes a line an event to DIR/records.jsonl and all rows to DIR/gpu.json. A rerun with the same commit, kernels, GPU and
versions measures only what is missing. Exit code 2 where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Sequence

import torch

from sparseflow.bench.gpus import pick, visible

from . import blocks, experiments, models, suite, sweep
from .identity import identity
from .records import Journal
from .runner import Budget, Cell, ordered, run_cells
from .summary import collect, tell
from .supervisor import supervise
from .timing import CudaTimer, Timer

_RESTART = 75


def cells(timer: Timer, device: torch.device, only: str = "") -> list[Cell]:
    """Everything there is to measure whose name contains ``only``, the most important first."""
    stages = (suite.cells(), *(stage.cells(timer, device) for stage in (experiments, sweep, blocks, models)))
    return [cell for cell in ordered([cell for stage in stages for cell in stage]) if only in cell.name]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = _parser().parse_args(argv)
    if options.list:
        for cell in cells(CudaTimer(), torch.device("cpu"), options.only):
            print(f"{cell.priority} {cell.seconds:5.0f} s  {cell.name}")
        return 0
    try:
        device = pick(visible(), options.device)
    except ValueError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    journal = Journal(options.out / "records.jsonl", identity(device, options.commit))
    if options.worker:
        return _work(options, device, journal)
    budget = Budget(options.budget_s)
    run = f"{time.time():.0f}-{os.getpid()}"
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(options.out), "--worker", run]
    command += ["--device", str(device), "--commit", options.commit, "--only", options.only]
    supervise(command, journal, budget, run)
    print(tell(collect(journal, options.out / "gpu.json")))
    return 0


def _work(options: argparse.Namespace, device: int, journal: Journal) -> int:
    """Run cells in this process; exit code ``_RESTART`` asks for another one."""
    warnings.simplefilter("ignore")
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    target = torch.device("cuda", device)
    usable = run_cells(cells(CudaTimer(), target, options.only), journal, Budget(options.budget_s), options.worker)
    return 0 if usable else _RESTART


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/gpu"), metavar="DIR")
    parser.add_argument("--device", type=int, help="index of the GPU (default: the idle one with the most free memory)")
    parser.add_argument("--budget-s", type=float, default=520.0, help="seconds in all (default: %(default)s)")
    parser.add_argument("--only", default="", help="only cells whose name contains this")
    parser.add_argument("--commit", default="", help="name of the commit, where there is no git checkout")
    parser.add_argument("--list", action="store_true", help="print the cells in their order and stop")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
