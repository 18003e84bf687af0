"""Density sweep over twenty layer shapes: dense, sparse and dispatched, in alternation, prescan inside the timer.

    python -m benchmarks.density_sweep [--out benchmarks/results/density_sweep.json] [--quick]

``dense`` is the layer as the user wrote it; ``best dense`` the fastest of that, channels-last, and oneDNN with its
weight reordered ahead of time; ``regret`` how much slower the dispatched layer is than the better of dense and sparse.
Input and output are contiguous for sparse and dispatched, as SpikingJelly's multi-step layers pass them. Every run gets
another input each round, and finds caches through which 8 MB were swept, as in a model. No figure is kept for a case
that fails its error budget.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import statistics
import warnings

import torch
from torch import nn

from benchmarks.shapes import DENSITIES, SHAPES, Shape
from sparseflow.bench.compare import alternate, quantiles
from sparseflow.dispatch.measure import sweep_caches
from sparseflow.dispatch.runtime import LayerRuntime, RuntimeConfig
from sparseflow.env import environment
from sparseflow.kernels.base import LinearCall
from sparseflow.kernels.reference import excess
from sparseflow.modules.swap import _cached_conv_call, runtime_of, swap
from sparseflow.plan import LayerPlan, Path, Provenance, Reason

_INPUTS = 4


def swapped(layer: nn.Module, mode: str) -> nn.Module:
    """A copy of ``layer`` that runs sparse as ``mode`` says."""
    twin = copy.deepcopy(layer)
    plan = LayerPlan("layer", type(layer).__name__.lower(), Path.DENSE, Reason.NOT_MEASURED, Provenance.BINARY)
    swap(twin, LayerRuntime(plan, RuntimeConfig(mode=mode)))
    return twin


def prepacked(layer: nn.Module, inputs: list[torch.Tensor], dtype: torch.dtype) -> Rotating | None:
    """oneDNN with its weight reordered ahead of time, as a frozen inductor graph runs it; 2-d layers and linear."""
    ops, weight, bias = torch.ops.mkldnn, layer.weight.detach().to(dtype), layer.bias.detach().to(dtype)
    if isinstance(layer, nn.Linear):
        packed = ops._reorder_linear_weight(weight, inputs[0].shape[0])
        return Rotating(lambda x: ops._linear_pointwise(x, packed, bias, "none", [], ""), [x.to(dtype) for x in inputs])
    if not isinstance(layer, nn.Conv2d):
        return None
    arguments = (layer.padding, layer.stride, layer.dilation, layer.groups)
    last = [x.to(dtype, memory_format=torch.channels_last) for x in inputs]
    packed = ops._reorder_convolution_weight(
        weight.to(memory_format=torch.channels_last), *arguments, list(inputs[0].shape)
    )
    return Rotating(lambda x: ops._convolution_pointwise(x, packed, bias, *arguments, "none", [], ""), last)


class Rotating:
    """Runs a layer on another input at every call: a user never sends the same spikes twice."""

    def __init__(self, layer, inputs):
        self.layer, self.inputs, self.turn = layer, inputs, 0

    def __call__(self):
        self.turn = (self.turn + 1) % len(self.inputs)
        return self.layer(self.inputs[self.turn])


def dense_runs(layer: nn.Module, inputs: list[torch.Tensor]) -> dict[str, Rotating]:
    """The dense competitors of one layer, each on its own best layout and dtype."""
    runs = {"dense": Rotating(layer, inputs)}
    runs["bf16"] = Rotating(copy.deepcopy(layer).bfloat16(), [x.bfloat16() for x in inputs])
    if isinstance(layer, nn.Conv2d):
        last = [x.to(memory_format=torch.channels_last) for x in inputs]
        runs["channels_last"] = Rotating(copy.deepcopy(layer).to(memory_format=torch.channels_last), last)
    packed = {"prepacked": torch.float32, "bf16 prepacked": torch.bfloat16}
    more = {name: prepacked(layer, inputs, dtype) for name, dtype in packed.items()}
    return runs | {name: run for name, run in more.items() if run is not None}


def case(shape: Shape, density: float, layers, repeats: int) -> dict:
    """Times of one layer at one density, in ms, and whether its results are right."""
    generator = torch.Generator().manual_seed(int(density * 1e6))
    inputs = [(torch.rand(shape.size, generator=generator) < density).float() for _ in range(_INPUTS)]
    plain, sparse, auto = layers
    with torch.no_grad():
        call = LinearCall() if isinstance(plain, nn.Linear) else _cached_conv_call(sparse)
        error = max(excess(sparse(x), x, plain.weight, plain.bias, call) for x in inputs[:2])
        runs = dense_runs(plain, inputs)
        runs |= {"sparse": Rotating(sparse, inputs), "dispatched": Rotating(auto, inputs)}
        alternate(runs, 2)
        times = {name: quantiles(values) for name, values in alternate(runs, repeats, sweep_caches).items()}
    row = {"shape": shape.name, "density": density, "error_in_budgets": error, "correct": error <= 1.0}
    return {**row, "ms": times, **ratios(times)} if row["correct"] else row


def ratios(times: dict[str, tuple[float, float, float]]) -> dict[str, float]:
    """Speedups over the named baselines and the dispatcher's regret, from medians."""
    median = {name: value[1] for name, value in times.items()}
    fp32 = min(median[name] for name in ("dense", "channels_last", "prepacked") if name in median)
    bf16 = min(ms for name, ms in median.items() if name.startswith("bf16"))
    return {
        "best_dense_ms": fp32,
        "best_bf16_ms": bf16,
        "sparse_over_best_dense": fp32 / median["sparse"],
        "sparse_over_bf16": bf16 / median["sparse"],
        "regret": median["dispatched"] / min(median["dense"], median["sparse"]) - 1.0,
    }


