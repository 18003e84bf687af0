"""A fused plan runs only while the model is what it was made from; whatever changes, results are the model's."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from spikingjelly.activation_based import functional, monitor, neuron
from torch import nn
from torch.nn.utils import parametrize, prune

from sparseflow.modules.fused.model import fusion_of

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
    stem,
    twins,
)

pytestmark = pytest.mark.filterwarnings("ignore::sparseflow.NothingAcceleratedWarning")


def run(m, x):
    return m.tail(m.n1(m.b1(m.c1(spikes(m, x))))) * m.gain


def net():
    made = Net(run, **stem(), c1=conv(8, 8), b1=norm(8), n1=lif(), tail=nn.Sequential(conv(8, 8), lif()))
    made.gain, made.window, made.plain = 1.0, (2, 2), [1, 2]
    return on_grid(made)


@pytest.fixture
def pair():
    dense, ours = twins(net(), images())
    assert_twins(dense, ours, images())
    assert is_fused(ours)
    return dense, ours


def test_a_plan_is_kept_while_nothing_changes(pair):
    _, ours = pair
    plan = program(ours)
    for seed in range(5):
        outputs(ours, images(seed=seed))
        functional.reset_net(ours)
        assert program(ours) is plan


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def trained(model):
    """A step in training mode moves the statistics of batch norm, and counts no write while it does."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 2.0**-10
            module.momentum = 0.5
    model.train()
    outputs(model, images(seed=4))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # back on the grid
            module.eps = 0.0
    model.b1.running_mean.data.mul_(16).round_().div_(16)
    model.b1.running_var.data.log2_().mul_(0.5).round_().mul_(2).exp2_()
    model.eval()


def stepped(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) / 16
    optimizer.step()
    optimizer.zero_grad()


def reloaded(model):
    model.load_state_dict({name: value * 4 for name, value in model.state_dict().items()})


def data_of(model):
    for parameter in model.parameters():
        parameter.data.mul_(0.5)


def patched(module, forward):
    module.forward = forward


def renamed_class(module):
    module.__class__ = type("Skipped", (type(module),), {"forward": lambda self, x: x * 2})


def with_bias(model):
    model.c1.bias = nn.Parameter(torch.ones(8) / 4)


