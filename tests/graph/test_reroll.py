"""A re-rolled graph does what the loop did: outputs, state left behind, and a second call; and layers run once."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparseflow.frameworks import register_neuron, state_tensors, unregister_neuron
from sparseflow.graph import trace
from sparseflow.graph.reroll import reroll
from sparseflow.graph.timeops import neuron_sequence

T, N = 5, 2


class Lif(nn.Module):
    """Keeps its state in itself, as SpikingJelly's neurons do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("v", torch.zeros(0))

    def forward(self, x):
        v = 0.5 * self.v + x if self.v.shape == x.shape else x
        spike = (v >= 0.5).to(x.dtype)
        self.v = v - spike * 0.5
        return spike


class Passing(nn.Module):
    """Takes and returns its state, as snnTorch's neurons do."""

    def forward(self, x, mem=None):
        mem = x if mem is None else 0.5 * mem + x
        spike = (mem > 0.5).to(x.dtype)
        return spike, mem - spike * 0.5


@pytest.fixture(autouse=True, scope="module")
def registered():
    register_neuron(Lif)
    register_neuron(Passing)
    yield
    unregister_neuron(Lif)
    unregister_neuron(Passing)


class Function(nn.Module):
    """A forward given as a function of the module and the input."""

    def __init__(self, forward, **children):
        super().__init__()
        self.function = forward
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.function(self, x)


def leaves(value):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def states(net):
    return {f"{name}.{key}": v for name, m in net.named_modules() for key, v in state_tensors(m).items()}


def rolled(net, x):
    """The re-rolled graph of ``net``, after comparing it with the loop on the example, other data and another N."""
    graph = reroll(trace(net, (x,)), (x,))
    if graph is None:
        return None
    start = states(net)
    for scale in (1.0, 0.4):
        reference = copy.deepcopy(net)
        data = x * scale
        with torch.no_grad():
            for call in range(2):
                expected, actual = (leaves(seeded(call, callee, data.clone())) for callee in (reference, graph))
                compare(expected, actual)
                compare(list(states(reference).values()), list(states(net).values()))
        restore(net, start)
    return graph


def seeded(seed, callee, *args):
    torch.manual_seed(seed)
    return callee(*args)


def restore(net, before):
    for name, module in net.named_modules():
        for key in state_tensors(module):
            setattr(module, key, before.get(f"{name}.{key}", torch.zeros(0)))


def compare(expected, actual):
    assert len(expected) == len(actual)
    for a, b in zip(expected, actual, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def calls(graph):
    return Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_module")


def sequences(graph):
    return [str(n.args[0].target) for n in graph.graph.nodes if n.target is neuron_sequence]


def count(graph, target):
    return sum(node.target == target for node in graph.graph.nodes)


def layers():
    return {"fc1": nn.Linear(4, 6), "sn1": Lif(), "fc2": nn.Linear(6, 3), "sn2": Lif()}


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


# --- The frameworks --------------------------------------------------------------------------------------------------


@pytest.fixture
def snn():
    return pytest.importorskip("snntorch")


@pytest.fixture
def sj():
    return pytest.importorskip("spikingjelly.activation_based.neuron")


def loud(net):
    """Weights large enough that the neurons fire."""
    torch.manual_seed(2)
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, 0.2, 1.0)
    return net


def tutorial5(s, x):
    mem1, mem2 = s.lif1.init_leaky(), s.lif2.init_leaky()
    spikes, mems = [], []
    for _ in range(T):
        spike, mem1 = s.lif1(s.fc1(x), mem1)
        spike, mem2 = s.lif2(s.fc2(spike), mem2)
        spikes.append(spike)
        mems.append(mem2)
    return torch.stack(spikes, dim=0), torch.stack(mems, dim=0)


def tutorial6(s, x):
    mem1, mem2, mem3 = s.lif1.init_leaky(), s.lif2.reset_mem(), s.lif3.init_leaky()
    spikes, mems = [], []
    for _ in range(T):
        spike, mem1 = s.lif1(F.max_pool2d(s.conv1(x), 2), mem1)
        spike, mem2 = s.lif2(F.max_pool2d(s.conv2(spike), 2), mem2)
        spike, mem3 = s.lif3(s.fc1(spike.view(x.size(0), -1)), mem3)
        spikes.append(spike)
        mems.append(mem3)
    return torch.stack(spikes), torch.stack(mems)


