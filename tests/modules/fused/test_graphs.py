"""Fused plans that are replayed: everything but CUDA itself, for which tapes of PyTorch's operations stand in."""

from __future__ import annotations

import contextlib
import copy
import io
import weakref

import pytest
import snntorch
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import nn

import sparseflow
from sparseflow.modules.fused import graphs as graphs_module
from sparseflow.modules.fused import model as fused_model
from sparseflow.modules.fused.block import BlockRun
from sparseflow.modules.fused.constants import Watched
from sparseflow.modules.fused.graphs import WARM_UP, CudaGraphs
from sparseflow.modules.fused.model import fusion_of
from sparseflow.plan import Path

from .nets import (
    Net,
    assert_equal,
    conv,
    features,
    images,
    is_fused,
    leaky,
    lif,
    linear,
    norm,
    on_grid,
    outputs,
    program,
    spikes,
    states,
    stem,
    twins,
)
from .nets import assert_twins as assert_twins_holding_states
from .taped import TapedGraphs, TorchOps

pytestmark = pytest.mark.filterwarnings("ignore::sparseflow.NothingAcceleratedWarning")


def first_step(block, x):
    """As on a GPU, where only the strides say that all steps are equal."""
    return x[:1] if block.block.steps > 1 and x.shape[0] == block.block.steps and x.stride(0) == 0 else None


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """What plans made in the test capture and replay with."""
    found = TapedGraphs()
    monkeypatch.setattr(fused_model, "graphs_for", lambda device: found)
    monkeypatch.setattr(fused_model, "block_ops", lambda *_: (TorchOps(), ""))
    monkeypatch.setattr(BlockRun, "_on_spikes", BlockRun._on_device)
    monkeypatch.setattr(BlockRun, "_first_step", first_step)
    return found


def run(m, x):
    return m.n1(m.b1(m.c1(spikes(m, x))))


class Small(Net):
    """Can be pickled: its forward has a name."""

    def __init__(self, run=run):
        super().__init__(run, **stem(), c1=conv(8, 8), b1=norm(8), n1=lif())


@pytest.fixture
def pair():
    dense, ours = twins(on_grid(Small()), images())
    assert_twins(dense, ours, images(), calls=WARM_UP)
    return dense, ours


def replayed(model):
    return fusion_of(model).last.replayed


def note(model):
    return next(line for line in sparseflow.report(model).notes if "CUDA graph" in line)


def assert_twins(dense, ours, x, calls=2):
    """Equal outputs and states; no state is held from call to call, for which it would have to move."""
    for _ in range(calls):
        assert_twins_holding_states(dense, ours, x, calls=1)


def replays(graphs, call):
    """How many replays ``call`` takes."""
    before = graphs.replays
    call()
    return graphs.replays - before


def test_the_third_call_from_the_same_start_replays(graphs):
    dense, ours = twins(on_grid(Small()), images())
    counts = []
    for seed in range(12):
        if seed in (0, 3, 9):
            functional.reset_net(dense)
            functional.reset_net(ours)
        counts.append(replays(graphs, lambda seed=seed: assert_twins(dense, ours, images(seed=seed), calls=1)))
    # fresh, on, on (captured); fresh (captured), on ...; fresh again
    assert counts == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    assert graphs.captures == 2
    assert note(ours) == "replayed as a CUDA graph"


# ---- nets


def sew(m, x):
    s = spikes(m, x)
    out = s + m.n1(m.b1(m.c1(s)))
    return m.fc(F.adaptive_avg_pool2d((out + m.n2(m.c2(out))).flatten(0, 1), 1).flatten(1))


def logical(m, x):
    a, b = m.n1(m.c1(spikes(m, x))), m.n2(m.c2(spikes(m, x)))
    return m.n3(m.c3(torch.cat([a * b, (1 - a) * b], 2)))


def pooled(m, x):
    return m.n1(m.c1(m.pool(spikes(m, x)))).flatten(2)


def loop(m, x):
    mem1, mem2 = m.n1.init_leaky(), m.n2.init_leaky()
    found, membranes = [], []
    for step in x:
        s, mem1 = m.n1(m.f1(step), mem1)
        s, mem2 = m.n2(m.f2(s), mem2)
        found.append(s)
        membranes.append(mem2)
    return torch.stack(found), torch.stack(membranes), mem1


def twice(m, x):
    """One neuron in two places."""
    return m.n1(m.c2(m.n1(m.c1(spikes(m, x)))))


def two():
    return {"c1": conv(8, 8), "n1": lif(), "c2": conv(8, 8), "n2": lif()}


