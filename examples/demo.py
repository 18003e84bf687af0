"""A trained spiking ResNet, dense and accelerated, on real data: same answers, less time, and where it went.

``make demo`` runs it. Prints tables, and writes into ``out/``: ``demo.png``, ``demo.json``, ``demo.md`` and one HTML
report per batch size.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from digits.data import Split, encode, load_split
from digits.evaluate import Answers, Run, compare_answers, profile_by_kind, time_alternately
from digits.net import TIME_STEPS, DigitsResNet, load_checkpoint
from rich.console import Console
from rich.table import Table
from torch import nn

import sparseflow
from sparseflow.env import environment
from sparseflow.report import Report, milliseconds, percent

DENSE, SPARSE = "dense", "sparseflow"
PROFILE_REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One batch size: calls of every run in ms, time by kind of module in ms, and the layers' report."""

    batch_size: int
    times: dict[str, list[float]]
    dense_kinds: dict[str, float]
    sparse_kinds: dict[str, float]
    report: Report

    def quantile(self, name: str, q: float) -> float:
        """Quantile ``q`` of a run's times, in ms."""
        return float(torch.tensor(self.times[name], dtype=torch.float64).quantile(q))

    def speedup(self, name: str) -> float:
        """Median time of the dense run over that of ``name``, both from the same alternation."""
        return self.quantile(DENSE, 0.5) / self.quantile(name, 0.5)

    def time_cells(self, name: str) -> tuple[str, ...]:
        """Batch size, run, median, spread and speedup as text."""
        low, middle, high = (milliseconds(self.quantile(name, q)) for q in (0.2, 0.5, 0.8))
        return str(self.batch_size), name, middle, f"{low} - {high}", f"{self.speedup(name):.2f}x"

    def to_dict(self) -> dict:
        """What ``demo.json`` holds."""
        quantiles = {n: {f"p{round(100 * q)}": self.quantile(n, q) for q in (0.2, 0.5, 0.8)} for n in self.times}
        speedups = {name: self.speedup(name) for name in self.times}
        kinds = {"dense_ms_by_kind": self.dense_kinds, "sparse_ms_by_kind": self.sparse_kinds}
        fields = {"calls": len(self.times[DENSE]), "ms": quantiles, "speedup": speedups}
        return {"batch_size": self.batch_size, **fields, **kinds, "report": self.report.to_dict()}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32], metavar="N")
    parser.add_argument("--images", type=int, default=360, help="use the first so many of the 360 test images")
    parser.add_argument("--calls", type=int, default=40, help="least number of timed calls per run and batch size")
    parser.add_argument("--compile", action="store_true", help="time torch.compile beside it (compiles for minutes)")
    parser.add_argument("--out", type=Path, default=Path("out"))
    return parser.parse_args(argv)


def dense_baselines(with_compile: bool) -> dict[str, Run]:
    """Other ways to run the same network dense."""
    baselines: dict[str, nn.Module] = {"dense, channels_last": load_checkpoint().to(memory_format=torch.channels_last)}
    if with_compile:
        baselines["dense, torch.compile"] = torch.compile(load_checkpoint())
    return {name: (net, contextlib.nullcontext) for name, net in baselines.items()}


