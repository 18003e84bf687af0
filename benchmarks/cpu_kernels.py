"""The native CPU kernels against PyTorch's best dense layers, without modules, dispatch or autograd around them.

    python -m benchmarks.cpu_kernels [--out benchmarks/results/cpu_kernels.json] [--inductor] [--threads 2]

Sparse time is prescan plus kernel, from float32 (or bfloat16) spikes to the finished output; the fastest of the
engine's variants counts, as the dispatcher would choose it. Dense is the fastest of eager and prepacked (oneDNN), with
``--inductor`` also a frozen compiled layer; bfloat16 dense is timed too. All contenders of a case take turns; a turn is
one call on each of four inputs, the first of them not counted. A case outside its float64 error budget has no figures.
Ratios compare the fastest times seen on both sides, in ms, which is what repeats on a shared machine; the 20, 50 and
80 % quantiles are in the file. The first calls of the turns are there too ("cold"): the other contenders have then just
pushed the layer's weights out of the caches, as the rest of a large net does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sparseflow.bench.compare import quantiles
from sparseflow.env import environment
from sparseflow.kernels.base import Call, ConvCall, LinearCall
from sparseflow.kernels.cpu import engine
from sparseflow.kernels.reference import excess

DENSITIES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
INPUTS = 4
Run = Callable[[int], Tensor]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer, its input size, and the speedups over dense float32 it should reach, by density."""

    name: str
    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    goals: dict[float, float] = dataclasses.field(default_factory=dict)
    channels_last: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def call(self) -> Call:
        if len(self.w_shape) == 2:
            return LinearCall()
        pad = self.w_shape[2] // 2
        return ConvCall((1, 1), ((pad, pad), (pad, pad)), (1, 1), 1)


def _conv(name: str, c_in: int, c_out: int, side: int, kernel: int, **options) -> Layer:
    return Layer(name, (4, c_in, side, side), (c_out, c_in, kernel, kernel), **options)


LAYERS = (
    _conv("3x3 64@56", 64, 64, 56, 3, goals={0.01: 6.0, 0.1: 3.5}),
    _conv("3x3 128@28", 128, 128, 28, 3, goals={0.01: 16.0, 0.1: 5.0}),
    _conv("3x3 256@14", 256, 256, 14, 3, goals={0.01: 18.0, 0.1: 4.5}),
    _conv("3x3 512@7", 512, 512, 7, 3, goals={0.01: 20.0, 0.1: 5.0}),
    _conv("1x1 256->64@56", 256, 64, 56, 1),
    _conv("1x1 64->256@56", 64, 256, 56, 1),
    _conv("3x3 64@56 NCHW", 64, 64, 56, 3, channels_last=False),
    _conv("3x3 32@32 NCHW", 32, 32, 32, 3, channels_last=False),
    _conv("3x3 256@14 bf16", 256, 256, 14, 3, dtype=torch.bfloat16),
    Layer("linear 4096, T*N 1", (1, 4096), (4096, 4096), {0.05: 20.0}),
    Layer("linear 4096, T*N 4", (4, 4096), (4096, 4096)),
    Layer("linear 4096, T*N 32", (32, 4096), (4096, 4096)),
)


def prepacked(layer: Layer, weight: Tensor, bias: Tensor, xs: list[Tensor]) -> Run:
    """oneDNN with its weight reordered ahead of time, as a frozen inductor graph runs it."""
    ops = torch.ops.mkldnn
    if isinstance(layer.call, LinearCall):
        packed = ops._reorder_linear_weight(weight, xs[0].shape[0])
        return lambda i: ops._linear_pointwise(xs[i], packed, bias, "none", [], "")
    pad, ones = [p for p, _ in layer.call.padding], [1, 1]
    packed = ops._reorder_convolution_weight(weight, pad, ones, ones, 1, list(xs[0].shape))
    return lambda i: ops._convolution_pointwise(xs[i], packed, bias, pad, ones, ones, 1, "none", [], "")


def frozen(layer: Layer, weight: Tensor, bias: Tensor, xs: list[Tensor]) -> Run:
    """The layer compiled by inductor with its weight folded into the graph."""
    import torch._inductor.config as inductor

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

        def forward(self, x):
            return layer.call.dense(x, self.weight, self.bias)

    with inductor.patch(freezing=True):
        torch._dynamo.reset()
        compiled = torch.compile(Module().eval())
        compiled(xs[0])
    return lambda i: compiled(xs[i])


def dense_runs(layer: Layer, weight: Tensor, bias: Tensor, xs: list[Tensor], inductor: bool) -> dict[str, Run]:
    """The dense contenders in the layer's dtype and in bfloat16."""
    runs: dict[str, Run] = {}
    if len(layer.w_shape) == 4:
        weight = weight.to(memory_format=torch.channels_last)
        xs = [x.to(memory_format=torch.channels_last) for x in xs]
    for label, dtype in (("dense", layer.dtype), ("bf16", torch.bfloat16)):
        w, b, inputs = weight.to(dtype), bias.to(dtype), [x.to(dtype) for x in xs]
        runs[f"{label} eager"] = lambda i, w=w, b=b, inputs=inputs: layer.call.dense(inputs[i], w, b)
        runs[f"{label} prepacked"] = prepacked(layer, w, b, inputs)
    if inductor:
        runs["dense inductor"] = frozen(layer, weight, bias, xs)
    return runs


