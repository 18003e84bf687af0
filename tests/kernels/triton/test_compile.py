"""What the compiler makes of the kernels for GPUs that are not there: matrix instructions, copies, registers, memory.

Everything is compiled in a process of its own, since the tests run in Triton's interpreter.
"""

from __future__ import annotations

import functools
import types

import pytest
import torch

from sparseflow.kernels.triton.compile import TARGETS, compile_launch, covering, distinct, loop_lines, signature
from sparseflow.kernels.triton.launch import Launch

NVIDIA = ("sm_80", "sm_90", "sm_100")
MATRIX = {"sm_80": ("mma.sync",), "sm_90": ("wgmma",), "sm_100": ("tcgen05.mma", "mma.sync"), "gfx942": ("mfma",)}
PRODUCTS = ("_tile_gemm", "_pruned_gemm")
SHARED = {"sm_80": 99 * 1024, "sm_90": 163 * 1024, "sm_100": 163 * 1024, "gfx942": 64 * 1024}
REGISTER_FILE = 64 * 1024


def rows(report: dict, target: str, kernel: str = "") -> list[dict]:
    if target in report["unsupported"]:
        pytest.skip(report["unsupported"][target])
    found = [row for row in report["compiled"] if row["target"] == target and row["kernel"].startswith(kernel)]
    assert found, f"no {kernel or 'kernel'} was compiled for {target}"
    return found


def tile_rows(row: dict) -> int:
    return functools.reduce(lambda product, axis: product * row["constants"][f"TILE_{axis}"], "DHW", 1)


def test_every_kernel_compiles(report):
    assert not report["failed"]


@pytest.mark.parametrize("target", NVIDIA)
def test_no_kernel_spills_or_uses_local_memory(report, target):
    assert [row for row in rows(report, target) if row["stack"] or row["local"]] == []


@pytest.mark.parametrize("target", TARGETS)
def test_registers_and_shared_memory_are_within_budget(report, target):
    found = rows(report, target)
    assert max(row["shared"] for row in found) <= SHARED[target]
    if target in NVIDIA:
        assert max(row["registers"] * 32 * row["warps"] for row in found) <= REGISTER_FILE


@pytest.mark.parametrize("kernel", PRODUCTS)
@pytest.mark.parametrize("target", TARGETS)
def test_tiles_of_64_rows_are_multiplied_by_matrix_units(report, target, kernel):
    large = [row for row in rows(report, target, kernel) if tile_rows(row) >= 64]
    assert large
    for row in large:
        assert any(row["in_loop"][name] for name in MATRIX[target]), row


@pytest.mark.parametrize("kernel", PRODUCTS)
@pytest.mark.parametrize("target", NVIDIA)
def test_tiles_of_16_rows_are_multiplied_by_matrix_units(report, target, kernel):
    small = [row for row in rows(report, target, kernel) if tile_rows(row) < 64]
    assert small
    assert all(row["in_loop"]["mma.sync"] for row in small)


@pytest.mark.parametrize("kernel", PRODUCTS)
def test_wgmma_covers_every_dtype_and_the_parts_of_float32(report, kernel):
    large = [row for row in rows(report, "sm_90", kernel) if tile_rows(row) >= 64 and row["counts"]["wgmma"]]
    kinds = {(row["dtypes"][0], row["constants"]["PARTS"]) for row in large}
    assert kinds >= {("float16", 1), ("bfloat16", 1), ("float32", 2), ("float32", 3)}


@pytest.mark.parametrize("target", NVIDIA)
def test_copies_are_asynchronous_inside_the_loop_over_channels(report, target):
    for row in rows(report, target, "_tile_gemm"):
        assert row["in_loop"]["cp.async"] >= 2, row


@pytest.mark.parametrize("target", NVIDIA)
def test_blocks_of_a_pruned_weight_are_copied_asynchronously(report, target):
    """And the input too, where its channels are innermost and a multiple of 8."""
    found = rows(report, target, "_pruned_gemm")
    assert all(row["in_loop"]["cp.async"] for row in found)
    assert any(row["in_loop"]["cp.async"] > 1 for row in found)


@pytest.mark.parametrize("target", NVIDIA)
def test_event_kernels_read_weight_rows_ahead(report, target):
    for row in rows(report, target, "_add_rows"):
        assert row["in_loop"]["cp.async"] or row["in_loop"]["ld.global.v4"], row


def _launch(name: str = "kernel", **arguments) -> Launch:
    return Launch(types.SimpleNamespace(__name__=name), (1,), arguments, {"BLOCK": 16}, 4, 2)


def test_launches_that_triton_specialises_alike_share_a_signature():
    x, y = (torch.empty(size, dtype=torch.float16, device="meta") for size in (16, 4096))
    alike = [_launch(x=x, n=32), _launch(x=y, n=4096)]
    other = [
        _launch(x=x, n=33),
        _launch(x=x, n=1),
        _launch(x=x, n=2**31),
        _launch(x=None, n=32),
        _launch(x=x.float(), n=32),
    ]
    assert signature(alike[0]) == signature(alike[1])
    assert len(distinct(alike + other)) == 1 + len(other)


def test_covering_keeps_every_value_of_every_constant():
    launches = [
        Launch(types.SimpleNamespace(__name__="kernel"), (1,), {}, {"A": a, "B": b}, warps, 2)
        for a in range(4)
        for b in range(3)
        for warps in (4, 8)
    ]
    kept = covering(launches)
    assert len(kept) == 4
    assert {launch.constants["A"] for launch in kept} == {0, 1, 2, 3}
    assert {launch.constants["B"] for launch in kept} == {0, 1, 2}
    assert {launch.warps for launch in kept} == {4, 8}


def test_lines_outside_loops_do_not_count():
    ptx = "ld.a;\n$L_0:\nld.b;\n$L_1:\nld.c;\n@%p bra $L_1;\nld.d;\n@%q bra.uni $L_0;\nld.e;\nbra $L_2;\nld.f;\n$L_2:\n"
    inside = "\n".join(loop_lines(ptx))
    assert [name for name in "abcdef" if f"ld.{name};" in inside] == ["b", "c", "d"]


def test_the_interpreter_is_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_launch(_launch(), "sm_90")