@pytest.mark.parametrize("options", [{}, {"reset_mechanism": "zero"}, {"reset_delay": False}, {"threshold": 0.3}])
def test_snntorch_tutorial_5(snn, options):
    def leaky():
        return snn.Leaky(beta=0.9, **options)

    parts = {"fc1": nn.Linear(6, 8), "lif1": leaky(), "fc2": nn.Linear(8, 3), "lif2": leaky()}
    graph = rolled(loud(Function(tutorial5, **parts)), torch.rand(N, 6))
    assert calls(graph) == {"fc1": 1, "fc2": 1}
    assert sequences(graph) == ["lif1", "lif2"]
    assert count(graph, torch.stack) == 0


def test_snntorch_tutorial_6(snn):
    parts = {f"lif{i}": snn.Leaky(beta=0.5) for i in (1, 2, 3)}
    parts |= {"conv1": nn.Conv2d(1, 4, 5), "conv2": nn.Conv2d(4, 6, 5), "fc1": nn.Linear(6 * 4 * 4, 10)}
    graph = rolled(loud(Function(tutorial6, **parts)), torch.rand(N, 1, 28, 28))
    assert calls(graph) == {"conv1": 1, "conv2": 1, "fc1": 1}
    assert sequences(graph) == ["lif1", "lif2", "lif3"]
    first = next(node for node in graph.graph.nodes if node.target is neuron_sequence)
    assert first.args[1].target == "expand"
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"].count(torch.stack) == 0


SNN = {
    "Leaky": (lambda snn: snn.Leaky(beta=0.9), "init_leaky"),
    "Lapicque": (lambda snn: snn.Lapicque(beta=0.9, threshold=0.2), "init_lapicque"),
    "Synaptic": (lambda snn: snn.Synaptic(alpha=0.8, beta=0.9), "init_synaptic"),
    "Alpha": (lambda snn: snn.Alpha(alpha=0.9, beta=0.8, threshold=0.1), "init_alpha"),
    "RLeaky": (lambda snn: snn.RLeaky(beta=0.9, linear_features=6), "init_rleaky"),
    "RSynaptic": (lambda snn: snn.RSynaptic(alpha=0.8, beta=0.9, linear_features=6), "init_rsynaptic"),
    "SLSTM": (lambda snn: snn.SLSTM(6, 6, threshold=0.1), "init_slstm"),
}


@pytest.mark.parametrize("name", SNN)
@pytest.mark.parametrize("direct", [True, False])
def test_snntorch_neurons_pass_all_their_states(snn, name, direct):
    make, init = SNN[name]

    def forward(s, x):
        state = getattr(s.lif, init)()
        state = state if isinstance(state, tuple) else (state,)
        recorded = []
        for t in range(T):
            spike, *rest = s.lif(s.fc1(x if direct else x[t]), *state)
            state = (spike, *rest) if name.startswith("R") else tuple(rest)
            recorded.append(s.fc2(spike))
        return torch.stack(recorded), state

    parts = {"fc1": nn.Linear(4, 6), "lif": make(snn), "fc2": nn.Linear(6, 3)}
    graph = rolled(loud(Function(forward, **parts)), torch.rand(N, 4) if direct else torch.rand(T, N, 4))
    assert calls(graph) == {"fc1": 1, "fc2": 1}
    assert sequences(graph) == ["lif"]


def test_delta_leaky_passes_a_tuple(snn):
    def forward(s, x):
        state, spikes = s.lif.reset_mem(), []
        for step in x:
            spike, state = s.lif(s.fc1(step), state)
            spikes.append(spike)
        return torch.stack(spikes), state

    net = Function(forward, fc1=nn.Linear(4, 6), lif=snn.DeltaLeaky(beta=0.9, delta_threshold=0.1))
    graph = rolled(net, torch.rand(T, N, 4))
    assert sequences(graph) == ["lif"]


def test_spikes_fed_back_through_a_layer_stay_stepwise(snn):
    def forward(s, x):
        mem1, mem2, spike = s.lif1.reset_mem(), s.lif2.reset_mem(), torch.zeros(N, 6)
        spikes = []
        for step in x:
            spike, mem1 = s.lif1(s.fc1(step) + s.back(spike), mem1)
            out, mem2 = s.lif2(s.fc2(spike), mem2)
            spikes.append(out)
        return torch.stack(spikes), mem1, mem2

    parts = {"fc1": nn.Linear(4, 6), "back": nn.Linear(6, 6), "fc2": nn.Linear(6, 3)}
    net = Function(forward, lif1=snn.Leaky(beta=0.9), lif2=snn.Leaky(beta=0.9), **parts)
    graph = rolled(loud(net), torch.rand(T, N, 4))
    assert calls(graph) == {"fc1": 1, "back": T, "lif1": T, "fc2": 1}
    assert sequences(graph) == ["lif2"]


