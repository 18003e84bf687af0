"""A re-rolled graph does what the loop did: outputs, state left behind, and a second call; and layers run once."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparseflow.frameworks import register_neuron, unregister_neuron
from sparseflow.graph import trace
from sparseflow.graph.reroll import reroll
from sparseflow.graph.timeops import neuron_sequence

from ..nets import Function
from .loops import Lif, N, Passing, T, calls, count, layers, rolled, sequences, states


def test_a_plain_loop_runs_every_layer_once():
    net = Function(lambda s, x: torch.stack([s.sn2(s.fc2(s.sn1(s.fc1(step)))) for step in x]), **layers())
    graph = rolled(net, torch.rand(T, N, 4))
    assert calls(graph) == {"fc1": 1, "fc2": 1}
    assert sequences(graph) == ["sn1", "sn2"]
    assert count(graph, torch.stack) == 0


def test_any_batch_size():
    net = Function(lambda s, x: torch.stack([s.sn1(s.fc1(x[t])).view(x.size(1), -1) for t in range(T)]), **layers())
    graph = reroll(trace(net, (torch.rand(T, N, 4),)), (torch.rand(T, N, 4),))
    x = torch.rand(T, 7, 4)
    with torch.no_grad():
        expected = copy.deepcopy(net)(x)
        assert torch.equal(graph(x), expected)


def test_the_same_input_at_every_step_is_computed_once():
    def direct(s, x):
        return sum(s.sn2(s.fc2(s.sn1(s.fc1(x)))) for _ in range(T)) / T

    graph = rolled(Function(direct, **layers()), torch.rand(N, 4))
    assert calls(graph) == {"fc1": 1, "fc2": 1}
    (expand,) = [node for node in graph.graph.nodes if node.target == "expand"]
    assert expand.args[1:] == (T, -1, -1)
    assert next(iter(expand.users)).target is neuron_sequence


SLICES = {
    "index": lambda x: [x[t] for t in range(T)],
    "iterate": lambda x: list(x),
    "unbind": lambda x: list(x.unbind(0)),
    "unbind_dim": lambda x: list(torch.unbind(x.transpose(0, 1), dim=1)),
    "second": lambda x: [x.transpose(0, 1)[:, t] for t in range(T)],
    "ellipsis": lambda x: [x.permute(1, 2, 0)[..., t] for t in range(T)],
    "negative": lambda x: [x[t - T] for t in range(T)],
    "part": lambda x: [x[t] for t in range(1, T)],
}


@pytest.mark.parametrize("name", SLICES)
def test_slices_in_order_are_the_sequence(name):
    net = Function(lambda s, x: torch.stack([s.sn1(s.fc1(step)) for step in SLICES[name](x)]), **layers())
    graph = rolled(net, torch.rand(T, N, 4))
    assert calls(graph) == {"fc1": 1}
    assert sequences(graph) == ["sn1"]


@pytest.mark.parametrize("order", [range(T - 1, -1, -1), (0, 2, 1, 4, 3)])
def test_slices_in_another_order_keep_the_order_of_the_neuron(order):
    net = Function(lambda s, x: torch.stack([s.sn1(s.fc1(x[t])) for t in order]), **layers())
    graph = rolled(net, torch.rand(T, N, 4))
    assert sequences(graph) == []
    assert calls(graph) == {"fc1": 1, "sn1": T}


def test_an_input_given_several_steps_in_a_row():
    net = Function(lambda s, x: torch.stack([s.sn1(s.fc1(x[t])) for t in (0, 0, 1, 1, 1)]), **layers())
    graph = rolled(net, torch.rand(2, N, 4))
    assert calls(graph) == {"fc1": 1}
    assert sequences(graph) == ["sn1", "sn1"]


@pytest.mark.parametrize("dim", [0, 1, -1, 2])
def test_stacks_along_any_dimension(dim):
    graph = rolled(
        Function(lambda s, x: torch.stack([s.sn1(s.fc1(step)) for step in x], dim), **layers()), torch.rand(T, N, 4)
    )
    assert count(graph, torch.stack) == 0
    assert count(graph, "movedim") == (dim != 0)


def accumulate_zero(s, steps):
    total = 0
    for step in steps:
        total = total + step
    return total / len(steps)


def accumulate_in_place(s, steps):
    total = torch.zeros(N, 6)
    for step in steps:
        total += step
    return total


def accumulate_first(s, steps):
    total = steps[0]
    for step in steps[1:]:
        total = step + total
    return total


@pytest.mark.parametrize("how", [accumulate_zero, accumulate_in_place, accumulate_first, lambda s, steps: sum(steps)])
def test_sums_over_the_steps(how):
    net = Function(lambda s, x: how(s, [s.sn1(s.fc1(step)) for step in x]), **layers())
    graph = rolled(net, torch.rand(T, N, 4))
    assert count(graph, "sum") == 1
    assert len(list(graph.graph.nodes)) < 14


def test_sums_on_the_way_that_are_used_stay():
    def cumulative(s, x):
        total, seen = torch.zeros(N, 6), []
        for step in x:
            total = total + s.sn1(s.fc1(step))
            seen.append(total)
        return torch.stack(seen)

    graph = rolled(Function(cumulative, **layers()), torch.rand(T, N, 4))
    assert calls(graph) == {"fc1": 1}
    assert count(graph, "sum") == 0


def test_state_passing():
    def passing(s, x):
        mem, spikes, mems = None, [], []
        for step in x:
            spike, mem = s.sn(s.fc1(step), mem)
            spikes.append(spike)
            mems.append(mem)
        return torch.stack(spikes), torch.stack(mems), mem

    graph = rolled(Function(passing, fc1=nn.Linear(4, 6), sn=Passing()), torch.rand(T, N, 4))
    assert calls(graph) == {"fc1": 1}
    assert sequences(graph) == ["sn"]


def test_a_given_initial_state():
    def passing(s, x):
        mem = torch.ones(N, 6)
        for step in x:
            spike, mem = s.sn(s.fc1(step), mem=mem)
        return spike, mem

    graph = rolled(Function(passing, fc1=nn.Linear(4, 6), sn=Passing()), torch.rand(T, N, 4))
    (node,) = [n for n in graph.graph.nodes if n.target is neuron_sequence]
    assert node.args[2].target is torch.ones


def interrupted(s, x):
    mem, out = None, []
    for t, step in enumerate(x):
        spike, mem = s.sn(s.fc1(step), mem if t != 2 else None)
        out.append(spike)
    return torch.stack(out)


def decayed(s, x):
    mem, out = None, []
    for step in x:
        spike, mem = s.sn(s.fc1(step), mem)
        mem = mem * 0.5
        out.append(spike)
    return torch.stack(out)


def constant_state(s, x):
    mem = torch.zeros(N, 6)
    return torch.stack([s.sn(s.fc1(step), mem)[0] for step in x])


def skipping(s, x):
    """The state of two steps ago."""
    mems, out = [None, None], []
    for step in x:
        spike, mem = s.sn(s.fc1(step), mems[-2])
        mems.append(mem)
        out.append(spike)
    return torch.stack(out)


@pytest.mark.parametrize("forward", [interrupted, decayed, constant_state, skipping])
def test_states_that_are_not_handed_on_stay_stepwise(forward):
    graph = rolled(Function(forward, fc1=nn.Linear(4, 6), sn=Passing()), torch.rand(T, N, 4))
    assert calls(graph) == {"fc1": 1, "sn": T}
    assert sequences(graph) == []


def feedback(s, x):
    spike, out = torch.zeros(N, 6), []
    for step in x:
        spike = s.sn1(s.fc1(step) + s.back(spike))
        out.append(s.sn2(s.fc2(spike)))
    return torch.stack(out)


def test_feedback_stays_stepwise_and_the_rest_does_not():
    graph = rolled(Function(feedback, back=nn.Linear(6, 6), **layers()), torch.rand(T, N, 4))
    assert calls(graph) == {"fc1": 1, "back": T, "sn1": T, "fc2": 1}
    assert sequences(graph) == ["sn2"]


def test_feedback_from_the_end_to_the_start():
    def forward(s, x):
        out = [torch.zeros(N, 3)]
        for step in x:
            out.append(s.sn2(s.fc2(s.sn1(s.fc1(step + s.back(out[-1]))))))
        return torch.stack(out[1:])

    net = Function(forward, back=nn.Linear(3, 4), **layers())
    assert rolled(net, torch.rand(T, N, 4)) is None


def test_residual_around_a_recurrence():
    def forward(s, x):
        spike, out = torch.zeros(N, 6), []
        for step in x:
            current = s.fc1(step)
            spike = s.sn1(current + s.back(spike))
            out.append(s.sn2(s.fc2(spike + current)))
        return torch.stack(out)

    graph = rolled(Function(forward, back=nn.Linear(6, 6), **layers()), torch.rand(T, N, 4))
    assert calls(graph) == {"fc1": 1, "back": T, "sn1": T, "fc2": 1}


def convolutional(s, x):
    out = []
    for step in x:
        y = F.max_pool2d(s.conv(step), 2)
        y = s.drop(F.relu(s.norm(y)))
        y = F.avg_pool2d(s.sn1(y), kernel_size=2)
        y = F.dropout(y, 0.5, s.training)
        y = torch.cat([y, y * 2 + 1], dim=1).clamp(0, 3)
        y = y.view(y.size(0), -1) if s.training else y.flatten(1)
        out.append(y.mean(1, keepdim=True) + s.gain)
    return torch.stack(out, 1)


def convolutional_net():
    net = Function(
        convolutional, conv=nn.Conv2d(2, 4, 3, padding=1), norm=nn.BatchNorm2d(4), drop=nn.Dropout(), sn1=Lif()
    )
    net.gain = nn.Parameter(torch.rand(1))
    net.norm.running_mean.uniform_()
    return net


def test_functions_that_act_on_samples_alone():
    graph = rolled(convolutional_net().eval(), torch.rand(T, N, 2, 8, 8))
    assert calls(graph) == {"conv": 1, "norm": 1, "drop": 1}
    assert count(graph, torch.stack) == 0
    assert max(Counter(str(n.target) for n in graph.graph.nodes if "pool" in str(n.target)).values()) == 1


def test_batch_norm_and_dropout_in_training_stay_stepwise():
    graph = rolled(convolutional_net().train(), torch.rand(T, N, 2, 8, 8))
    assert calls(graph)["conv"] == 1
    assert (calls(graph)["norm"], calls(graph)["drop"]) == (T, T)


def test_random_numbers_are_drawn_in_the_same_order():
    def forward(s, x):
        out = []
        for step in x:
            noisy = s.fc1(step) + torch.rand(N, 6)
            out.append(s.fc2(F.dropout(s.sn1(noisy))))
        return torch.stack(out)

    net, x = Function(forward, **layers()), torch.rand(T, N, 4)
    graph = reroll(trace(net, (x,)), (x,))
    assert calls(graph)["fc1"] == 1
    reference = copy.deepcopy(net)
    with torch.no_grad():
        torch.manual_seed(7)
        expected = reference(x)
        torch.manual_seed(7)
        torch.testing.assert_close(graph(x), expected)


def test_operations_that_are_not_known_run_step_by_step_between_batched_layers():
    def forward(s, x):
        return torch.stack([s.sn2(s.fc2(torch.fft.fft(s.sn1(s.fc1(step))).real)) for step in x])

    graph = rolled(Function(forward, **layers()), torch.rand(T, N, 4))
    assert calls(graph) == {"fc1": 1, "fc2": 1}
    assert sequences(graph) == ["sn1", "sn2"]
    assert count(graph, torch.fft.fft) == T
    assert count(graph, torch.stack) == 1


def mutates_input(s, x):
    for t in range(T):
        x[t] *= 0.5
    return torch.stack([s.sn1(s.fc1(x[t])) for t in range(T)])


def in_place_alias(s, x):
    out = []
    for step in x:
        y = s.fc1(step)
        before = y
        y += 1
        out.append(s.sn1(before))
    return torch.stack(out)


def in_place_list(s, x):
    total, seen = torch.zeros(N, 6), []
    for step in x:
        total += s.sn1(s.fc1(step))
        seen.append(total)
    return torch.stack(seen)


def in_place_buffer(s, x):
    buffer = torch.zeros(T, N, 6)
    for t in range(T):
        buffer[t] = s.sn1(s.fc1(x[t]))
        buffer[0] += 1
    return buffer


@pytest.mark.parametrize("forward", [mutates_input, in_place_alias, in_place_list, in_place_buffer])
def test_writing_in_place_is_respected(forward):
    rolled(Function(forward, **layers()), torch.rand(T, N, 4))


def test_in_place_activations_and_residuals_are_batched():
    def forward(s, x):
        out = []
        for step in x:
            y = s.fc1(step)
            y += s.relu(s.fc1(step))
            y = F.relu(y, inplace=True).mul_(0.5)
            out.append(s.sn1(y))
        return torch.stack(out)

    graph = rolled(Function(forward, relu=nn.ReLU(inplace=True), **layers()), torch.rand(T, N, 4))
    assert calls(graph) == {"fc1": 2, "relu": 1}
    assert sequences(graph) == ["sn1"]


def test_an_in_place_layer_does_not_reach_what_others_read():
    def forward(s, x):
        out = []
        for step in x:
            y = s.fc1(step)
            z = y * 2
            out.append(s.sn1(s.relu(y) - z))
        return torch.stack(out)

    rolled(Function(forward, relu=nn.ReLU(inplace=True), **layers()), torch.rand(T, N, 4) - 0.5)


def twice_a_step(s, x):
    return torch.stack([s.sn1(s.fc(s.sn1(s.fc(step)))) for step in x])


def shared_layer(s, x):
    return torch.stack([s.sn2(s.fc(s.sn1(s.fc(step)))) for step in x])


def two_loops(s, x):
    first = [s.sn1(s.fc(step)) for step in x]
    second = [s.sn1(s.fc(spike)) for spike in first]
    return torch.stack(first), torch.stack(second)


def warm_up(s, x):
    for step in x:
        s.sn1(s.fc(step))
    return torch.stack([s.sn1(s.fc(step)) for step in x])


def last_only(s, x):
    for step in x:
        spike = s.sn1(s.fc(step))
    return s.fc(spike)


def delayed(s, x):
    out = [torch.zeros(N, 4)]
    for step in x:
        out.append(s.sn1(s.fc(step) + 0.5 * x[0]) + out[-1].detach() * 0)
    return torch.stack(out)


@pytest.mark.parametrize("forward", [twice_a_step, shared_layer, two_loops, warm_up, last_only, delayed])
def test_modules_called_at_several_places(forward):
    rolled(Function(forward, fc=nn.Linear(4, 4), sn1=Lif(), sn2=Lif()), torch.rand(T, N, 4))


def test_shared_layers_are_batched_at_each_place():
    graph = rolled(Function(shared_layer, fc=nn.Linear(4, 4), sn1=Lif(), sn2=Lif()), torch.rand(T, N, 4))
    assert calls(graph) == {"fc": 2}
    assert sequences(graph) == ["sn1", "sn2"]


def test_a_neuron_of_two_loops_goes_on_where_the_first_ended():
    graph = rolled(Function(two_loops, fc=nn.Linear(4, 4), sn1=Lif()), torch.rand(T, N, 4))
    assert calls(graph) == {"fc": 2}
    assert sequences(graph) == ["sn1", "sn1"]


def test_nothing_to_roll():
    net = nn.Sequential(nn.Linear(4, 4), Lif(), nn.Linear(4, 2))
    x = torch.rand(N, 4)
    assert reroll(trace(net, (x,)), (x,)) is None
    one = Function(lambda s, x: torch.stack([s.sn1(s.fc1(step)) for step in x]), **layers())
    assert reroll(trace(one, (x[None],)), (x[None],)) is None


def test_the_graph_given_is_not_changed():
    net = Function(feedback, back=nn.Linear(6, 6), **layers())
    x = torch.rand(T, N, 4)
    graph = trace(net, (x,))
    before = str(graph.graph)
    state = {key: value.clone() for key, value in states(net).items()}
    assert reroll(graph, (x,)) is not None
    assert str(graph.graph) == before
    assert all(torch.equal(value, state[key]) for key, value in states(net).items())


def test_keyword_arguments_and_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.sn = nn.Linear(4, 4), Lif()

        def forward(self, x, y=None, *, gain=1.0):
            return torch.stack([self.sn(self.fc(a + b * gain)) for a, b in zip(x, y, strict=True)])

    net, x, y = Two(), torch.rand(T, N, 4), torch.rand(T, N, 4)
    kwargs = {"y": y, "gain": 0.5}
    graph = reroll(trace(net, (x,), kwargs), (x,), kwargs)
    assert calls(graph) == {"fc": 1}
    with torch.no_grad():
        torch.testing.assert_close(graph(x, **kwargs), copy.deepcopy(net)(x, **kwargs))


def test_a_neuron_that_writes_into_what_it_returned_stays_stepwise():
    class Reusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("v", torch.zeros(N, 6))

        def forward(self, x):
            self.v.mul_(0.5).add_(x)
            return self.v

    register_neuron(Reusing)
    try:
        net = Function(lambda s, x: [s.fc2(s.sn(s.fc1(step))) for step in x], sn=Reusing(), **layers())
        graph = rolled(net, torch.rand(T, N, 4))
        assert graph is None or "sn" not in sequences(graph)
    finally:
        unregister_neuron(Reusing)
