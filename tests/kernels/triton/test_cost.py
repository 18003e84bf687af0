"""The cost model counts what the launches say, and agrees with figures worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import roofline
from benchmarks.gpu.layers import LINEAR, LayerShape, resnet18, resnet50
from sparseflow.kernels.geometry import ConvGeometry
from sparseflow.kernels.triton.cost import H200, Prediction, Stage, combined, dense, predict
from sparseflow.kernels.triton.launch import recording

HALF, SINGLE = torch.float16, torch.float32
ROOT = pathlib.Path(__file__).parents[3]


def layer(name: str) -> LayerShape:
    return next(found for found in (*resnet18(224), *resnet50(224), *LINEAR) if found.name == name)


def predictions(name: str, load: float, dtype: torch.dtype = HALF, batch: int = 128) -> dict[str, Prediction]:
    kernels = roofline.kernels(layer(name), batch, dtype)
    return {str(kernel.path): predict(kernel, kernel.variants()[0], load) for kernel in kernels}


@pytest.mark.parametrize(
    ("name", "gflop", "megabytes", "microseconds"),
    [
        ("3x3 64@56", 29.6, 103, None),
        ("3x3 128@28", 29.6, 52, None),
        ("3x3 256@14", 29.6, 27, None),
        ("1x1 64->256@56", 13.2, 257, 61),
        ("1x1 256->64@56", 13.2, 257, 61),
        ("1x1 128->512@28", 13.2, 129, 31),
    ],
)
def test_dense_layers_cost_what_was_worked_out_by_hand(name, gflop, megabytes, microseconds):
    found = dense(roofline.geometry(layer(name), 128), HALF)
    assert found.flops / 1e9 == pytest.approx(gflop, rel=0.01)
    assert found.bytes / 1e6 == pytest.approx(megabytes, rel=0.02)
    if microseconds is None:
        assert found.bound == "tensor"
    else:
        assert (found.bound, 1e3 * found.ms) == ("memory", pytest.approx(microseconds, rel=0.03))


def test_reading_the_active_rows_of_a_large_linear_layer_is_worth_the_goal():
    rows = LINEAR[0]
    event = predictions(rows.name, 0.05, batch=1)["event"]
    assert event.bytes == pytest.approx(0.05 * 25088 * 4096 * 2, rel=0.05)
    assert dense(roofline.geometry(rows, 1), HALF).ms / event.ms > 5


def test_a_silent_layer_still_reads_its_input_and_writes_its_output():
    found = predictions("3x3 64@56", 0.0)["tile"]
    assert found.flops == 0
    assert found.bytes == pytest.approx(2 * 128 * 64 * 56 * 56 * 2, rel=0.01)


def test_full_occupancy_computes_at_least_what_dense_does():
    geometry = roofline.geometry(layer("3x3 64@56"), 128)
    tile = predictions("3x3 64@56", 1.0)["tile"]
    assert tile.flops >= dense(geometry, HALF).flops
    two_parts = predictions("3x3 64@56", 1.0, SINGLE)["tile"]
    assert two_parts.flops >= 2 * dense(geometry, SINGLE).flops


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from([found.name for found in (*resnet18(224), *resnet50(224))]),
    low=st.floats(0, 1),
    high=st.floats(0, 1),
    dtype=st.sampled_from([HALF, SINGLE]),
)
def test_more_spikes_never_cost_less(name, low, high, dtype):
    low, high = sorted((low, high))
    few, many = (predictions(name, load, dtype) for load in (low, high))
    for path in few:
        assert few[path].ms <= many[path].ms * (1 + 1e-9)
        assert few[path].flops <= many[path].flops * (1 + 1e-9)


def test_the_grids_counted_are_the_grids_launched():
    for name in ("3x3 64@56", "1x1 64->128@56 stride 2", "3x3 512@7"):
        shape = layer(name)
        x = torch.empty(shape.x_shape(128), dtype=HALF, device="meta").to(memory_format=torch.channels_last)
        weight = torch.empty(shape.w_shape, dtype=HALF, device="meta")
        for kernel in roofline.kernels(shape, 128, HALF):
            if kernel.axis == "density":
                continue
            for variant in kernel.variants():
                with recording() as launches:
                    kernel.compute(x, kernel.prescan(x, variant), kernel.pack(weight, variant), None, variant)
                stages = predict(kernel, variant, 0.3).stages
                assert [stage.programs for stage in stages] == [launch.grid[0] for launch in launches]


def test_depthwise_skips_what_is_empty():
    call = roofline.ConvCall((1, 1), ((1, 1), (1, 1)), (1, 1), 384)
    x, weight = (torch.empty(s, dtype=HALF, device="meta") for s in ((4, 384, 14, 14), (384, 1, 3, 3)))
    with recording():
        (kernel,) = roofline.bind_all(x, weight, call)
    empty, full = (predict(kernel, kernel.variants()[0], load) for load in (0.0, 1.0))
    geometry = ConvGeometry.from_call(x.shape, weight.shape, (1, 1), (1, 1), (1, 1), 384)
    assert empty.flops == 0
    assert full.flops >= dense(geometry, HALF).flops


def test_a_stage_takes_as_long_as_what_limits_it():
    moving, computing = Stage("a", memory=4.3e9), Stage("b", memory=1.0, tensor=790e9 * 2)
    assert combined((moving,), H200).bound == "memory"
    assert combined((moving, computing), H200) == dataclasses.replace(
        combined((moving, computing), H200), bound="tensor", ms=pytest.approx(1.0015 + 2.0015)
    )
    few = dataclasses.replace(computing, programs=H200.multiprocessors // 2)
    assert combined((few,), H200).ms == pytest.approx(4.0015)


def test_the_model_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match="object"):
        predict(object(), "v", 0.1)  # type: ignore[arg-type]


def test_the_committed_predictions_are_those_of_the_kernels_as_they_are():
    committed = json.loads((ROOT / "benchmarks/results/roofline.json").read_text())
    assert committed["machine"] == dataclasses.asdict(H200)
    assert committed["rows"] == list(roofline.every_row(128)), "run python -m benchmarks.roofline and .tables"
