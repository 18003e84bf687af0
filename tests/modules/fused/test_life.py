"""What a user may do with an accelerated model: copy, save, restore, compile, train, share, and look into it."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from spikingjelly.activation_based import functional
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sparseflow
from sparseflow.dispatch.measure import Times
from sparseflow.frameworks import write_state
from sparseflow.modules.fused import model as fused_model
from sparseflow.modules.fused import state as fused_state
from sparseflow.modules.fused.model import fusion_of
from sparseflow.plan import Reason

from .nets import (
    Net,
    assert_equal,
    assert_twins,
    conv,
    features,
    images,
    is_fused,
    leaky,
    lif,
    norm,
    on_grid,
    outputs,
    program,
    spikes,
    states,
    stem,
    twins,
)

pytestmark = pytest.mark.filterwarnings("ignore::sparseflow.NothingAcceleratedWarning")


def run(m, x):
    return m.n1(m.b1(m.c1(spikes(m, x))))


class Small(Net):
    """Can be pickled: its forward has a name."""

    def __init__(self):
        super().__init__(run, **stem(), c1=conv(8, 8), b1=norm(8), n1=lif())


@pytest.fixture
def pair():
    dense, ours = twins(on_grid(Small()), images())
    assert_twins(dense, ours, images())
    return dense, ours


# ---- modes of PyTorch


@pytest.mark.parametrize("modes", [[True, False, True], [False, True, False], [False, False, True, True]])
def test_inference_mode_and_no_grad_in_turn(pair, modes):
    for seed, inference in enumerate(modes):
        for reset in (False, True):
            results = []
            for model in pair:
                with torch.inference_mode(inference), torch.no_grad():
                    results.append(model(images(seed=seed)))
                if reset:
                    functional.reset_net(model)
            assert_equal(results[1:], results[:1])
            assert results[1].is_inference() is inference
            assert is_fused(pair[1])


def test_gradients_are_those_of_the_model(pair):
    results = []
    for model in pair:
        functional.reset_net(model)
        x = images().requires_grad_()
        model(x).sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters())])
    assert_equal(results[1], results[0])
    assert fusion_of(pair[1]).why is Reason.GRADIENTS


@pytest.mark.parametrize("by_name", [False, True])
def test_gradients_of_the_input_of_a_frozen_model(pair, by_name):
    results = []
    for model in pair:
        model.requires_grad_(False)
        functional.reset_net(model)
        for _ in range(3):
            x = images().requires_grad_()
            (model(x=x) if by_name else model(x)).sum().backward()
            functional.reset_net(model)
        results.append(x.grad)
    assert results[0].any()
    assert_equal(results[1:], results[:1])


def test_gradients_through_the_state_of_a_frozen_model(pair):
    """Grad mode is on, neither weights nor input want gradients, but the state of an earlier step does."""
    results = []
    for model in pair:
        model.requires_grad_(False)
        functional.reset_net(model)
        x = images().requires_grad_()
        model(x)
        model(images(seed=2)).sum().backward()
        results.append(x.grad)
    assert results[0].any()
    assert_equal(results[1:], results[:1])


def test_a_frozen_model_without_gradients_is_fused_in_grad_mode(pair):
    for model in pair:
        model.requires_grad_(False)
        functional.reset_net(model)
    for _ in range(3):
        dense, ours = (model(images()) for model in pair)
        assert_equal([ours], [dense])
        assert not ours.requires_grad
    assert is_fused(pair[1])


def test_state_of_a_training_step_goes_on_without_gradients(pair):
    for model in pair:
        functional.reset_net(model)
        model(images())
    assert_twins(*pair, images(), calls=3)
    assert not any(value.requires_grad for value in states(pair[1]).values())


def test_training_and_evaluation_in_turn(pair):
    for model in pair:
        model.b1.eps = 2.0**-10
    dense, ours = pair
    for _ in range(3):
        for model in pair:
            model.train()
            functional.reset_net(model)
            outputs(model, images(seed=3))
        for a, b in zip(dense.buffers(), ours.buffers(), strict=True):
            torch.testing.assert_close(b, a)
        results = []
        for model in pair:
            model.eval()
            functional.reset_net(model)
            results.append(model.b1(images(channels=8)))
        torch.testing.assert_close(results[1], results[0])
        with torch.no_grad(), sparseflow.verify(ours) as watch:
            ours(images())
            ours(images())
        assert watch.checked >= 2
        assert is_fused(ours)


def test_autocast(pair):
    for model in pair:
        functional.reset_net(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense, ours = (outputs(model, images()) for model in pair)
    assert_equal(ours, dense)
    assert fusion_of(pair[1]).why is Reason.AUTOCAST


def test_compiled_in_one_piece(pair):
    dense, ours = pair
    for model in pair:
        functional.reset_net(model)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for _ in range(2):
        assert_equal(outputs(compiled, images()), outputs(dense, images()))
    assert_twins(dense, ours, images())
    assert is_fused(ours)


def test_exported(pair):
    dense, ours = pair
    for model in pair:
        functional.reset_net(model)
    with torch.no_grad():
        exported = torch.export.export(ours, (images(),), strict=False).module()
        functional.reset_net(ours)
        assert_equal([exported(images())], [dense(images())])


def test_counters_of_operations_see_all_of_them(pair):
    counts = []
    for model in pair:
        with FlopCounterMode(display=False) as counter:
            outputs(model, images())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# ---- plans that lost


@pytest.mark.parametrize(("fused", "wins"), [([9.0, 2.0, 1.0], True), ([9.0, 4.0, 3.5], False)])
def test_a_plan_is_dropped_only_after_it_lost_again(monkeypatch, fused, wins):
    times, x = iter(fused), images()

    def measured(runs, budget):
        assert runs.keys() == {"fused", "layers"}
        return Times({"fused": next(times), "layers": 3.0}, True)

    monkeypatch.setattr(fused_model, "fastest", measured)
    last = fusion_of(sparseflow.accelerate(on_grid(Small()).eval(), x)).last
    assert (last.fused_ms, last.layers_ms) == ((2.0, 3.0) if wins else (3.5, 3.0))
    assert (last.reason is Reason.FUSED_LOSES) is not wins
    assert list(times) == ([1.0] if wins else [])


def test_a_plan_that_lost_is_tried_with_other_weights(monkeypatch):
    x, net = images(), on_grid(Small()).eval()
    dense = copy.deepcopy(net)
    with monkeypatch.context() as slow:
        slow.setattr(fused_model, "_MAX_LOSS", 0.0)
        ours = sparseflow.accelerate(net, x)
    assert fusion_of(ours).last.reason is Reason.FUSED_LOSES
    monkeypatch.setattr(fused_model, "_MAX_LOSS", float("inf"))
    for _ in range(3):
        outputs(ours, x)
    assert not is_fused(ours)
    functional.reset_net(ours)
    for model in (dense, ours):
        sparseflow.prune_blocks(model, density=0.5)
    results = [[outputs(model, x) for model in (ours, dense)] for _ in range(2)]
    assert is_fused(ours)
    for mine, theirs in results:
        assert_equal(mine, theirs)


# ---- copies


def save_and_load(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), save_and_load])
def test_copies_are_fused_and_independent(pair, copied):
    dense, ours = pair
    twin = copied(ours)
    assert type(twin) is type(ours)
    assert_twins(copy.deepcopy(dense), twin, images(), calls=3)
    assert is_fused(twin)
    with torch.no_grad():
        twin.c1.weight.zero_()
    assert_twins(dense, ours, images())


def test_a_shallow_copy_shares_everything(pair):
    dense, ours = pair
    assert_twins(dense, copy.copy(ours), images())
    assert_twins(dense, ours, images())


def test_state_dict_is_that_of_the_model(pair):
    assert list(pair[0].state_dict()) == list(pair[1].state_dict())
    dense = Small().eval()
    dense.b1.eps = 0.0
    dense.load_state_dict(pair[1].state_dict())
    functional.reset_net(pair[1])
    assert_twins(dense, pair[1], images())


def test_restore_is_exact():
    net = on_grid(Small()).eval()
    net.c1.register_forward_hook(lambda *_: None)
    before = {name: (type(module), dict(module.__dict__)) for name, module in net.named_modules()}
    sparseflow.accelerate(net, images(), mode="sparse")
    outputs(net, images())
    assert is_fused(net)
    functional.reset_net(net)
    sparseflow.restore(net)
    for name, module in net.named_modules():
        kind, attributes = before[name]
        assert type(module) is kind
        assert module.__dict__.keys() == attributes.keys()
        assert all(module.__dict__[key] is value for key, value in attributes.items())


def test_disabled_runs_the_model_itself(pair):
    dense, ours = pair
    plan = program(ours)
    plan.run = None
    with sparseflow.disabled(ours):
        assert_twins(dense, ours, images())
    del plan.run
    assert_twins(dense, ours, images())
    assert program(ours) is plan


def test_accelerate_twice_is_accelerate_once(pair):
    dense, ours = pair
    sparseflow.accelerate(ours, images(), mode="sparse")
    assert [cls.__name__ for cls in type(ours).__mro__].count("FusedModel") == 1
    assert_twins(dense, ours, images())
    sparseflow.restore(ours)
    assert type(ours) is Small


@pytest.mark.parametrize("wrap", [lambda m: nn.Sequential(m, nn.ReLU()), lambda m: Wrapper(m), lambda m: Twice(m)])
def test_a_fused_model_inside_another(pair, wrap):
    dense, ours = pair
    assert_twins(wrap(dense), wrap(ours), images(), calls=3)
    assert is_fused(ours)
    outer = sparseflow.accelerate(wrap(ours).eval(), images(), mode="sparse")
    assert fusion_of(ours) is None
    assert_twins(wrap(dense).eval(), outer, images(), calls=3)


class Wrapper(nn.Module):
    """As ``nn.DataParallel`` holds a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class Twice(Wrapper):
    def forward(self, x):
        return self.module(x) + self.module(x * 2)