def sparse_runs(layer: Layer, weight: Tensor, bias: Tensor, xs: list[Tensor]) -> dict[str, Run]:
    """Prescan and kernel for every variant, and the prescan alone."""
    runs: dict[str, Run] = {}
    if isinstance(layer.call, LinearCall):
        for v in engine.linear_variants(xs[0].shape[0], weight.shape[1], weight.shape[0], layer.dtype):
            packed = engine.pack_linear_weight(weight, v)
            runs[f"sparse {v.name}"] = lambda i, packed=packed, v=v: engine.linear(
                xs[i], engine.prescan_linear(xs[i]), packed, bias, v
            )
        runs["prescan"] = lambda i: engine.prescan_linear(xs[i]).bits
        return runs
    pad = [p for p, _ in layer.call.padding]
    geometry = engine.ConvGeometry.from_call(xs[0].shape, weight.shape, (1, 1), pad, (1, 1), 1)
    for v in engine.conv_variants(geometry, layer.dtype):
        packed = engine.pack_conv_weight(weight, 1, v)
        runs[f"sparse {v.name}"] = lambda i, packed=packed, v=v: engine.conv(
            xs[i], engine.prescan_conv(xs[i], geometry), packed, bias, geometry, v, channels_last=layer.channels_last
        )
    runs["prescan"] = lambda i: engine.prescan_conv(xs[i], geometry).bits
    return runs


def measure(layer: Layer, density: float, inductor: bool, repeats: int) -> dict:
    """All contenders of one layer at one density."""
    torch.manual_seed(0)
    weight = (torch.randn(layer.w_shape) / torch.Size(layer.w_shape[1:]).numel() ** 0.5).to(layer.dtype)
    bias = torch.randn(layer.w_shape[0]).to(layer.dtype)
    xs = [(torch.rand(layer.x_shape) < density).to(layer.dtype) for _ in range(INPUTS)]
    if layer.channels_last and len(layer.x_shape) == 4:
        xs = [x.to(memory_format=torch.channels_last) for x in xs]
    sparse = sparse_runs(layer, weight, bias, xs)
    for name, run in sparse.items():
        if name != "prescan" and excess(run(0), xs[0], weight, bias, layer.call) > 1:
            raise AssertionError(f"{layer.name} at {density}: {name} is outside its error budget")
    runs = dense_runs(layer, weight, bias, xs, inductor) | sparse
    times: dict[str, list[float]] = {name: [] for name in runs}
    cold: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            cold[name].append(milliseconds(run, 0))
            times[name] += [milliseconds(run, i) for i in range(1, INPUTS)]
    return {name: (min(times[name]), *quantiles(times[name]), min(cold[name])) for name in runs}


def milliseconds(run: Run, i: int) -> float:
    """Wall time of one call on input ``i``."""
    start = time.perf_counter_ns()
    run(i)
    return (time.perf_counter_ns() - start) / 1e6


def summary(layer: Layer, density: float, times: dict) -> dict:
    """The best of each kind, and their ratios."""
    best = {
        kind: min((q[0], name) for name, q in times.items() if name.startswith(kind))
        for kind in ("dense", "bf16", "sparse")
    }
    return {
        "layer": layer.name,
        "density": density,
        "dense_ms": best["dense"][0],
        "bf16_ms": best["bf16"][0],
        "sparse_ms": best["sparse"][0],
        "prescan_ms": times["prescan"][0],
        "variant": best["sparse"][1].removeprefix("sparse "),
        "speedup": best["dense"][0] / best["sparse"][0],
        "speedup_cold": min(q[-1] for name, q in times.items() if name.startswith("dense"))
        / times[best["sparse"][1]][-1],
        "speedup_bf16": best["bf16"][0] / best["sparse"][0],
        "goal": layer.goals.get(density),
        "times_min_p20_p50_p80_cold": times,
    }


def show(row: dict) -> None:
    goal = (
        ""
        if row["goal"] is None
        else f"  goal {row['goal']:.1f}: {'ok' if row['speedup'] >= row['goal'] else 'MISSED'}"
    )
    print(
        f"{row['layer']:20} {row['density']:6.1%}  dense {row['dense_ms']:7.3f}  bf16 {row['bf16_ms']:7.3f}  "
        f"sparse {row['sparse_ms']:7.3f} (prescan {row['prescan_ms']:.3f})  {row['speedup']:5.1f}x "
        f"(cold {row['speedup_cold']:.1f}x)  bf16 "
        f"{row['speedup_bf16']:5.1f}x  {row['variant']}{goal}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--inductor", action="store_true", help="also time a compiled, frozen layer (slow to start)")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layer", default="", help="only layers whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    with torch.inference_mode():
        for layer in (layer for layer in LAYERS if options.layer in layer.name):
            for density in DENSITIES:
                rows.append(summary(layer, density, measure(layer, density, options.inductor, options.repeats)))
                show(rows[-1])
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
