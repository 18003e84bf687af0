"""Neighbouring blocks in one native call: the same results, whoever of them drops out."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from spikingjelly.activation_based import functional
from torch import nn

from sparseflow.kernels.cpu import engine
from sparseflow.kernels.cpu.watch import MemoryWatch
from sparseflow.modules.fused.chain import Chain

from .nets import (
    Net,
    assert_twins,
    conv,
    iff,
    images,
    lif,
    linear,
    norm,
    on_grid,
    outputs,
    program,
    spikes,
    stem,
    twins,
)

pytestmark = pytest.mark.skipif(not engine.available(), reason="needs the native engine")


def residual(m, x):
    """Two blocks, one of them with a shortcut through a layer of its own, as in a ResNet."""
    s = spikes(m, x)
    h = m.b2(m.c2(m.n1(m.b1(m.c1(s)))))
    return m.n3(m.c3(m.n2(h + m.short_norm(m.short(s)))))


def parts():
    return {
        **stem(),
        "c1": conv(8, 16),
        "b1": norm(16),
        "n1": lif(),
        "c2": conv(16, 16),
        "b2": norm(16),
        "n2": iff(),
        "short": conv(8, 16, kernel=1),
        "short_norm": norm(16),
        "c3": conv(16, 8),
        "n3": lif(),
    }


@pytest.fixture
def pair():
    """A dense net, and one whose four blocks on spikes follow each other."""
    return twins(on_grid(Net(residual, **parts())), images())


@pytest.fixture
def native(monkeypatch):
    """How many blocks every native call ran."""
    ran, run = [], engine.run_links

    def counted(links, n):
        ran.append(run(links, n))
        return ran[-1]

    monkeypatch.setattr(engine, "run_links", counted)
    return ran


def chains(model):
    return [action for action, _ in program(model)._actions if isinstance(action, Chain)]


def test_all_blocks_run_in_one_call(pair, native):
    dense, ours = pair
    outputs(ours, images())
    outputs(dense, images())
    native.clear()
    assert_twins(dense, ours, images())
    assert native == [4, 4]


def test_a_block_with_too_many_spikes_drops_out(pair, native):
    dense, ours = pair
    assert_twins(dense, ours, images())
    crowded = next(block for block in program(ours).blocks if block.name == "c2")
    limit(ours, crowded, 1e-6)
    assert_twins(dense, ours, images())
    native.clear()
    assert_twins(dense, ours, images())
    assert crowded.stats.calls["dense"] == 4
    assert native == [2, 1] * 2, "the blocks before and behind it run together"


def limit(model, block, density):
    """Have a block run dense above a density."""
    block.policy.crossover = dataclasses.replace(block.policy.crossover, density=density)
    for chain in chains(model):
        chain.unsettle()


@pytest.mark.parametrize("reset", [True, False])
def test_a_call_with_too_many_spikes_between_others(pair, native, reset):
    """Neurons of blocks that then do not run go on from what they held."""
    dense, ours = pair
    crowded = next(block for block in program(ours).blocks if block.name == "c2")
    for block in program(ours).blocks[1:]:
        limit(ours, block, 1.0)
    seen = [crowded.stats.nonzero]
    for scale in (0.25, 8.0):  # other densities need other walks, which are prepared one by one
        for model in pair:
            functional.reset_net(model)
        assert_twins(dense, ours, images() * scale, calls=1)
        seen.append(crowded.stats.nonzero)
    few, many = seen[1] - seen[0], seen[2] - seen[1]
    limit(ours, crowded, (few + many) / 2 / crowded._numel)
    assert_twins(dense, ours, images() * 0.25)
    native.clear()
    for scale in (0.25, 0.25, 8.0, 0.25):
        for model in pair if reset else ():
            functional.reset_net(model)
        assert_twins(dense, ours, images() * scale, calls=1)
    assert native[:3] == [4, 4, 2]


def test_states_stay_where_there_is_no_memory(pair, monkeypatch):
    _, ours = pair
    for _ in range(2):
        outputs(ours, images())

    def fails(links, n):
        raise MemoryError

    monkeypatch.setattr(engine, "run_links", fails)
    functional.reset_net(ours)
    with pytest.raises(MemoryError):
        outputs(ours, images())
    assert [ours.n1.v, ours.n2.v, ours.n3.v] == [0.0] * 3


def test_other_densities_need_other_walks(pair, native):
    dense, ours = pair
    for scale in (1.0, 0.25, 0.0, 4.0, 1.0):
        x = images() * scale
        assert_twins(dense, ours, x)
    native.clear()
    assert_twins(dense, ours, images())
    assert native == [4, 4]


def test_new_weights(pair, native):
    dense, ours = pair
    assert_twins(dense, ours, images())
    for model in pair:
        model.c2.weight.data.mul_(0.5)
    native.clear()
    assert_twins(dense, ours, images(), calls=3)
    assert native[-1] == 4
    assert len(native) > 3, "the first call prepares blocks one by one"


def test_observers_see_every_block(pair, native):
    dense, ours = pair
    assert_twins(dense, ours, images())
    seen = []
    program(ours)._scrutiny.observers.append(lambda block, *_: seen.append(block.name))
    native.clear()
    assert_twins(dense, ours, images(), calls=1)
    assert seen == ["c0", "c1", "short", "c2", "c3"]
    assert max(native) == 1


def test_counts_are_those_of_single_calls(pair):
    _, ours = pair
    blocks = [block for block in program_after(ours).blocks if block.policy]
    before = [copy.deepcopy(block.stats) for block in blocks]
    functional.reset_net(ours)
    outputs(ours, images())
    together = [block.stats.nonzero - seen.nonzero for block, seen in zip(blocks, before, strict=True)]
    program(ours)._scrutiny.observers.append(lambda *_: None)
    functional.reset_net(ours)
    outputs(ours, images())
    alone = [block.stats.nonzero - seen.nonzero for block, seen in zip(blocks, before, strict=True)]
    assert [2 * count for count in together] == alone
    for block, seen in zip(blocks, before, strict=True):
        assert block.stats.calls["fused"] == seen.calls["fused"] + 2
        assert block.stats.numel == seen.numel // seen.calls["fused"] * block.stats.calls["fused"]


def program_after(model):
    outputs(model, images())
    return program(model)


def test_a_result_that_the_user_gets_is_never_overwritten():
    """The shortcut's sums leave the model: they may not lie in memory that the next call writes to."""

    def run(m, x):
        s = spikes(m, x)
        short = m.short(s)
        return m.n2(m.c1(s) + short), short

    made = on_grid(Net(run, **stem(), c1=conv(8, 16), short=conv(8, 16, kernel=1), n2=iff()))
    dense, ours = twins(made, images())
    first = outputs(ours, images())
    kept = [value.clone() for value in first]
    outputs(ours, images(seed=2))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    outputs(dense, images())
    outputs(dense, images(seed=2))
    assert_twins(dense, ours, images())