def sweep(shape: Shape, densities, repeats: int) -> list[dict]:
    """All densities of one shape."""
    plain = shape.layer()
    example = (torch.rand(shape.size) < 0.1).float()
    layers = (plain, swapped(plain, "sparse"), swapped(plain, "auto"))
    with torch.no_grad():
        layers[2](example)
    crossover = runtime_of(layers[2]).last_site.policy.crossover
    rows = [case(shape, density, layers, repeats) for density in densities]
    for row in rows:
        row |= {"crossover_used": crossover.density, "variant": crossover.variant}
        print(_line(row), flush=True)
    return rows


def _line(row: dict) -> str:
    if not row["correct"]:
        return f"{row['shape']:28} {row['density']:6.1%}  WRONG: {row['error_in_budgets']:.2g} budgets"
    ms = {name: value[1] for name, value in row["ms"].items()}
    return (
        f"{row['shape']:28} {row['density']:6.1%}  best dense {row['best_dense_ms']:7.3f}  sparse {ms['sparse']:7.3f}"
        f"  {row['sparse_over_best_dense']:6.2f}x  bf16 {row['sparse_over_bf16']:6.2f}x"
        f"  dispatched {ms['dispatched']:7.3f}  regret {row['regret']:+6.1%}  crossover {row['crossover_used']:.1%}"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/density_sweep.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", default="", help="substring of the shapes to run")
    parser.add_argument("--quick", action="store_true", help="three densities, three repeats")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    densities, repeats = ((0.01, 0.1, 0.5), 3) if options.quick else (DENSITIES, options.repeats)
    rows = [row for shape in SHAPES if options.only in shape.name for row in sweep(shape, densities, repeats)]
    regrets = [row["regret"] for row in rows if row["correct"]]
    summary = {"cases": len(rows), "wrong": sum(not row["correct"] for row in rows)}
    summary |= {"median_regret": statistics.median(regrets), "worst_regret": max(regrets)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    payload = {"schema": 1, "environment": environment(), "summary": summary, "rows": rows}
    options.out.write_text(json.dumps(payload, indent=1))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