# ---- threads and errors


def loop_over_time(m, x):
    mem, found = torch.zeros(len(x[0]), 16), []
    for step in x:
        s, mem = m.n1(m.f1(step), mem)
        found.append(s)
    return m.f2(torch.stack(found))


def test_a_state_is_never_missing(monkeypatch):
    """A thread that runs layer by layer meanwhile would fail on it."""
    made = on_grid(Net(loop_over_time, f1=nn.Linear(6, 16), n1=leaky(), f2=nn.Linear(16, 4)))
    ours, written = twins(made, features(4))[1], []

    def write(module, name, value):
        written.append(value)
        write_state(module, name, value)

    monkeypatch.setattr(fused_state, "write_state", write)
    for _ in range(3):
        outputs(ours, features(4))
    assert is_fused(ours)
    assert len(written) > 3
    assert all(value is not None for value in written)


def test_threads_that_call_at_once():
    """Nobody waits or fails, whoever plans. snnTorch's neurons themselves mix up the states of two threads, so that the
    batch stays the same: a membrane of another size, left from the round before, would meet this one's input."""

    made = on_grid(Net(loop_over_time, f1=nn.Linear(6, 16), n1=leaky(), f2=nn.Linear(16, 4)))
    dense, ours = twins(made, features(4))
    errors, together = [], threading.Barrier(4)

    def work():
        try:
            for steps in (4, 4, 3, 5, 4):
                together.wait(300)
                for _ in range(5):
                    outputs(ours, features(steps))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert_twins(dense, ours, features(4))


