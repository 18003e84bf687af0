"""Fixtures every test gets: a private cache, poisoned uninitialised memory, one seed."""

from __future__ import annotations

import functools
import os

# Read when triton is imported: its kernels then run on CPU tensors. TRITON_INTERPRET=0 is for tests/gpu.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

_EMPTY = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}


def _poisoned(make):
    @functools.wraps(make)
    def wrapper(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if tensor.is_floating_point() and type(tensor) is torch.Tensor:
            tensor.fill_(float("nan"))
        return tensor

    return wrapper


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory):
    """Measured crossovers of the tests stay out of the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("SPARSEFLOW_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill what ``torch.empty`` returns with NaN: an output element that is never written shows."""
    for name, make in _EMPTY.items():
        monkeypatch.setattr(torch, name, _poisoned(make))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
