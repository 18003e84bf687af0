"""Neuron states that the user holds, sets and writes into, and inputs of every kind."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import nn

from sparseflow.modules.fused.block import BlockRun

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
    linear,
    norm,
    on_grid,
    outputs,
    spikes,
    states,
    stem,
    twins,
)

pytestmark = pytest.mark.filterwarnings("ignore::sparseflow.NothingAcceleratedWarning")


@pytest.fixture
def pair():
    made = Net(lambda m, x: m.n1(m.b1(m.c1(spikes(m, x)))), **stem(), c1=conv(8, 8), b1=norm(8), n1=lif())
    dense, ours = twins(on_grid(made), images())
    assert_twins(dense, ours, images())
    return dense, ours


# ---- state that others hold


def test_states_that_were_taken_stay_what_they_were(pair):
    dense, ours = pair
    kept = []
    for seed in range(4):
        assert_twins(dense, ours, images(seed=seed), calls=1)
        kept.append((states(ours), {name: value.clone() for name, value in states(dense).items()}))
    for found, expected in kept:
        for name, value in expected.items():
            assert_equal(
                [found[name]],
                [value.as_strided(value.shape, found[name].stride()) if False else found[name] * 0 + value],
            )


@pytest.mark.parametrize(
    "taken", [lambda v: v[0], lambda v: v.detach(), lambda v: v.transpose(0, 1), lambda v: v.numpy(), lambda v: [v]]
)
def test_parts_and_views_of_states_that_were_taken(pair, taken):
    dense, ours = pair
    mine, reference = taken(ours.n1.v), copy.deepcopy(taken(dense.n1.v))
    assert_twins(dense, ours, images(seed=5), calls=3)
    mine, reference = (x[0] if isinstance(x, list) else torch.as_tensor(x) for x in (mine, reference))
    assert torch.equal(mine, reference)


def test_states_are_written_in_place_where_nobody_holds_them(pair):
    _, ours = pair
    places = set()
    for seed in range(5):
        outputs(ours, images(seed=seed))
        places.add(ours.n1.v.data_ptr())
    assert len(places) == 1


def test_a_state_that_the_user_sets(pair):
    dense, ours = pair
    values = (
        0.5,
        torch.full((2, 8, 8, 8), 0.25),
        0.0,
        dense.n1.v.clone(),
        torch.zeros(1),
        torch.full((2, 8, 8, 8), 0.5),
    )
    for value in values:
        for model in pair:
            model.n1.v = value.clone() if isinstance(value, torch.Tensor) else value
        assert_twins(dense, ours, images())
    assert is_fused(ours)


def test_a_state_that_the_user_writes_into(pair):
    for model in pair:
        model.n1.v.mul_(0.5)
        model.n0.v[0] = 0.75
    assert_twins(*pair, images())


def test_a_state_taken_and_put_back(pair):
    """Saving and restoring what the neurons remember, as beam search does."""
    kept = [model.n1.v for model in pair], [model.n0.v for model in pair]
    first = [outputs(model, images(seed=7)) for model in pair]
    for model, v1, v0 in zip(pair, *kept, strict=True):
        model.n1.v, model.n0.v = v1, v0
    again = [outputs(model, images(seed=7)) for model in pair]
    assert_equal(again[1], first[1])
    assert_equal(again[1], again[0])


def test_two_neurons_that_hold_one_tensor(pair):
    for model in pair:
        model.n0.v = model.n1.v
    assert_twins(*pair, images(), calls=3)


def test_membranes_that_a_loop_returns_stay():
    def loop(m, x):
        mem, found = m.n1.init_leaky(), []
        for step in x:
            s, mem = m.n1(m.f1(step), mem)
            found.append(mem)
        return found, mem, s

    dense, ours = twins(on_grid(Net(loop, f1=nn.Linear(6, 16), n1=leaky())), features(4))
    kept = [(outputs(ours, features(4, seed=seed)), outputs(dense, features(4, seed=seed))) for seed in range(4)]
    for found, expected in kept:
        assert_equal(found, expected)
    assert is_fused(ours)


# ---- inputs


def channels_last(x):
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def last_of(x):
    """One at the last place and zero elsewhere."""
    return F.one_hot(torch.tensor(x.numel() - 1), x.numel()).view_as(x)


INPUTS = {
    "channels_last": channels_last,
    "transposed": lambda x: x.transpose(3, 4).contiguous().transpose(3, 4),
    "batch first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: F.pad(x, (1, 2, 3, 4))[..., 3:-4, 1:-2],
    "offset": lambda x: torch.cat([torch.ones(5), x.flatten()])[5:].view(x.shape),
    "equal steps": lambda x: x[:1].repeat(3, 1, 1, 1, 1),
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1, -1),
    "expanded batch": lambda x: x[:, :1].expand(-1, 2, -1, -1, -1),
    "last element differs": lambda x: torch.cat(
        [x[:1], x[:1], x[:1] + F.one_hot(torch.tensor(383), 384).view(1, 2, 3, 8, 8)]
    ),
    "only the second step differs": lambda x: torch.cat([x[:1], x[1:2], x[:1]]),
    "only the last step differs": lambda x: torch.cat([x[:1], x[:1], x[2:]]),
    "nan": lambda x: x[:1].repeat(3, 1, 1, 1, 1).index_fill_(3, torch.tensor(2), float("nan")),
    "infinite": lambda x: x[:1].repeat(3, 1, 1, 1, 1).index_fill_(3, torch.tensor(2), float("inf")),
    "negated": lambda x: torch.view_as_complex(torch.stack([x, -x], -1)).conj().imag,
    "zeros": lambda x: x * 0,
    "a parameter": lambda x: nn.Parameter(x, requires_grad=False),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_every_kind(pair, name):
    dense, ours = pair
    for model in pair:
        functional.reset_net(model)
    x = INPUTS[name](images())
    for _ in range(4):
        with torch.no_grad():
            expected, found = dense(x), ours(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["as it is", "channels_last", "transposed", "batch first"])
@pytest.mark.parametrize("changed", [None, 0, 1, 2])
def test_equal_steps_are_computed_once_in_any_memory_layout(pair, monkeypatch, name, changed):
    seen = []
    plain = BlockRun._dense_sums
    monkeypatch.setattr(BlockRun, "_dense_sums", lambda block, x: seen.append(len(x)) or plain(block, x))
    x = images()[:1].repeat(3, 1, 1, 1, 1)
    if changed is not None:
        x[changed, -1, -1, -1, -1] += 1
    x = INPUTS.get(name, lambda x: x)(x)
    with torch.no_grad():
        pair[1](x)
        functional.reset_net(pair[1])
        seen.clear()
        pair[1](x)
    assert seen[0] == (2 if changed is None else 6)


def test_an_input_that_is_written_to_between_calls(pair):
    dense, ours = pair
    x = images()
    for step in range(4):
        with torch.no_grad():
            assert_equal([ours(x)], [dense(x)])
        x[step % 3, :, 0].add_(0.5)


def test_a_neuron_on_the_input_itself():
    """Without a layer in front, where an expanded input is the same at every step."""
    made = Net(lambda m, x: m.n1(m.f1(m.n0(x))), n0=lif(), f1=linear(6, 8), n1=lif())
    dense, ours = twins(on_grid(made), features())
    for x in (features(), features()[:1].expand(3, -1, -1), features()[:, :1].expand(-1, 2, -1)):
        assert_twins(dense, ours, x)
    assert is_fused(ours)


def test_an_empty_batch_goes_through_the_model(pair):
    for model in pair:
        functional.reset_net(model)
    assert_twins(*pair, images(batch=0), calls=3)