def measure(net: DigitsResNet, test: Split, batch_size: int, args: argparse.Namespace) -> Measurement:
    """Accelerate ``net`` for a batch size, time it against the dense runs, and undo."""
    sample = test.images[:batch_size]
    sparseflow.accelerate(net, encode(sample, TIME_STEPS))
    dense: Run = (net, lambda: sparseflow.disabled(net))
    runs = {DENSE: dense, SPARSE: (net, contextlib.nullcontext), **dense_baselines(args.compile)}
    rounds = -(-args.calls // (len(test.images) // batch_size))
    times = time_alternately(runs, test, batch_size, rounds)
    with sparseflow.disabled(net):
        dense_kinds = profile_by_kind(net, sample, PROFILE_REPEATS)
    sparse_kinds = profile_by_kind(net, sample, PROFILE_REPEATS)
    result = Measurement(batch_size, times, dense_kinds, sparse_kinds, sparseflow.report(net))
    sparseflow.restore(net)
    return result


def answers_table(answers: Answers) -> Table:
    table = Table("answers", "", title=f"{answers.images} test images, T = {TIME_STEPS}")
    table.add_row("accuracy, dense", percent(answers.correct_dense / answers.images))
    table.add_row("accuracy, sparseflow", percent(answers.correct_sparse / answers.images))
    table.add_row("predictions that agree", f"{answers.agreeing} of {answers.images}")
    share = answers.flips / max(answers.spikes, 1)
    table.add_row("spike flips", f"{answers.flips} of {answers.outputs:,} outputs ({share:.1e} of the spikes)")
    table.add_row("firing rate of the neurons", percent(answers.spikes / answers.outputs))
    table.add_row("largest logit difference", f"{answers.max_logit_error:.1e}")
    return table


def times_table(measurements: list[Measurement]) -> Table:
    table = Table("batch", "run", title="time per forward call, runs in alternation")
    for heading in ("median ms", "p20 - p80 ms", "speedup"):
        table.add_column(heading, justify="right")
    for m in measurements:
        for name in m.times:
            table.add_row(*m.time_cells(name), style="bold" if name == SPARSE else "")
        table.add_section()
    return table


def remains_table(measurements: list[Measurement]) -> Table:
    table = Table("kind of module", title="where the time goes: ms per call (share)")
    for m in measurements:
        table.add_column(f"batch {m.batch_size}, dense", justify="right")
        table.add_column(f"batch {m.batch_size}, sparseflow", justify="right")
    for kind in measurements[0].dense_kinds:
        cells = [_with_share(kinds, kind) for m in measurements for kinds in (m.dense_kinds, m.sparse_kinds)]
        table.add_row(kind, *cells)
    return table


def _with_share(kinds: dict[str, float], kind: str) -> str:
    return f"{milliseconds(kinds[kind])} ({percent(kinds[kind] / sum(kinds.values()))})"


def draw(measurements: list[Measurement], path: Path) -> None:
    """Per-layer density against crossover, and time dense against sparse, one column per batch size."""
    figure, axes = plt.subplots(2, len(measurements), figsize=(8 * len(measurements), 8), squeeze=False, sharex="col")
    for (density, duration), m in zip(axes.T, measurements, strict=True):
        names = [layer.name for layer in m.report.layers]
        places = range(len(names))
        density.bar(places, [_or_nan(layer.density, 100) for layer in m.report.layers], color="#0072b2")
        crossovers = [_or_nan(layer.crossover, 100) for layer in m.report.layers]
        density.plot(places, crossovers, "_", color="#d55e00", markersize=14, label="crossover")
        density.set(title=f"batch {m.batch_size}, T = {TIME_STEPS}", ylabel="input density (%)")
        density.legend(frameon=False)
        for offset, field, colour in ((-0.2, "dense_ms", "#999999"), (0.2, "sparse_ms", "#0072b2")):
            heights = [_or_nan(getattr(layer, field)) for layer in m.report.layers]
            duration.bar([p + offset for p in places], heights, 0.4, color=colour, label=field.removesuffix("_ms"))
        duration.set(ylabel="time (ms)")
        duration.set_xticks(list(places), names, rotation=90)
        duration.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _or_nan(value: float | None, scale: float = 1.0) -> float:
    return float("nan") if value is None else scale * value


def markdown(measurements: list[Measurement]) -> str:
    """The times as a Markdown table, followed by what they were measured on."""
    lines = ["| batch | run | median ms | p20 - p80 ms | speedup |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(m.time_cells(name))} |" for m in measurements for name in m.times]
    machine = ", ".join(f"{key} {value}" for key, value in environment().items())
    return "\n".join([*lines, "", f"Measured with {machine}.", ""])


def write_files(answers: Answers, measurements: list[Measurement], out: Path) -> list[Path]:
    """Picture, figures, a Markdown table and HTML reports; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    draw(measurements, out / "demo.png")
    record = {"answers": dataclasses.asdict(answers), "environment": environment()}
    record["measurements"] = [m.to_dict() for m in measurements]
    (out / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "demo.md").write_text(markdown(measurements))
    pages = [m.report.to_html(out / f"report-batch{m.batch_size}.html") for m in measurements]
    return [out / "demo.png", out / "demo.json", out / "demo.md", *pages]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 110)
    test = Split(*(part[: args.images] for part in load_split()[1]))
    net = load_checkpoint()

    largest = max(args.batch_sizes)
    sparseflow.accelerate(net, encode(test.images[:largest], TIME_STEPS))
    answers = compare_answers(net, test, largest)
    console.print(answers_table(answers))
    measurements = [measure(net, test, size, args) for size in args.batch_sizes]
    for m in measurements:
        console.rule(f"layers at batch {m.batch_size}")
        console.print(m.report)
    console.print(times_table(measurements), remains_table(measurements), sep="\n")
    versions = environment()
    console.print(", ".join(f"{key} {value}" for key, value in versions.items()), style="dim")
    for path in write_files(answers, measurements, args.out):
        console.print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
