"""Random graphs: fused and dense agree bit for bit, whatever is next to what.

``SPARSEFLOW_FUZZ=5000 pytest tests/modules/fused/test_fuzz.py`` draws that many examples, and other ones every time.
"""

from __future__ import annotations

import copy
import os
import random

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

import sparseflow
from sparseflow.dispatch.policy import Policy
from sparseflow.graph.stepping import reset

from .nets import assert_equal, fresh, on_grid, states
from .random_nets import Drawn, Recipe, recipes

pytestmark = [
    pytest.mark.filterwarnings("ignore::sparseflow.NothingAcceleratedWarning"),
    pytest.mark.timeout(0 if "SPARSEFLOW_FUZZ" in os.environ else 600),
]
EXAMPLES = int(os.environ.get("SPARSEFLOW_FUZZ", "60"))
CASES = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="SPARSEFLOW_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def drawn(recipe: Recipe) -> tuple[Drawn, torch.Tensor]:
    generator = torch.Generator().manual_seed(recipe.seed)
    shape = (recipe.steps, recipe.batch, 3, recipe.size, recipe.size)
    x = torch.randint(-8, 24, shape, generator=generator) / 8
    return on_grid(Drawn(recipe, x), seed=recipe.seed).eval(), x


def called(model, x):
    """Outputs, states, and what the call left of its input."""
    x = x.clone()
    with torch.no_grad():
        found = fresh(model(x))
    remembered = [state.contiguous() for state in states(model).values()]
    return [*tree_leaves(found), *remembered, x]


@CASES
@given(recipe=recipes())
def test_random_networks(recipe):
    net, x = drawn(recipe)
    reset(net)
    dense = copy.deepcopy(net)
    sparseflow.accelerate(net, x, mode="sparse")
    for k in range(2):
        compare(called(net, x * (1 - k / 2)), called(dense, x * (1 - k / 2)))


def compare(ours, dense):
    finite = all(not tensor.is_floating_point() or float(tensor.abs().max()) < 2**13 for tensor in dense)
    if finite:  # else sums have more bits than float32
        assert_equal(ours, dense)


@CASES
@given(recipe=recipes(), seed=st.integers(0, 2**16))
def test_random_networks_that_change_their_minds(recipe, seed):
    """Events or dense, at random at every call: buffers are handed on in another order each time."""
    net, x = drawn(recipe)
    reset(net)
    dense = copy.deepcopy(net)
    sparseflow.accelerate(net, x, mode="sparse")
    choose = random.Random(seed)
    patch = pytest.MonkeyPatch()
    patch.setattr(Policy, "decide", lambda *_: choose.random() < 0.5)
    note(recipe)
    try:
        for k in range(5):
            scale = 1 - (k % 3) / 4
            compare(called(net, x * scale), called(dense, x * scale))
    finally:
        patch.undo()


@CASES
@given(recipe=recipes())
def test_random_networks_with_any_weights(recipe):
    """Of full precision: every block against float64, for what it was given."""
    net, x = drawn(recipe)
    torch.manual_seed(recipe.seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
        for buffer in net.buffers():
            if buffer.dim() == 1:
                buffer.mul_(1 + 0.1 * torch.rand_like(buffer.float()))
    reset(net)
    sparseflow.accelerate(net, x, mode="sparse")
    with torch.no_grad(), sparseflow.verify(net) as watch:
        net(x.clone())
        net(x.clone())
    assert watch.worst <= 1.0