STEP = features(1)[0]
NETS = {
    "small": (Small, images()),
    "sew": (lambda: Net(sew, **stem(), **two(), b1=norm(8), fc=nn.Linear(8, 4)), images()),
    "logical": (lambda: Net(logical, **stem(), **two(), c3=conv(16, 8), n3=lif()), images()),
    "pooled": (lambda: Net(pooled, **stem(), pool=nn.MaxPool3d((1, 2, 2)), c1=conv(8, 8), n1=lif()), images()),
    "loop": (lambda: Net(loop, f1=nn.Linear(6, 16), n1=leaky(), f2=nn.Linear(16, 8), n2=leaky()), features(4)),
    "synaptic": (lambda: nn.Sequential(nn.Linear(6, 16), snntorch.Synaptic(0.5, 0.5, 0.5, init_hidden=True)), STEP),
    "one neuron twice": (lambda: Net(twice, **stem(), c1=conv(8, 8), n1=lif(), c2=conv(8, 8)), images()),
    "linear": (lambda: Net(lambda m, x: m.n1(m.f1(m.n0(x))), n0=lif(), f1=linear(6, 8), n1=lif()), features()),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_replays_are_the_model(graphs, name):
    make, x = NETS[name]
    dense, ours = twins(on_grid(make()), x)
    kept = []
    for round_ in range(3):
        for seed in range(4):
            other = x.roll(seed + 4 * round_, -1)
            found, expected = outputs(ours, other), outputs(dense, other)
            assert_equal(found, expected)
            kept.append((found, expected))
            for key, value in states(dense).items():
                torch.testing.assert_close(states(ours)[key], value, rtol=0, atol=0)
        if name not in ("loop", "synaptic"):
            functional.reset_net(dense)
            functional.reset_net(ours)
    assert graphs.replays > 2, note(ours)
    assert graphs.captures <= 2
    for found, expected in kept:
        assert_equal(found, expected)


# ---- outputs and states


def test_outputs_that_share_memory_share_it(graphs):
    def shared(m, x):
        y = m.fc(m.n1(m.f1(m.n0(x))))
        return y, y[0], y

    made = Net(shared, n0=lif(), f1=linear(6, 8), n1=lif(), fc=nn.Linear(8, 4))
    dense, ours = twins(on_grid(made), features())
    assert_twins(dense, ours, features(), calls=WARM_UP)
    with torch.no_grad():
        y, part, again = ours(features())
    assert graphs.replays
    assert again is y
    y.zero_()
    assert not part.any()
    assert_equal(
        outputs(ours, features(seed=2)),
        [dense_out for _ in range(2) for dense_out in outputs(dense, features(seed=2))][-3:],
    )


def test_states_that_are_read_and_kept_stay(graphs, pair):
    dense, ours = pair
    kept = []
    for seed in range(6):
        assert_twins(dense, ours, images(seed=seed), calls=1)
        kept.append((ours.n1.v, dense.n1.v.clone()))
    del kept[3:]
    count = replays(graphs, lambda: assert_twins(dense, ours, images(seed=7), calls=6))
    assert count >= 3  # once nobody takes another one
    for found, expected in kept:
        assert torch.equal(found, expected)


def test_states_that_are_only_looked_at_do_not_hold_replays_up(graphs, pair):
    dense, ours = pair
    for seed in range(4):
        assert replays(graphs, lambda seed=seed: assert_twins(dense, ours, images(seed=seed), calls=1)) == 1
        assert float(ours.n1.v.max()) == float(dense.n1.v.max())


def test_states_that_the_user_sets_and_writes_into(graphs, pair):
    dense, ours = pair
    for value in (0.5, torch.full((2, 8, 8, 8), 0.25), 0.0, dense.n1.v.clone(), torch.zeros(1), -0.5):
        for model in pair:
            model.n1.v = value.clone() if isinstance(value, torch.Tensor) else value
        assert_twins(dense, ours, images(), calls=3)
        for model in pair:
            model.n0.v.mul_(0.5)
        assert_twins(dense, ours, images(), calls=1)
    assert replays(graphs, lambda: assert_twins(dense, ours, images(), calls=2)) == 2


def test_two_neurons_that_hold_one_tensor(pair):
    for model in pair:
        model.n0.v = model.n1.v
    assert_twins(*pair, images(), calls=4)


def test_membranes_that_are_returned_and_kept_do_not_hold_replays_up(graphs):
    """Stepped from outside, with what one call returned going into the next."""

    def one_step(m, x, mem):
        s, mem = m.n1(m.f1(x), mem)
        return s, mem

    net = on_grid(Net(one_step, f1=nn.Linear(6, 16), n1=leaky()))
    x = features(8)
    dense, ours = twins(net, x[0], torch.zeros(2, 16))
    kept, mine, reference = [], torch.zeros(2, 16), torch.zeros(2, 16)
    for step in x:
        with torch.no_grad():
            (spikes, mine), (expected, reference) = ours(step, mine), dense(step, reference)
        kept.append(((spikes, mine), (expected, reference)))
    assert graphs.replays >= 4
    assert graphs.captures == 1
    for found, expected in kept:
        assert_equal(found, expected)


# ---- inputs


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
        lambda x: x[:1].expand(3, -1, -1, -1, -1),
        lambda x: x[:, :1].expand(-1, 2, -1, -1, -1),
        lambda x: F.pad(x, (1, 2, 3, 4))[..., 3:-4, 1:-2],
        lambda x: images(batch=3),
    ],
)
def test_inputs_of_other_strides_and_shapes_have_graphs_of_their_own(graphs, pair, other):
    dense, ours = pair
    functional.reset_net(dense)
    functional.reset_net(ours)
    before = graphs.captures
    for seed in range(8):
        x = other(images(seed=seed))
        with torch.no_grad():
            assert_equal([ours(x)], [dense(x)])
    assert graphs.captures > before
    assert is_fused(ours)


