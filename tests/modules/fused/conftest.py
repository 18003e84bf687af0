"""Tiny tensors: one thread is faster, and leaves the other cores to whoever runs beside the tests."""

from __future__ import annotations

import pytest
import torch

from sparseflow.kernels.cpu import engine


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    if not engine.available():
        pytest.skip("no native engine on this machine")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
