"""What the compiler makes of the fused kernels: matrix instructions, asynchronous copies, registers, no stack."""

from __future__ import annotations

import pytest

from sparseflow.kernels.triton.blocks.catalogue import launches

from ..test_compile import MATRIX, NVIDIA, rows

TWO_PROGRAMS = 32 * 1024  # registers of a program, for two of them to share a multiprocessor


def product_rows(row: dict) -> int:
    c = row["constants"]
    return c["STEPS"] * c["TILE_D"] * c["TILE_H"] * c["TILE_W"]


@pytest.mark.parametrize("kernel", ["_conv_block", "_list_channels", "_run_neuron", "_affine", "_pack", "_max_pool"])
def test_no_kernel_spills(report, kernel):
    assert [row for row in rows(report, "sm_90", kernel) if row["stack"] or row["local"]] == []


def test_products_of_64_rows_use_wgmma_and_of_16_mma(report):
    found = rows(report, "sm_90", "_conv_block")
    for row in found:
        wanted = "wgmma" if product_rows(row) >= 64 else "mma.sync"
        assert row["in_loop"][wanted], row
    assert {product_rows(row) >= 64 for row in found} == {True, False}


@pytest.mark.parametrize("target", NVIDIA)
def test_weights_and_words_are_copied_ahead(report, target):
    for row in rows(report, target, "_conv_block"):
        assert row["in_loop"]["cp.async"] >= 2 * row["constants"]["PARTS"], row
        assert any(row["in_loop"][name] for name in (*MATRIX[target], "mma.sync")), row


def test_registers_leave_room_for_a_second_program(report):
    for row in rows(report, "sm_90", "_conv_block"):
        if row["warps"] == 4:
            assert row["registers"] * 32 * row["warps"] <= TWO_PROGRAMS, row


def test_operations_are_rounded_one_by_one():
    fused = {launch.kernel.__name__ for launch in launches() if launch.fp_fusion}
    assert fused.isdisjoint({"_conv_block", "_run_neuron", "_affine", "_avg_pool"})