def test_a_graph_for_equal_steps_is_not_taken_for_others(graphs):
    dense, ours = twins(on_grid(Small()), images())
    for seed in range(4):
        for x in (images(seed=seed)[:1].expand(3, -1, -1, -1, -1), images(seed=seed)):
            functional.reset_net(dense)
            functional.reset_net(ours)
            with torch.no_grad():
                assert_equal([ours(x)], [dense(x)])
    assert (graphs.captures, graphs.replays) == (2, 4)


def test_graphs_are_few(graphs, pair):
    _, ours = pair
    for start in (0.125, 0.25, 0.375, 0.5, 0.625, 0.75):
        for _ in range(2):
            ours.n0.v = start
            outputs(ours, images())
    assert replayed(ours).captured <= 4
    assert graphs.captures > 4


def test_modes_of_pytorch(graphs, pair):
    for seed in range(4 * WARM_UP):
        results = []
        for model in pair:
            with torch.inference_mode(seed // 4 % 2 == 0), torch.no_grad():
                results.append(model(images(seed=seed)))
            if seed % 4 == 3:
                functional.reset_net(model)
        assert_equal(results[1:], results[:1])
        assert results[1].is_inference() is (seed // 4 % 2 == 0)
    assert graphs.replays > WARM_UP


# ---- weights


def tail(m, x):
    """A layer outside of blocks, and a parameter that is read as it is."""
    return m.fc(run(m, x).flatten(2)) * m.gain


@pytest.fixture
def tailed():
    made = Small(tail)
    made.fc, made.gain = nn.Linear(512, 4), nn.Parameter(torch.ones(4))
    dense, ours = twins(on_grid(made), images())
    assert_twins(dense, ours, images(), calls=WARM_UP)
    return dense, ours


def doubled(name):
    def change(model):
        owner = model.get_submodule(name)
        owner.weight.mul_(0.5)

    return change


def exchanged(name):
    def change(model):
        owner = model.get_submodule(name)
        owner.weight = nn.Parameter(owner.weight.detach() * 2)

    return change


CHANGES = {
    **{f"{name} written": doubled(name) for name in ("c0", "c1", "b1", "fc")},
    **{f"{name} replaced": exchanged(name) for name in ("c0", "c1", "b1", "fc")},
    "weight data replaced": lambda m: setattr(m.fc.weight, "data", m.fc.weight.data * 2),
    "statistics": lambda m: m.b1.running_mean.add_(0.25),
    "parameter": lambda m: setattr(m, "gain", nn.Parameter(torch.full((4,), 2.0))),
    "loaded": lambda m: m.load_state_dict({name: value * 4 for name, value in m.state_dict().items()}),
    "threshold": lambda m: setattr(m.n1, "v_threshold", 0.5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_the_model_are_followed(graphs, tailed, name):
    dense, ours = tailed
    with torch.no_grad():
        for model in tailed:
            CHANGES[name](model)
    count = replays(graphs, lambda: assert_twins(dense, ours, images(), calls=WARM_UP + 2))
    assert count > 0


def test_refresh_drops_graphs(graphs, pair):
    dense, ours = pair
    assert replayed(ours).captured
    sparseflow.refresh(ours)
    assert replays(graphs, lambda: assert_twins(dense, ours, images(), calls=1)) == 0
    assert replays(graphs, lambda: assert_twins(dense, ours, images(), calls=3)) > 0


# ---- what is not captured


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def behind(run, **parts):
    """A net whose result goes through ``run(m, y)``."""
    made = Net(lambda m, x: run(m, m.n1(m.f1(m.n0(x)))), n0=lif(), f1=linear(6, 8), n1=lif(), **parts)
    return on_grid(made)


def writes(m, y):
    m.seen.add_(1)
    return y * m.seen


def masked(m, y):
    y = y * 1.0
    y[y > 0] = torch.full((1,), 0.5, device=y.device)
    return y


REFUSED = {
    "a mask that is written to": (lambda: behind(masked), "look at values"),
    "a mask": (lambda: behind(lambda m, y: F.pad(y[y > 0], (0, 1))[-1]), "look at values"),
    "batch norm in training": (
        lambda: behind(lambda m, y: m.free(y.flatten(0, 1)), free=nn.BatchNorm1d(8, affine=False)),
        "training mode",
    ),
    "a neuron that is not fused": (
        lambda: behind(lambda m, y: m.n2(m.f2(y)), f2=linear(8, 4), n2=lif(store_v_seq=True)),
        "keeps a state",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_captured_says_so(graphs, name):
    make, why = REFUSED[name]
    dense, ours = twins(make(), features())
    for model in (dense, ours):
        if hasattr(model, "free"):
            model.free.train()
            model.free.eps = 1e-5
    assert_twins(dense, ours, features(), calls=WARM_UP + 2)
    assert not graphs.replays
    assert is_fused(ours)
    assert why in note(ours)


def test_an_input_that_is_written_to(graphs):
    made = on_grid(Net(lambda m, x: m.n1(m.f1(m.n0(x.mul_(0.5)))), n0=lif(), f1=linear(6, 8), n1=lif()))
    dense, ours = twins(made, features())
    mine, reference = features(), features()
    for _ in range(WARM_UP + 2):
        with torch.no_grad():
            assert_equal([ours(mine)], [dense(reference)])
        assert torch.equal(mine, reference)
    assert not graphs.replays
    assert "writes into its input" in note(ours)


@pytest.mark.parametrize("what", ["input", "parameter"])
def test_results_that_are_not_the_plans_own(graphs, what):
    def result(m, x):
        return m.n1(m.f1(m.n0(x))), x if what == "input" else m.scale

    made = Net(result, n0=lif(), f1=linear(6, 8), n1=lif())
    made.scale = nn.Parameter(torch.ones(2), requires_grad=False)
    dense, ours = twins(on_grid(made), features())
    assert_twins(dense, ours, features(), calls=WARM_UP + 2)
    assert not graphs.replays
    assert "itself" in note(ours)
    x = features()
    with torch.no_grad():
        assert ours(x)[1] is (x if what == "input" else ours.scale)


def test_a_step_that_fails_in_a_capture(graphs, monkeypatch):
    """A mask makes the host wait, and here nothing has looked for one."""
    monkeypatch.setattr(graphs_module, "_looks_at_values", lambda *_: False)
    dense, ours = twins(behind(masked), features())
    kept = []
    for seed in range(WARM_UP + 2):
        x = features(seed=seed)
        kept.append((outputs(ours, x), outputs(dense, x)))
        for key, value in states(dense).items():
            assert torch.equal(states(ours)[key], value)
    for found, expected in kept:
        assert_equal(found, expected)
    assert graphs.failures == 1
    assert not graphs.captures
    assert "RuntimeError: operation not permitted" in note(ours)


def test_hooks_that_come_and_go(graphs, pair):
    dense, ours = pair
    seen = []
    handle = ours.b1.register_forward_hook(lambda *_: seen.append(1))
    assert_twins(dense, ours, images(), calls=WARM_UP + 1)
    assert len(seen) >= WARM_UP + 1
    assert "hook" in note(ours)
    handle.remove()
    assert replays(graphs, lambda: assert_twins(dense, ours, images(), calls=WARM_UP)) > 0


def test_verify_profile_and_disabled_see_the_real_thing(graphs, pair):
    dense, ours = pair
    with torch.no_grad():
        with sparseflow.verify(ours) as watch:
            assert replays(graphs, lambda: ours(images())) == 0
        assert watch.checked >= 2
        with sparseflow.profile(ours) as profile:
            assert replays(graphs, lambda: ours(images())) == 0
        assert {"c1", "n1"} <= {layer.name for layer in profile.layers}
        with sparseflow.disabled(ours):
            assert replays(graphs, lambda: ours(images())) == 0
        for _ in range(3):
            dense(images())
    assert replays(graphs, lambda: assert_twins(dense, ours, images(), calls=3)) > 0


def test_inside_a_capture_of_somebody_elses(graphs, pair):
    dense, ours = pair
    graphs.recorded_by_others = True
    assert replays(graphs, lambda: assert_twins(dense, ours, images())) == 0
    graphs.recorded_by_others = False
    assert replays(graphs, lambda: assert_twins(dense, ours, images(), calls=1)) == 1


def test_without(graphs):
    dense = on_grid(Small()).eval()
    ours = sparseflow.accelerate(copy.deepcopy(dense), images(), mode="sparse", cuda_graph=False)
    assert_twins(dense, ours, images(), calls=WARM_UP + 2)
    assert is_fused(ours)
    assert replayed(ours) is None
    assert not graphs.captures


# ---- around


def test_replays_count_as_calls_and_captures_do_not(graphs):
    _, ours = twins(on_grid(Small()), images())
    outputs(ours, images())
    block = next(block for block in program(ours).blocks if block.name == "c1")
    before = block.stats.calls[Path.FUSED]
    assert replays(graphs, lambda: [outputs(ours, images()) for _ in range(5)]) == 3
    assert graphs.captures == 1
    assert block.stats.calls[Path.FUSED] == before + 5


def test_the_contest_times_replays(graphs):
    net = sparseflow.accelerate(on_grid(Small()).eval(), images())
    fusion = fusion_of(net)
    assert graphs.replays > 0
    assert fusion is None or fusion.last.fused_ms is not None


class Graph:
    def __init__(self, pool):
        self.given = pool

    def pool(self):
        return id(self)

    def replay(self):
        self.replayed = True


def test_graphs_share_the_memory_of_those_that_are_alive(monkeypatch):
    """The pool of graphs that are all gone must not be named again."""
    made = []

    def captured(run, pool):
        run()
        made.append(weakref.ref(graph := Graph(pool)))
        return graph

    monkeypatch.setattr(graphs_module, "captured", captured)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    found = CudaGraphs(torch.device("cuda"))
    replays = [found.capture(lambda: None) for _ in range(3)]
    assert made[0]().given is None
    assert {graph().given for graph in made[1:]} <= {id(graph()) for graph in made}
    replays[1]()
    assert made[1]().replayed
    assert not hasattr(made[0](), "replayed")
    replays.clear()
    assert not any(graph() for graph in made)
    last = found.capture(lambda: None)
    assert made[-1]().given is None
    assert last is not None


def test_a_plan_waits_for_the_stream_it_ran_on_before(monkeypatch):
    class Stream:
        def __init__(self):
            self.waited = []

        def wait_stream(self, other):
            self.waited.append(other)

    first, second = Stream(), Stream()
    now = iter((first, first, second, second, first))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: next(now))
    found = CudaGraphs(torch.device("cuda"))
    for _ in range(4):
        found.follow()
    assert (first.waited, second.waited) == ([second], [first])


def test_weights_on_a_device_are_not_compared():
    """As on a GPU, there are no values to be had without waiting."""
    layer = nn.Linear(4, 4, device="meta")
    watched = Watched([(layer._parameters, "weight")])
    assert not any(watched.changed() for _ in range(3))
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    assert watched.changed()


def save_and_load(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, save_and_load])
def test_copies_capture_for_themselves(graphs, pair, copied):
    dense, ours = pair
    twin, twin_dense = copied(ours), copy.deepcopy(dense)
    before = graphs.captures
    for seed in range(WARM_UP + 2):
        assert_twins(twin_dense, twin, images(seed=seed), calls=1)
        assert_twins(dense, ours, images(seed=seed + 9), calls=1)
    assert graphs.captures > before
    assert replayed(twin) is not replayed(ours)


def test_restored_models_own_their_states(graphs, pair):
    dense, ours = pair
    assert graphs.replays
    sparseflow.restore(ours)
    assert_twins(dense, ours, images())


def test_run_replays(graphs, monkeypatch):
    net = nn.Sequential(nn.Linear(6, 16), snntorch.Leaky(beta=0.5, threshold=0.5, init_hidden=True))
    dense, results = copy.deepcopy(on_grid(net).eval()), []
    monkeypatch.setattr(fused_model, "_contest", lambda *_: None)  # which a loop of this size may win
    for seed in range(6):
        with torch.no_grad():
            ours = sparseflow.run(net, features(4, seed=seed))
            dense[1].reset_mem()
            results.append((ours, torch.stack([dense(x) for x in features(4, seed=seed)])))
    for ours, expected in results:
        assert torch.equal(ours, expected)
    assert (graphs.captures, graphs.replays) == (1, 3)  # at first there were no states to be set to zero
