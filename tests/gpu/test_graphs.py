"""Fused plans replayed as CUDA graphs give what their kernels give one by one, and no replay waits for the device."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from spikingjelly.activation_based import functional
from torch import nn
from torch.utils._pytree import tree_map

import sparseflow
from sparseflow.modules.fused import graphs
from sparseflow.modules.fused.graphs import WARM_UP
from sparseflow.modules.fused.model import fusion_of

from ..modules.fused.nets import assert_equal, features, fresh, images, on_grid, states
from ..modules.fused.test_graphs import CHANGES, NETS, Small, behind, masked, tail
from .test_asynchrony import waiting_is_an_error

pytestmark = pytest.mark.filterwarnings("ignore::sparseflow.NothingAcceleratedWarning")


def cuda(tree):
    return tree_map(lambda x: x.cuda() if isinstance(x, torch.Tensor) else x, tree)


def launched_and_replayed(net, x):
    """The same plan without and with graphs."""
    net = on_grid(net).eval().cuda()
    other = copy.deepcopy(net)
    launched = sparseflow.accelerate(other, cuda(x), mode="sparse", cuda_graph=False)
    return launched, sparseflow.accelerate(net, cuda(x), mode="sparse")


def results(model, *args):
    with torch.no_grad():
        found = model(*fresh(args))
    return list(found) if isinstance(found, (tuple, list)) else [found]


def assert_same(launched, replayed, x, calls=1):
    for _ in range(calls):
        assert_equal(results(replayed, x), results(launched, x))
        assert_same_states(launched, replayed)


def assert_same_states(launched, replayed):
    """A function of its own: a state that somebody still holds has to move at the next call."""
    expected = states(launched)
    for name, value in states(replayed).items():
        assert torch.equal(value, expected[name]), name


def reset(*models):
    for model in models:
        functional.reset_net(model)


def replays(model):
    return fusion_of(model).last.replayed.replays


@pytest.fixture
def pair():
    launched, replayed = launched_and_replayed(Small(), images())
    assert_same(launched, replayed, images().cuda(), calls=WARM_UP)
    assert replays(replayed) > 0, sparseflow.report(replayed).notes
    return launched, replayed


@pytest.mark.parametrize("name", NETS)
def test_replays_are_the_kernels(name):
    """With other spikes at every call, from reset and going on; what was returned stays."""
    make, x = NETS[name]
    launched, replayed = launched_and_replayed(make(), x)
    kept = []
    for number in range(12):
        other = cuda(x.roll(number, -1))
        found, expected = results(replayed, other), results(launched, other)
        kept.append((found, [value.clone() for value in expected]))
        if number % 4 == 3 and name not in ("loop", "synaptic"):
            reset(launched, replayed)
    for found, expected in kept:
        assert_equal(found, expected)
    assert replays(replayed) > 2, sparseflow.report(replayed).notes
    assert "replayed as a CUDA graph" in sparseflow.report(replayed).notes


def test_silent_and_dense_inputs(pair):
    for value in (-10.0, 10.0, 0.0):
        reset(*pair)
        assert_same(*pair, torch.full((3, 2, 3, 8, 8), value, device="cuda"), calls=3)


def test_replays_do_not_wait(pair):
    _, replayed = pair
    inputs = [images(seed=seed).cuda() for seed in range(8)]
    with torch.no_grad():
        for start in (True, False):
            if start:
                reset(replayed)
            for x in inputs[:WARM_UP]:
                replayed(x)
        before = replays(replayed)
        torch.cuda.synchronize()
        with waiting_is_an_error():
            kept = [replayed(x) for x in inputs]
    assert replays(replayed) == before + len(inputs)
    assert len({x.data_ptr() for x in kept}) == len(inputs)


def test_launched_plans_do_not_wait(pair):
    launched, _ = pair
    x = images(seed=2).cuda()
    with torch.no_grad():
        launched(x)
        torch.cuda.synchronize()
        with waiting_is_an_error():
            for _ in range(4):
                launched(x)


@pytest.mark.parametrize("which", [0, 1])
def test_calls_take_no_more_memory_each_time(pair, which):
    model, x = pair[which], images().cuda()
    for _ in range(WARM_UP):
        results(model, x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        results(model, x)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_states_that_are_taken_set_and_written_into(pair):
    kept = []
    for seed in range(4):
        assert_same(*pair, images(seed=seed).cuda())
        kept.append((pair[1].n1.v, pair[0].n1.v.clone()))
    for value in (0.5, torch.full((2, 8, 8, 8), 0.25, device="cuda"), 0.0):
        for model in pair:
            model.n1.v = value.clone() if isinstance(value, torch.Tensor) else value
        assert_same(*pair, images().cuda(), calls=3)
        for model in pair:
            model.n0.v.mul_(0.5)
        assert_same(*pair, images().cuda())
    for found, expected in kept:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_the_model_are_followed(name):
    made = Small(tail)
    made.fc, made.gain = nn.Linear(512, 4), nn.Parameter(torch.ones(4))
    pair = launched_and_replayed(made, images())
    assert_same(*pair, images().cuda(), calls=WARM_UP)
    with torch.no_grad():
        for model in pair:
            CHANGES[name](model)
            model.cuda()
    assert_same(*pair, images().cuda(), calls=WARM_UP + 2)
    assert replays(pair[1]) > 0


def test_other_inputs(pair):
    for batch in (1, 3, 2):
        reset(*pair)
        for seed in range(5):
            assert_same(*pair, images(batch=batch, seed=seed).cuda())
    expanded = images().cuda()[:1].expand(3, -1, -1, -1, -1)
    for _ in range(4):
        reset(*pair)
        with torch.no_grad():
            assert torch.equal(pair[1](expanded), pair[0](expanded))
    assert torch.equal(results(pair[1], images().cuda())[0], results(pair[0], images().cuda())[0])


def test_modes_of_pytorch_in_turn(pair):
    for number in range(16):
        with torch.inference_mode(number // 4 % 2 == 0), torch.no_grad():
            x = images(seed=number).cuda()
            assert torch.equal(pair[1](x), pair[0](x))


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_step_that_waits_for_the_device_leaves_everything_usable(foreseen, monkeypatch):
    if not foreseen:
        monkeypatch.setattr(graphs, "_looks_at_values", lambda *_: False)
    launched, replayed = launched_and_replayed(behind(masked), features())
    for seed in range(WARM_UP + 2):
        assert_same(launched, replayed, features(seed=seed).cuda())
    assert not torch.cuda.is_current_stream_capturing()
    why = "look at values" if foreseen else "capturing it failed"
    assert any("not replayed as a CUDA graph" in note and why in note for note in sparseflow.report(replayed).notes)
    torch.cuda.empty_cache()
    pair = launched_and_replayed(Small(), images())
    assert_same(*pair, images().cuda(), calls=WARM_UP)
    assert replays(pair[1]) > 0


def test_streams_in_turn(pair):
    launched, replayed = pair
    inputs = [images(seed=seed).cuda() for seed in range(6)]
    expected = [results(launched, x)[0].clone() for x in inputs]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in range(2)], []
    for number, x in enumerate(inputs):
        with torch.cuda.stream(streams[number % 2]):
            found += results(replayed, x)
    torch.cuda.synchronize()
    assert_equal(found, expected)


def test_inside_a_graph_of_the_users(pair):
    launched, replayed = pair
    x = images().cuda()
    with torch.no_grad():
        reset(*pair)
        graph = torch.cuda.CUDAGraph()
        before = replays(replayed)
        with torch.cuda.graph(graph):
            y = replayed(x)
        assert replays(replayed) == before
        reset(launched)
        graph.replay()
        assert torch.equal(y, launched(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_capture_for_themselves(pair, copied):
    launched, replayed = pair
    twin, reference = copied(replayed), copy.deepcopy(launched)
    for seed in range(WARM_UP + 2):
        assert_same(reference, twin, images(seed=seed).cuda())
        assert_same(launched, replayed, images(seed=seed + 9).cuda())
    assert replays(twin) > 0


def test_the_measured_choice_says_what_a_replay_takes():
    net = on_grid(Small()).eval().cuda()
    sparseflow.accelerate(net, images().cuda())
    fusion = fusion_of(net)
    assert fusion is None or fusion.last.fused_ms > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_model_on_another_than_the_current_device():
    net = on_grid(Small()).eval().to("cuda:1")
    dense, x = copy.deepcopy(net), images().to("cuda:1")
    sparseflow.accelerate(net, x, mode="sparse")
    for _ in range(WARM_UP + 1):
        torch.testing.assert_close(results(net, x), results(dense, x))
    assert replays(net) > 0