@pytest.mark.parametrize("method", ["reset_mem", "reset_hidden"])
def test_a_reset_in_the_middle_cuts_the_sequence(snn, method):
    def forward(s, x):
        s.lif.reset_mem()
        out = []
        for t, step in enumerate(x):
            if t == 2:
                getattr(s.lif, method)()
            out.append(s.fc2(s.lif(s.fc1(step))))
        return torch.stack(out)

    net = Function(forward, fc1=nn.Linear(4, 6), lif=snn.Leaky(beta=0.9, init_hidden=True), fc2=nn.Linear(6, 2))
    x = torch.rand(T, N, 4)
    graph = reroll(trace(loud(net), (x,)), (x,))
    assert calls(graph) == {"fc1": 1, "lif": T, "fc2": 1}
    with torch.no_grad():  # not with a copy: snnTorch resets those that were made by a constructor
        torch.testing.assert_close(graph(x), net(x))


def test_a_reset_before_the_loop_stays_before_it(snn):
    def forward(s, x):
        s.lif.reset_mem()
        return torch.stack([s.fc2(s.lif(s.fc1(step))) for step in x])

    net = Function(forward, fc1=nn.Linear(4, 6), lif=snn.Leaky(beta=0.9, init_hidden=True), fc2=nn.Linear(6, 2))
    graph = rolled(loud(net), torch.rand(T, N, 4))
    assert calls(graph) == {"fc1": 1, "fc2": 1}
    assert sequences(graph) == ["lif"]


def test_a_mixed_model_batches_what_it_can(snn, sj):
    def forward(s, x):
        mem, count, previous = s.lif.reset_mem(), 0, torch.zeros(N, 6)
        for t in range(T):
            spike, mem = s.lif(s.fc1(x[:, t]), mem)
            gated = torch.fft.ifft(torch.fft.fft(spike)).real + previous
            previous = s.sn(s.fc2(gated))
            count = count + s.fc3(previous + spike)
        return count / T, mem

    parts = {"fc1": nn.Linear(4, 6), "fc2": nn.Linear(6, 6), "fc3": nn.Linear(6, 2)}
    net = loud(Function(forward, lif=snn.Leaky(beta=0.9), sn=sj.LIFNode(), **parts))
    graph = rolled(net, torch.rand(N, T, 4))
    assert calls(graph) == {"fc1": 1, "fc2": T, "sn": T, "fc3": 1}
    assert sequences(graph) == ["lif"]
    assert count(graph, "sum") == 1


@pytest.mark.parametrize("name", ["IFNode", "LIFNode", "ParametricLIFNode", "KLIFNode", "IzhikevichNode"])
def test_spikingjelly_single_step_loops(sj, name):
    make = getattr(sj, name)
    parts = {"fc1": nn.Linear(4, 6), "sn1": make(), "fc2": nn.Linear(6, 3), "sn2": make()}
    net = loud(Function(lambda s, x: sum(s.sn2(s.fc2(s.sn1(s.fc1(step)))) for step in x) / T, **parts))
    graph = rolled(net, torch.rand(T, N, 4))
    assert calls(graph) == {"fc1": 1, "fc2": 1}
    assert sequences(graph) == ["sn1", "sn2"]


def test_multi_step_networks_have_nothing_to_roll(sj):
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    net = nn.Sequential(layer.Conv2d(1, 2, 3), layer.BatchNorm2d(2), sj.LIFNode(), layer.Flatten(), layer.Linear(72, 2))
    functional.set_step_mode(net.eval(), "m")
    x = torch.rand(T, N, 1, 8, 8)
    assert reroll(trace(net, (x,)), (x,)) is None


