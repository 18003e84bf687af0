"""The TF32 switches of PyTorch, of which it has two sets since 2.9."""

from __future__ import annotations

import types

import pytest
import torch

from sparseflow.kernels.precision import tf32_convolution, tf32_matmul


@pytest.mark.parametrize("allowed", [True, False])
def test_the_old_switches_are_read(monkeypatch, allowed):
    switches = types.SimpleNamespace(allow_tf32=allowed)
    monkeypatch.setattr(torch.backends, "cudnn", switches)
    monkeypatch.setattr(torch.backends, "cuda", types.SimpleNamespace(matmul=switches))
    assert (tf32_convolution(), tf32_matmul()) == (allowed, allowed)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_switches_that_contradict_each_other_can_still_be_read(monkeypatch, precision):
    class Contradictory:
        fp32_precision = precision

        @property
        def allow_tf32(self):
            raise RuntimeError("mix of the legacy and new APIs")

    class Backend:
        conv = matmul = Contradictory()
        allow_tf32 = Contradictory.allow_tf32

    monkeypatch.setattr(torch.backends, "cudnn", Backend())
    monkeypatch.setattr(torch.backends, "cuda", Backend())
    assert (tf32_convolution(), tf32_matmul()) == (precision == "tf32",) * 2