def test_a_call_while_another_thread_plans(pair):
    _, ours = pair
    started, done = threading.Event(), threading.Event()
    original = Small.forward

    def slow(self, *args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            started.set()
            done.wait(10)
        return original(self, *args, **kwargs)

    found = []
    Small.forward = slow
    try:
        other = images(batch=3)
        outputs(ours, other)
        thread = threading.Thread(target=lambda: found.append(outputs(ours, other)))
        thread.start()
        started.wait(10)
        functional.reset_net(ours)
        found.append(outputs(ours, images(batch=4)))
    finally:
        done.set()
        thread.join()
        Small.forward = original
    assert len(found) == 2


def test_an_error_inside_leaves_the_model_usable(pair):
    class Fussy(nn.Module):
        angry = False

        def forward(self, x):
            if Fussy.angry:
                raise RuntimeError("no")
            return x.sin()

    net = Net(lambda m, x: m.n1(m.c1(m.fussy(spikes(m, x)))), **stem(), c1=conv(8, 8), n1=lif(), fussy=Fussy())
    net.fussy.register_forward_hook(lambda *_: None)
    dense, ours = twins(on_grid(net), images())
    for _ in range(2):
        results = [outputs(model, images()) for model in (dense, ours)]
        torch.testing.assert_close(*results)
    assert is_fused(ours)
    for model in (dense, ours):
        Fussy.angry = True
        with pytest.raises(RuntimeError, match="no"):
            outputs(model, images())
        Fussy.angry = False
        functional.reset_net(model)
    torch.testing.assert_close(outputs(ours, images()), outputs(dense, images()))


def test_a_wrong_input_raises_what_the_model_raises(pair):
    for model in pair:
        functional.reset_net(model)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="channels"):
                outputs(model, images(channels=4))
    for model in pair:
        functional.reset_net(model)
    assert_twins(*pair, images())