def test_a_spiking_resnet_in_a_loop(sj):
    zoo = pytest.importorskip("tests.graph.zoo")
    model, x = zoo.build("spiking_resnet", "s")
    net = Function(lambda s, x: sum(s.model(x) for _ in range(T)) / T, model=model).eval()
    graph = rolled(net, x)
    assert set(calls(graph).values()) == {1}
    assert calls(graph) == {name: 1 for name in calls(trace(net, (x,))) if not name.split(".")[-1].startswith("sn")}
    assert all(name.split(".")[-1].startswith("sn") for name in sequences(graph))


@pytest.mark.parametrize("framework", ["snntorch", "spikingjelly"])
def test_a_spike_flipped_by_rounding_is_judged_in_float64(framework, request, monkeypatch):
    """A layer that rounds differently on a larger batch, as matrix products do, at the very threshold."""

    class Batchwise(nn.Linear):
        def _rounding(self, x):
            return (1 + 2e-7 * len(x)) if x.dtype is torch.float32 else 1.0

    def forward(module, x):
        return F.linear(x, module.weight, module.bias) * module._rounding(x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    monkeypatch.setattr(nn.Linear, "_rounding", Batchwise._rounding, raising=False)
    neurons = request.getfixturevalue("snn" if framework == "snntorch" else "sj")
    sn = neurons.Leaky(beta=0.9, init_hidden=True) if framework == "snntorch" else neurons.IFNode()
    net = Function(lambda s, x: torch.stack([s.fc2(s.sn(s.fc1(step))) for step in x]), **layers(), sn=sn)
    nn.init.zeros_(net.fc1.weight)
    nn.init.constant_(net.fc1.bias, 1.0 - 6e-7)
    x = torch.rand(T, N, 4)
    graph = trace(net, (x,))
    batched = reroll(graph, (x,))
    assert batched is not None
    with torch.no_grad():
        assert not torch.allclose(graph(x), batched(x)), "no spike has flipped"


# --- Drawn networks --------------------------------------------------------------------------------------------------

WIDTH = 4
OPERATIONS = ("fc", "hidden", "passing", "relu", "add", "scale", "back", "norm", "shared", "odd", "previous", "inplace")


class Drawn(nn.Module):
    """A loop whose body is a list of operations on earlier values of the same step, or of the step before."""

    def __init__(self, body, direct, ending):
        super().__init__()
        self.body, self.direct, self.ending = body, direct, ending
        makers = {"hidden": Lif, "passing": Passing, "norm": lambda: nn.BatchNorm1d(WIDTH)}
        self.parts = nn.ModuleList(makers.get(op, lambda: nn.Linear(WIDTH, WIDTH))() for op, _, _ in body)
        self.shared = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        steps = [x] * 3 if self.direct else list(x)
        mems = [None] * len(self.body)
        before = [torch.zeros(N, WIDTH, dtype=x.dtype)] * (len(self.body) + 1)
        outputs = []
        for step in steps:
            values = [step]
            for i, (op, first, second) in enumerate(self.body):
                a, b = values[first % len(values)], values[second % len(values)]
                values.append(self.apply_operation(op, i, a, b, before, mems, second))
            before = values
            outputs.append(values[-1])
        return self.finish(outputs)

    def apply_operation(self, op, i, a, b, before, mems, second):
        if op in ("fc", "norm", "hidden"):
            return self.parts[i](a)
        if op == "passing":
            spike, mems[i] = self.parts[i](a, mems[i])
            return spike
        if op == "back":
            return a + self.parts[i](before[second % len(before)])
        if op == "previous":
            return a - before[second % len(before)]
        if op == "inplace":
            y = self.parts[i](a)
            y += b
            return y
        simple = {
            "relu": lambda: F.relu(a),
            "add": lambda: a + b,
            "scale": lambda: a * 0.5,
            "shared": lambda: self.shared(a),
            "odd": lambda: torch.flip(a, (1,)),
        }
        return simple[op]()

    def finish(self, outputs):
        if self.ending == "stack":
            return torch.stack(outputs)
        if self.ending == "sum":
            return sum(outputs)
        return outputs[-1], outputs[0]


bodies = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=7)


@settings(max_examples=80, deadline=None)
@given(body=bodies, direct=st.booleans(), ending=st.sampled_from(["stack", "sum", "last"]), seed=st.integers(0, 99))
def test_drawn_networks(body, direct, ending, seed):
    torch.manual_seed(seed)
    net = Drawn(body, direct, ending).double().eval()
    rolled(net, torch.rand(*([] if direct else [3]), N, WIDTH, dtype=torch.float64))
