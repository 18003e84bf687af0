"""The neurons of these tests are known to the library while they run."""

from __future__ import annotations

import pytest

from sparseflow.frameworks import register_neuron, unregister_neuron

from .loops import Lif, Passing


@pytest.fixture(autouse=True, scope="package")
def registered():
    register_neuron(Lif)
    register_neuron(Passing)
    yield
    unregister_neuron(Lif)
    unregister_neuron(Passing)
