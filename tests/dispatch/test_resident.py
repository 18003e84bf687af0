"""Packed weights on a device: current, finite, in place, and never at the cost of waiting."""

from __future__ import annotations

import math

import pytest
import torch

from sparseflow.dispatch import resident
from sparseflow.dispatch.mailbox import Mailbox
from sparseflow.dispatch.resident import ResidentWeight

from .fake import FakeEvent, FakeKernel, curve, no_waiting


class Layer:
    """A weight, its kernel and its packed copies."""

    def __init__(self, pack_ms=0.0):
        self.kernel, self.box = FakeKernel(), Mailbox()
        self.weight = torch.randn(4, 6)
        self.packed = ResidentWeight(self.box)
        self.crossover = curve("k", self.kernel, at_zero=0.0, at_one=2.0, pack_ms=pack_ms)

    def call(self, gain_ms=1.0, kernel=None):
        self.box.poll()
        self.packed.meet(self.weight)
        return self.packed.get(self.weight, kernel or self.kernel, self.crossover, gain_ms)

    def rows(self):
        values = self.call().rows
        return values if values.dim() == 2 else values.sum(0)


@pytest.fixture
def layer():
    return Layer()


def test_packed_once_and_again_after_a_change(layer):
    assert torch.equal(layer.rows(), layer.weight.t())
    layer.call()
    assert layer.kernel.packs == 1
    layer.weight.mul_(-2)
    assert torch.equal(layer.rows(), layer.weight.t())
    layer.weight = layer.weight.clone()
    layer.weight.mul_(-2)
    assert torch.equal(layer.rows(), layer.weight.t())
    assert layer.kernel.packs == 3


def test_the_copy_has_memory_of_its_own(layer):
    """The fake packs a view of the weight; writing the next state into it must not write the user's weight."""
    before = layer.weight.clone()
    rows = layer.call().rows
    rows.zero_()
    assert torch.equal(layer.weight, before)


def test_a_settled_weight_is_written_into_the_same_memory(layer):
    for _ in range(resident._SETTLED):
        before = layer.call()
    layer.weight.mul_(3)
    assert layer.call().rows.data_ptr() == before.rows.data_ptr()
    assert torch.equal(before.rows, layer.weight.t())


def test_a_copy_made_in_inference_mode_can_be_written_outside(layer):
    with torch.inference_mode():
        for _ in range(resident._SETTLED):
            before = layer.call()
    layer.weight.mul_(3)
    layer.call()
    assert torch.equal(before.rows, layer.weight.t())


def test_a_weight_that_changes_at_every_call_is_not_looked_at(layer):
    layer.call()
    inspections = layer.kernel.inspections
    for _ in range(5):
        layer.weight.add_(1.0)
        with no_waiting():
            assert layer.call() is not None
    assert layer.kernel.inspections == inspections
    layer.call()
    for _ in range(resident._SETTLED):
        values = layer.call()
    assert layer.kernel.inspections == inspections + 1, "once it stays, the better layout is packed"
    assert torch.equal(values.rows, layer.weight.t())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_settled_weight_that_is_not_finite_is_refused_at_once(layer, value):
    layer.weight[1, 2] = value
    assert layer.call() is None
    assert layer.call() is None
    for _ in range(resident._SETTLED):
        layer.call()
    layer.weight[1, 2] = 0.5
    assert torch.equal(layer.rows(), layer.weight.t())


def test_a_training_that_diverges_goes_dense_and_may_come_back(layer):
    layer.call()
    layer.weight[1, 2] = math.nan
    with no_waiting():
        layer.call()  # nobody knows yet
        assert layer.call() is None
        layer.weight[1, 2] = math.inf
        assert layer.call() is None
        assert layer.call() is None
        layer.weight[1, 2] = 0.5
        assert layer.call() is None
        assert layer.call() is not None
    assert torch.equal(layer.rows(), layer.weight.t())


def test_packing_is_weighed_against_what_it_brings():
    layer = Layer(pack_ms=10.0)
    assert layer.call(gain_ms=0.5) is not None, "nothing says yet that the weight will change"
    layer.weight.mul_(2)
    assert [layer.call(gain_ms=0.5) is not None for _ in range(21)] == [False] * 19 + [True] * 2


def test_writes_through_data_show_after_a_refresh(layer):
    before = layer.rows().clone()
    layer.weight.data.mul_(2)
    assert torch.equal(layer.rows(), before)
    layer.packed.refresh(layer.weight)
    assert torch.equal(layer.rows(), layer.weight.t())


def test_what_a_graph_reads_stays_and_is_packed_by_refresh(layer):
    layer.call()
    captured = layer.packed.captured(layer.weight, layer.kernel, "a")
    for number in range(5):  # other forms of the weight do not drive it out
        crossover = curve("k", layer.kernel, at_zero=0.0, at_one=1.0)
        object.__setattr__(crossover, "variant", f"v{number}")
        layer.packed.get(layer.weight, layer.kernel, crossover, 1.0)
    assert len(layer.packed._copies) == 1 + resident._MAX_COPIES
    layer.weight.data.mul_(2)
    layer.packed.refresh(layer.weight)
    assert torch.equal(captured.rows, layer.weight.t())
    replaced = layer.weight * 5
    layer.packed.refresh(replaced)
    assert torch.equal(captured.rows, replaced.t())


def test_a_graph_reads_a_weight_that_is_not_finite_after_refresh(layer):
    layer.call()
    captured = layer.packed.captured(layer.weight, layer.kernel, "a")
    layer.weight[1, 2] = math.nan
    layer.packed.refresh(layer.weight)
    assert captured.rows[2, 1].isnan()
    assert layer.call() is None


def test_a_capture_packs_nothing(layer):
    assert layer.packed.captured(layer.weight, layer.kernel, "a") is None
    layer.call()
    assert layer.packed.captured(layer.weight, layer.kernel, "a") is not None
    assert layer.packed.captured(layer.weight, FakeEvent(), "a") is None
    layer.weight.mul_(2)
    assert layer.packed.captured(layer.weight, layer.kernel, "a") is None
    assert layer.kernel.packs == 1


def test_a_captured_copy_that_cannot_be_overwritten_is_kept_and_said(layer, caplog):
    layer.call()
    captured = layer.packed.captured(layer.weight, layer.kernel, "a")
    before = captured.rows.clone()
    layer.weight.mul_(2)  # the first state lived for one call: the next is packed unseen, in another layout
    layer.call()
    assert "capture it again" in caplog.text
    assert torch.equal(captured.rows, before)
