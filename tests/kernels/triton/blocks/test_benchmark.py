"""The cells of the GPU benchmark that time fused blocks, on the CPU: right rows, and none of wrong results."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.gpu import blocks, problem
from benchmarks.gpu.layers import STEPS, LayerShape
from benchmarks.gpu.records import LayerRow, RedGate, to_json
from benchmarks.gpu.timing import Sampler
from sparseflow.kernels.triton.blocks.ops import TritonBlockOps

CPU = torch.device("cpu")
TINY = LayerShape("3x3 8@4", 8, 8, (4, 4), kernel=3)


class OnceTimer:
    """Runs everything once; it takes a millisecond."""

    def prepare(self, run, inputs, *, graphed=True):
        run(0)
        return Sampler(lambda: 1.0, 1.0)


@pytest.fixture(autouse=True)
def few_inputs(monkeypatch):
    monkeypatch.setattr(problem, "_CPU_CACHE", 0)


def test_every_variant_has_a_row_over_both_dense_sides(monkeypatch):
    monkeypatch.setattr(TritonBlockOps, "variants", lambda *_: ("p16-t4-words-n64-w4-s3", "p16-t4-channels-n64-w4-s3"))
    rows = blocks.run(TINY, STEPS, (0.3,), OnceTimer(), CPU)
    assert len(rows) == 4
    for row in rows:
        assert isinstance(row, LayerRow)
        assert (row.path, row.speedup) == ("fused", 1.0)
        assert not row.baseline.startswith("dense")  # the goals of single layers are not about these
        to_json(row)


def test_a_wrong_result_is_red():
    block = blocks.Block.of(TINY, STEPS, 0.3, CPU)
    other = dataclasses.replace(block, weight=-block.weight)
    with pytest.raises(RedGate, match="spikes differ"):
        block.gate(other.dense(torch.float32))


def test_there_is_a_cell_for_each_of_the_first_experiments():
    names = [cell.name for cell in blocks.cells(OnceTimer(), CPU)]
    assert len(set(names)) == 4
