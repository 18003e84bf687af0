"""Accelerating parts and wholes, again, lazily, in threads, compiled, and what is left when it fails."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn

import sparseflow
from sparseflow.graph.recorder import Recorder
from sparseflow.modules.swap import runtimes

from .modules.nets import SPIKE_FED, conv_net, dense_and_sparse, images


class Outer(nn.Module):
    """A model whose only child is a model."""

    def __init__(self):
        super().__init__()
        self.inner = conv_net()

    def forward(self, x):
        return self.inner(x)


WRONG = torch.zeros(2, 4, 8, 8)


def classes(model):
    return [type(m) for m in model.modules()]


def footprint(model):
    """Everything accelerate could leave behind."""
    return [(type(m), m.__dict__.keys(), list(m._forward_pre_hooks)) for m in model.modules()]


def test_the_whole_after_a_part():
    model = Outer().eval()
    before = footprint(model)
    sparseflow.accelerate(model.inner, images(), mode="sparse")
    sparseflow.accelerate(model, images(), mode="sparse")
    assert set(runtimes(model)) == {f"inner.{name}" for name in SPIKE_FED}
    with pytest.raises(ValueError, match="has no plan"):
        sparseflow.report(model.inner)
    sparseflow.restore(model)
    assert footprint(model) == before


def test_a_part_after_the_whole():
    model = sparseflow.accelerate(Outer().eval(), images(), mode="sparse")
    sparseflow.restore(model.inner)
    layer = sparseflow.report(model).layers[1]
    assert (layer.path, layer.reason) == ("dense", sparseflow.Reason.REPLACED)


@pytest.mark.parametrize("ask", [sparseflow.analyze, lambda m, x: sparseflow.calibrate(m, [x])])
def test_questions_about_a_part_leave_the_whole_accelerated(ask):
    model = sparseflow.accelerate(Outer().eval(), images(), mode="sparse")
    before, layers = footprint(model), runtimes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sparseflow.NothingAcceleratedWarning)
        ask(model.inner, images())
    assert footprint(model) == before
    assert runtimes(model) == layers


def test_the_plan_of_a_wrapped_model_is_found():
    model = Outer().eval()
    sparseflow.accelerate(model.inner, images(), mode="sparse")
    with pytest.raises(ValueError, match=r"ask for that of model\.inner"):
        sparseflow.report(model)


def test_a_pending_part_does_not_disturb_the_whole():
    model = Outer().eval()
    sparseflow.accelerate(model.inner)
    sparseflow.accelerate(model, images(), mode="sparse")
    layers = runtimes(model)
    model(images())
    assert runtimes(model) == layers
    assert not model.inner._forward_pre_hooks


@pytest.mark.parametrize("mode", ["sparse", None])
def test_failing_to_accelerate_again_leaves_the_model_as_it_was(mode):
    model = conv_net().eval()
    if mode is not None:
        sparseflow.accelerate(model, images(), mode=mode)
    before, layers = footprint(model), runtimes(model)
    with pytest.raises(RuntimeError):
        sparseflow.accelerate(model, WRONG)
    assert footprint(model) == before
    assert runtimes(model) == layers


def test_a_wrong_first_input_is_not_the_last_chance():
    model = sparseflow.accelerate(conv_net().eval(), mode="sparse")
    with pytest.raises(RuntimeError):
        model(WRONG)
    model(images())
    assert set(runtimes(model)) == set(SPIKE_FED)
    assert not model._forward_pre_hooks


def test_strict_at_the_first_call_raises_once():
    model = sparseflow.accelerate(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), strict=True)
    with pytest.raises(sparseflow.UnsupportedModelError):
        model(torch.ones(1, 4))
    model(torch.ones(1, 4))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_a_pending_model_plan_for_themselves(clone):
    twin = clone(sparseflow.accelerate(conv_net().eval(), mode="sparse"))
    twin(images())
    assert set(runtimes(twin)) == set(SPIKE_FED)


def test_first_calls_from_many_threads_plan_once():
    for _ in range(3):
        model = sparseflow.accelerate(conv_net().eval(), mode="sparse")
        threads = [threading.Thread(target=model, args=(images(),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(runtimes(model)) == set(SPIKE_FED)
        assert_agrees(model)


def test_calls_of_other_threads_are_not_taken_for_the_traced_one():
    model = conv_net().eval()
    recorder = Recorder(model)
    with recorder.attached():
        other = threading.Thread(target=model, args=(images(),))
        other.start()
        other.join()
        assert recorder.feeds == {}
        model(images())
        assert len(recorder.feeds) == 4


def assert_agrees(model):
    dense, ours = dense_and_sparse(model, images())
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_plans_at_its_first_call():
    torch._dynamo.reset()
    model = sparseflow.accelerate(conv_net().eval(), mode="sparse")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        ours = compiled(images())
        with sparseflow.disabled(model):
            torch.testing.assert_close(ours, model(images()))
    assert set(runtimes(model)) == set(SPIKE_FED)


def test_export_while_disabled_is_free_of_our_operations():
    model = sparseflow.accelerate(conv_net().eval(), images(), mode="sparse")
    with sparseflow.disabled(model):
        program = torch.export.export(model, (images(),))
    assert not [node for node in program.graph.nodes if "sparseflow" in str(node.target)]


def test_an_input_that_hooks_prepare_is_explained():
    model = conv_net().eval()
    model.register_forward_pre_hook(lambda _, args: (args[0] / 50.0,))
    pixels = torch.randint(0, 255, (2, 3, 8, 8), dtype=torch.uint8)
    with pytest.raises(RuntimeError) as caught:
        sparseflow.accelerate(model, pixels)
    assert "leave it out to plan at the first call" in caught.value.__notes__[0]
    sparseflow.accelerate(model, mode="sparse")(pixels)
    assert set(runtimes(model)) == set(SPIKE_FED)


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_mentioned(option):
    with pytest.warns(UserWarning, match=rf"{option}='layer9.\*' matches no .* names are 0, 2, 5, 8"):
        sparseflow.accelerate(conv_net().eval(), images(), mode="sparse", **{option: ["2", "layer9.*"]})


def test_nothing_is_kept_of_a_model_that_was_accelerated_and_restored():
    """Python sources of traced graphs, which PyTorch keeps for ever, are not even made."""
    model = conv_net().eval()

    def objects(rounds):
        for _ in range(rounds):
            sparseflow.restore(sparseflow.accelerate(model, images(), mode="sparse"))
        gc.collect()
        return sum(issubclass(type(o), (functools.partial, sparseflow.LayerPlan)) for o in gc.get_objects())

    assert objects(2) == objects(20)
