"""Fixtures every test gets: a private cache, poisoned uninitialised memory, one seed."""

from __future__ import annotations

import functools
import os

# Read when triton is imported: its kernels then run on CPU tensors. TRITON_INTERPRET=0 is for tests/gpu.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

_EMPTY = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}
_GARBAGE = 0x5A5A  # no index or count of a small test


def _garbage(dtype: torch.dtype) -> float | int:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 1 if dtype is torch.bool else _GARBAGE & torch.iinfo(dtype).max


def _poisoned(make):
    @functools.wraps(make)
    def wrapper(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if type(tensor) is torch.Tensor:
            tensor.fill_(_garbage(tensor.dtype))
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
    """Fill what ``torch.empty`` returns with NaN or garbage: an element that is read but never written shows."""
    for name, make in _EMPTY.items():
        monkeypatch.setattr(torch, name, _poisoned(make))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def driver():
    """A browser; without one the test is skipped, or fails where SPARSEFLOW_REQUIRE_BROWSER=1."""
    from benchmarks.browser import browser, missing

    if reason := missing():
        if os.environ.get("SPARSEFLOW_REQUIRE_BROWSER") == "1":
            pytest.fail(f"SPARSEFLOW_REQUIRE_BROWSER=1, and {reason}")
        pytest.skip(reason)
    with browser() as driver:
        yield driver