@pytest.mark.parametrize("size", [1, 2, 7, 8, 40, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.float16])
def test_a_write_into_memory_is_noticed(size, dtype):
    tensor, other = torch.zeros(size, dtype=dtype), torch.zeros(50)
    watch = MemoryWatch([other, tensor])
    assert all(watch.holds() for _ in range(4))
    tensor.data[...] = 3
    assert not watch.holds()


def test_a_small_write_is_noticed_in_the_end():
    """Samples lie in each eighth of a tensor; those of one tensor are compared at each call."""
    tensor, other = torch.zeros(800), torch.zeros(50)
    watch = MemoryWatch([other, tensor])
    tensor.data[700] = 1.0
    assert sorted(watch.holds() for _ in range(2)) == [False, True]


def test_memory_between_the_values_of_a_view_is_not_watched():
    base = torch.zeros(10, 10)
    watch = MemoryWatch([base.t()[2:5]])
    base[:, 7] = 1.0
    assert all(watch.holds() for _ in range(3))
    base.data[0, 2] = 1.0
    assert not watch.holds()


def test_nothing_to_watch():
    assert MemoryWatch([]).holds()
    assert MemoryWatch([torch.zeros(0), torch.zeros(3, device="meta")]).holds()


def test_a_linear_head_belongs_to_the_chain(native):
    def run(m, x):
        s = spikes(m, x)
        return m.n2(m.f(m.n1(m.c1(s)).flatten(2)))

    made = on_grid(Net(run, **stem(), c1=conv(8, 8), n1=lif(), f=linear(8 * 64, 10), n2=iff()))
    dense, ours = twins(made, images())
    assert_twins(dense, ours, images())
    native.clear()
    assert_twins(dense, ours, images())
    assert native == [2, 2]


def test_a_net_without_neighbours_has_no_chain():
    def run(m, x):
        return m.n1(m.c1(spikes(m, x)))

    _, ours = twins(on_grid(Net(run, **stem(), c1=conv(8, 8), n1=lif())), images())
    outputs(ours, images())
    assert chains(ours) == []
    assert isinstance(ours, nn.Module)