CHANGES = {
    "threshold": lambda m: setattr(m.n1, "v_threshold", 0.5),
    "tau": lambda m: setattr(m.n1, "tau", 4.0),
    "reset": lambda m: setattr(m.n1, "v_reset", None),
    "decay_input": lambda m: setattr(m.n1, "decay_input", False),
    "store_v_seq": lambda m: setattr(m.n1, "store_v_seq", True),
    "weight": lambda m: m.c1.weight.detach().mul_(0.5),
    "weight replaced": lambda m: setattr(m.c1, "weight", nn.Parameter(m.c1.weight.detach() * 2)),
    "weight data": data_of,
    "weight data replaced": lambda m: setattr(m.c1.weight, "data", m.c1.weight.data * 2),
    "bias added": with_bias,
    "statistics": lambda m: m.b1.running_mean.add_(0.25),
    "statistics data": lambda m: m.b1.running_var.data.mul_(4),
    "norm without weight": lambda m: setattr(m.b1, "weight", None),
    "trained": trained,
    "optimizer": stepped,
    "load_state_dict": reloaded,
    "stride and padding": lambda m: (setattr(m.c1, "padding", (2, 2)), setattr(m.c1, "dilation", (2, 2))),
    "norm replaced": lambda m: setattr(m, "b1", on_grid(norm(8), seed=9).eval()),
    "norm to identity": lambda m: setattr(m, "b1", nn.Identity()),
    "neuron replaced": lambda m: setattr(m, "n1", neuron.IFNode(step_mode="m")),
    "module appended": lambda m: m.tail.append(nn.Threshold(0.5, 2.0)),
    "module removed": lambda m: m.tail.__delitem__(1),
    "modules swapped": lambda m: setattr(m, "c1", m.tail[0]) or m.tail.__setitem__(0, nn.Identity()),
    "container patched": lambda m: patched(m.tail, lambda x: x * 3),
    "layer patched": lambda m: patched(m.c1, lambda x: x * 3),
    "neuron patched": lambda m: patched(m.n1, lambda x: x * 3),
    "class of a container": lambda m: renamed_class(m.tail),
    "class of a norm": lambda m: renamed_class(m.b1),
    "parametrized": lambda m: parametrize.register_parametrization(m.c1, "weight", Doubled()),
    "pruned": lambda m: prune.l1_unstructured(m.c1, "weight", 0.5),
    "attribute": lambda m: setattr(m, "gain", 2.0),
    "training mode": lambda m: m.train(),
    "training mode of a part": lambda m: m.tail.train(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_at_once_and_for_good(pair, name):
    for model in pair:
        with torch.no_grad():
            CHANGES[name](model)
        if name != "trained":
            functional.reset_net(model)
    if name == "trained":
        for a, b in zip(pair[0].buffers(), pair[1].buffers(), strict=True):
            b.copy_(a)
        for model in pair:
            functional.reset_net(model)
    if name == "training mode":
        for model in pair:
            model.b1.eval()
    assert_twins(*pair, images(), calls=4)


def test_a_change_that_is_taken_back(pair):
    for threshold in (0.5, 1.0, 0.25, 1.0):
        for model in pair:
            model.n1.v_threshold = threshold
            functional.reset_net(model)
        assert_twins(*pair, images(), calls=3)
    assert is_fused(pair[1])


def test_channels_pruned_from_a_layer_and_all_that_reads_it(pair):
    for model in pair:
        model.c1.weight = nn.Parameter(model.c1.weight[:6].detach().clone())
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(model.b1, name)[:6].detach().clone()
            setattr(model.b1, name, nn.Parameter(value) if name in ("weight", "bias") else value)
        model.tail[0].weight = nn.Parameter(model.tail[0].weight[:, :6].detach().clone())
        functional.reset_net(model)
    assert_twins(*pair, images(), calls=4)


@pytest.mark.parametrize("name", ["beta", "threshold", "data", "reset"])
def test_constants_of_a_snntorch_neuron(name):
    def loop(m, x):
        mem = m.n1.init_leaky()
        found = []
        for step in x:
            s, mem = m.n1(m.f1(step), mem)
            found.append(s)
        return torch.stack(found)

    made = Net(loop, f1=nn.Linear(6, 16), n1=leaky(learn_beta=True, learn_threshold=True))
    dense, ours = twins(on_grid(made), features(4))
    assert_twins(dense, ours, features(4))
    for model in (dense, ours):
        with torch.no_grad():
            if name in ("beta", "threshold"):
                getattr(model.n1, name).fill_(0.25)
            elif name == "data":
                model.n1.beta = nn.Parameter(torch.tensor(0.75))
            else:
                model.n1.reset_mechanism = "zero"
    assert_twins(dense, ours, features(4), calls=4)
    assert is_fused(ours)


# ---- hooks


def watch(model, where):
    """Record what a hook sees; ``where`` names a module."""
    seen = []
    part = model.get_submodule(where)
    handle = part.register_forward_hook(lambda _m, args, out: seen.append((args[0].clone(), out.clone())))
    return seen, handle


@pytest.mark.parametrize("where", ["", "c0", "n0", "c1", "b1", "n1", "tail", "tail.0", "tail.1"])
def test_hooks_see_what_they_would_see_and_as_often(pair, where):
    dense, ours = (watch(model, where) for model in pair)
    assert_twins(*pair, images(), calls=4)
    assert len(dense[0]) == len(ours[0]) == 4
    for (a, b), (c, d) in zip(dense[0], ours[0], strict=True):
        assert_equal([c, d], [a, b])
    for _, handle in (dense, ours):
        handle.remove()
    assert_twins(*pair, images(), calls=3)
    assert len(ours[0]) == 4
    assert is_fused(pair[1])


def test_blocks_come_back_when_a_hook_goes(pair):
    _, ours = pair
    before = len(program(ours).blocks)
    _, handle = watch(ours, "tail")
    for _ in range(3):
        outputs(ours, images())
    assert 0 < len(program(ours).blocks) < before
    handle.remove()
    outputs(ours, images())
    assert len(program(ours).blocks) == before


def test_pre_hooks_may_change_the_input(pair):
    for model in pair:
        model.c1.register_forward_pre_hook(lambda _m, args: (args[0] * 2,))
        model.n1.register_forward_hook(lambda _m, _args, out: out * 3)
    assert_twins(*pair, images(), calls=4)


def test_hooks_on_all_modules_of_the_process(pair):
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(type(m).__name__))
    try:
        counts = []
        for model in pair:
            for _ in range(3):
                calls.clear()
                outputs(model, images())
                counts.append(len(calls))
    finally:
        handle.remove()
    assert len(set(counts)) == 1
    assert not is_fused(pair[1])
    assert_twins(*pair, images())
    assert is_fused(pair[1])


def test_monitors_record_every_call(pair):
    found = []
    for model in pair:
        watched = monitor.OutputMonitor(model, neuron.BaseNode)
        for seed in range(3):
            outputs(model, images(seed=seed))
        found.append(watched)
    dense, ours = found
    for name in dense.monitored_layers:
        assert_equal(ours[name], dense[name])


def test_attributes_that_the_monitor_reads(pair):
    for model in pair:
        model.n1.store_v_seq = True
        functional.reset_net(model)
    assert_twins(*pair, images(), calls=3)
    assert_equal([pair[1].n1.v_seq], [pair[0].n1.v_seq])
    for model in pair:
        model.n1.store_v_seq = False
    assert_twins(*pair, images(), calls=3)


# ---- how many plans there are


def test_other_shapes_are_planned_when_seen_again_and_only_a_few_are_kept(pair):
    dense, ours = pair
    for batch in range(1, 13):
        for model in pair:
            functional.reset_net(model)
        x = images(batch=batch)
        assert_equal(outputs(ours, x), outputs(dense, x))
        assert is_fused(ours) is (batch == 2)
        assert_twins(dense, ours, x)
        assert is_fused(ours)
    assert len(fusion_of(ours).plans) == 8


def test_another_number_of_steps_and_another_size(pair):
    for x in (images(5), images(1), images(size=6), images(3, 1, size=12)):
        for model in pair:
            functional.reset_net(model)
        assert_twins(*pair, x, calls=3)
        assert is_fused(pair[1])


def test_shapes_in_turn_keep_their_plans(pair):
    for model in pair:
        functional.reset_net(model)
    for _ in range(3):
        for batch in (1, 2, 3):
            assert_twins(*pair, images(batch=batch), calls=1)
    plans = {id(plan) for plan in fusion_of(pair[1]).plans.values()}
    assert_twins(*pair, images(batch=1), calls=1)
    assert {id(plan) for plan in fusion_of(pair[1]).plans.values()} == plans
    assert is_fused(pair[1])


def test_dropped_plans_are_freed(pair):
    _, ours = pair
    plans = []
    for batch in range(1, 12):
        for _ in range(2):
            functional.reset_net(ours)
            outputs(ours, images(batch=batch))
        plans.append(weakref.ref(program(ours)))
    gc.collect()
    assert sum(plan() is not None for plan in plans) == 8
