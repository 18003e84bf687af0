"""Predicted time of ResNet-18 and ResNet-50 layers on an H200: dense, and each sparse path at given loads.

    python -m benchmarks.roofline [--out benchmarks/results/roofline.json] [--steps-times-batch 128]

Bytes and operations are counted from the launch parameters of the kernels as they ship (:mod:`.cost` of the Triton
backend); no GPU is needed, and nothing printed here is a measurement. docs/gpu-benchmarks.md shows the table, with what
was measured beside it where ``benchmarks/results/gpu.json`` has it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.layers import LINEAR, LayerShape, resnet18, resnet50
from sparseflow.kernels.base import ConvCall, Refusal
from sparseflow.kernels.geometry import ConvGeometry
from sparseflow.kernels.triton.backend import bind_all
from sparseflow.kernels.triton.cost import H200, dense, predict
from sparseflow.kernels.triton.launch import recording

LOADS = {"occupancy": (0.0, 0.1, 0.34, 0.56, 1.0), "density": (0.001, 0.01, 0.05)}
_SIDE = 224


def kernels(layer: LayerShape, steps_times_batch: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """The kernels that cover the layer, bound to tensors without data.

    Raises:
        ValueError: none does.
    """
    x = torch.empty(layer.x_shape(steps_times_batch), dtype=dtype, device="meta")
    weight = torch.empty(layer.w_shape, dtype=dtype, device="meta")
    if layer.size:
        x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    with recording():
        bound = bind_all(x, weight, layer.call)
    if isinstance(bound, Refusal):
        raise ValueError(f"{layer.name}: {bound.reason}. {bound.detail}")
    return bound


def geometry(layer: LayerShape, steps_times_batch: int) -> ConvGeometry:
    """Geometry of the layer; a linear one is a convolution of images of one pixel."""
    call = layer.call
    if not isinstance(call, ConvCall):
        shapes = (steps_times_batch, layer.c_in, 1), (layer.c_out, layer.c_in, 1)
        return ConvGeometry.from_call(*shapes, (1,), (0,), (1,), 1)
    x_shape = layer.x_shape(steps_times_batch)
    return ConvGeometry.from_call(x_shape, layer.w_shape, call.stride, call.padding, call.dilation, 1)


def rows(layer: LayerShape, steps_times_batch: int, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Dense, then every kernel at every load with the variant that is predicted fastest."""
    floor = dense(geometry(layer, steps_times_batch), dtype)
    shared = {"layer": layer.name, "dtype": str(dtype).removeprefix("torch."), "steps_times_batch": steps_times_batch}
    yield shared | {"path": "dense", "load": 1.0, **_figures(floor), "speedup": 1.0}
    for kernel in kernels(layer, steps_times_batch, dtype):
        for load in LOADS[kernel.axis]:
            found = {variant: predict(kernel, variant, load) for variant in kernel.variants()}
            variant = min(found, key=lambda name: found[name].ms)
            figures = _figures(found[variant]) | {"speedup": round(floor.ms / found[variant].ms, 3)}
            yield shared | {"path": str(kernel.path), "variant": variant, "axis": kernel.axis, "load": load} | figures


def _figures(prediction: Any) -> dict[str, Any]:
    return {
        "bytes": round(prediction.bytes),
        "flops": round(prediction.flops),
        "ms": round(prediction.ms, 6),
        "bound": prediction.bound,
    }


def every_row(steps_times_batch: int) -> Iterator[dict[str, Any]]:
    """All layers: the networks' in float16 and, of ResNet-18, float32; linear ones at T*N = 1."""
    small = resnet18(_SIDE)
    for layer in (*small, *(layer for layer in resnet50(_SIDE) if layer not in small)):
        yield from rows(layer, steps_times_batch, torch.float16)
    for layer in small:
        yield from rows(layer, steps_times_batch, torch.float32)
    for layer in LINEAR:
        yield from rows(layer, 1, torch.float16)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/roofline.json"))
    parser.add_argument("--steps-times-batch", type=int, default=128)
    options = parser.parse_args()
    found = list(every_row(options.steps_times_batch))
    for row in found:
        where = f"{row['path']:6} at {row['load']:6.1%}"
        print(
            f"{row['layer']:28} {row['dtype']:8} {where} {row['ms']:.4f} ms, {row['speedup']:6.2f}x, "
            f"{row['bytes'] / 1e6:8.1f} MB, {row['flops'] / 1e9:7.2f} GFLOP, bound by {row['bound']}"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"schema": 1, "predicted": True, "machine": dataclasses.asdict(H200), "rows": found}
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
