"""These tests run the compiled kernels: ``TRITON_INTERPRET=0 python -m pytest tests/gpu`` on a machine with a GPU."""

from __future__ import annotations

import os

import pytest
import torch

import sparseflow

from ..modules.nets import conv_net, images


def pytest_collection_modifyitems(items):
    missing = "no GPU" if not torch.cuda.is_available() else "TRITON_INTERPRET=0 is not set"
    skip = not torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] != "0"
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)
            if skip:
                item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(autouse=True)
def no_tf32():
    """Float32 is float32: rounded to TF32, dense and sparse let other neurons fire."""
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, allowed in zip(switches, before, strict=True):
        switch.allow_tf32 = allowed


@pytest.fixture
def net():
    """A small net on the current GPU whose spike-fed layers are forced onto the Triton kernels."""
    return sparseflow.accelerate(conv_net().eval().cuda(), pictures(), mode="sparse")


def pictures(batch=2, seed=5, device="cuda", dtype=torch.float32):
    """Images on a GPU."""
    if seed == 5:
        return images(batch).to(device, dtype)
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 3, 8, 8, generator=generator) * 1.5).to(device, dtype)
