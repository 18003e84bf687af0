"""Block pruning: which weights go, what the record says, and that pruned blocks stay zero."""

from __future__ import annotations

import copy
import doctest
import gc
import io
import itertools
import pickle

import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn import functional as F

import sparseflow
from sparseflow import pruning
from sparseflow.kernels import weight_blocks
from sparseflow.kernels.weight_blocks import present_blocks

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


def net():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, groups=64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 16, 64),
        nn.ReLU(),
        nn.Linear(64, 20),
    )


def train(model, make=OPTIMIZERS["sgd"], steps=3, optimizer=None, clip=False):
    optimizer = optimizer or make(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 4, 4)).square().mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def zeros_of(model):
    return {name: p.detach() == 0 for name, p in model.named_parameters() if p.dim() > 1}


def still_zero(model, zeros):
    held = dict(model.named_parameters())
    return all(bool((held[name][zero] == 0).all()) for name, zero in zeros.items())


def dense_elsewhere(model, zeros):
    held = dict(model.named_parameters())
    return all(bool((held[name][~zero] != 0).all()) for name, zero in zeros.items())


def test_doctests():
    assert doctest.testmod(pruning).failed == 0
    assert doctest.testmod(weight_blocks).failed == 0


def test_the_blocks_of_least_norm_go_and_the_rest_is_untouched():
    model = net()
    before = copy.deepcopy(model)
    record = sparseflow.prune_blocks(model, density=0.25)
    assert [layer.name for layer in record.layers if layer.pruned] == ["2", "7"]
    for name in ("2", "7"):
        blocks = compared(before, model, name)
        kept = [norm for norm, same, _ in blocks if same]
        gone = [norm for norm, _, zero in blocks if zero]
        assert len(kept) == round(0.25 * len(blocks))
        assert len(kept) + len(gone) == len(blocks)
        assert min(kept) >= max(gone)


def compared(before, after, name):
    """By block: its norm before, whether it is what it was, and whether it is zero."""
    weights = [model.get_submodule(name).weight.detach() for model in (before, after)]
    old, new = (weight.reshape(64, weight.shape[1], -1) for weight in weights)
    found = []
    for o, i in itertools.product(range(0, 64, 16), range(0, old.shape[1], 16)):
        for tap in range(old.shape[2]):
            a, b = old[o : o + 16, i : i + 16, tap], new[o : o + 16, i : i + 16, tap]
            found.append((float(a.norm()), torch.equal(a, b), not b.any()))
    return found


def test_the_record_names_every_layer_and_why():
    record = sparseflow.prune_blocks(net(), density=0.5)
    assert record["0"].reason == "smaller than half a block"
    assert record["4"].reason == "grouped convolution"
    assert record["9"].reason == "last layer"
    assert record["2"].density == record["7"].density == record.density == 0.5
    text = str(record)
    assert "2 of 5 layers pruned in blocks of 16 x 16" in text
    assert "grouped convolution" in text
    assert record.to_dict()["layers"][1]["present"] == record["2"].present


def test_include_names_an_end_and_exclude_leaves_out():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    record = sparseflow.prune_blocks(model, include=["0", "2"], exclude=lambda name, _: name == "2")
    assert [layer.name for layer in record.layers if layer.pruned] == ["0"]
    assert record["2"].reason == record["4"].reason == "excluded by include= or exclude="


def test_edges_that_do_not_fill_a_block():
    model = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 33), nn.ReLU(), nn.Linear(33, 20))
    record = sparseflow.prune_blocks(model, density=0.5)
    assert (record["2"].blocks, record["2"].present) == (12, 6)
    assert present_blocks(model[2].weight).sum() == 6


@pytest.mark.parametrize("block", [(16, 16), (8, 32), (64, 16), (1, 1)])
def test_other_block_sizes(block):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96), nn.Linear(96, 64))
    record = sparseflow.prune_blocks(model, block, 0.25)
    assert present_blocks(model[1].weight, block).sum() == record["1"].present == record["1"].blocks // 4


def test_global_scope_compares_layers_and_empties_none():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))
    with torch.no_grad():
        model[2].weight.mul_(100.0)  # its scale says nothing
        model[3].weight[:16, :16] *= 1000.0  # one block that holds nearly all of the layer
    record = sparseflow.prune_blocks(model, density=0.5, scope="global")
    assert record["3"].present == 1
    assert record["1"].density > 0.5
    assert record["2"].density > 0.5
    assert record.density == 0.5


def test_a_lower_density_prunes_further_and_a_higher_one_brings_nothing_back():
    model = net()
    sparseflow.prune_blocks(model, density=0.5)
    half = zeros_of(model)
    record = sparseflow.prune_blocks(model, density=0.25)
    assert still_zero(model, half)
    assert record.density == 0.25
    assert sparseflow.prune_blocks(model, density=0.75).density == 0.25


def test_tied_weights_are_pruned_once():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[2].weight = model[1].weight
    record = sparseflow.prune_blocks(model)
    assert record["2"].reason == "shares its weight with 1"
    assert record["2"].density == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "above 0"),
        ({"density": 1.5}, "at most 1"),
        ({"block": (16, 0)}, "positive"),
        ({"scope": "model"}, "scope"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        sparseflow.prune_blocks(net(), **options)


def test_another_block_size_needs_a_new_start():
    model = net()
    sparseflow.prune_blocks(model, (16, 16))
    with pytest.raises(ValueError, match="keep_zero_blocks"):
        sparseflow.prune_blocks(model, (32, 16))


# ---- masks survive -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_blocks_stay_exactly_zero_in_training(name):
    model = net()
    sparseflow.prune_blocks(model)
    keys, zeros = list(model.state_dict()), zeros_of(model)
    train(model, OPTIMIZERS[name])
    assert still_zero(model, zeros)
    assert dense_elsewhere(model, zeros)
    assert list(model.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_from_before_pruning_does_not_come_back(name):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer=optimizer)
    sparseflow.prune_blocks(model)
    zeros = zeros_of(model)
    for _ in range(3):
        train(model, optimizer=optimizer, steps=1)
        assert still_zero(model, zeros)


def test_gradients_of_pruned_blocks_do_not_count_in_clipping():
    model = net()
    sparseflow.prune_blocks(model)
    zeros = zeros_of(model)
    train(model, steps=1, clip=True)
    assert all(bool((p.grad[zeros[name]] == 0).all()) for name, p in model.named_parameters() if name in zeros)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    return model


def assigned(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return model


@pytest.mark.parametrize(
    "change",
    [copy.deepcopy, pickled, saved, loaded, assigned, lambda m: m.double().float(), lambda m: m.requires_grad_(False)],
    ids=["deepcopy", "pickle", "torch.save", "load_state_dict", "assign", "dtype", "frozen"],
)
def test_masks_survive(change):
    model = net()
    sparseflow.prune_blocks(model)
    zeros = zeros_of(model)
    model = change(model).requires_grad_(True)
    train(model)
    assert still_zero(model, zeros)
    assert dense_elsewhere(model, zeros)


def test_the_copy_and_the_original_do_not_share_masks():
    model = net()
    sparseflow.prune_blocks(model, density=0.5)
    twin = copy.deepcopy(model)
    sparseflow.prune_blocks(twin, density=0.25)
    zeros, fewer = zeros_of(twin), zeros_of(model)
    train(model)
    train(twin)
    assert still_zero(twin, zeros)
    assert dense_elsewhere(model, fewer)


def test_a_fresh_model_is_armed_by_keep_zero_blocks():
    pruned, fresh = net(), net()
    sparseflow.prune_blocks(pruned)
    fresh.load_state_dict(pruned.state_dict())
    record = sparseflow.keep_zero_blocks(fresh)
    assert [layer.name for layer in record.layers if layer.pruned] == ["2", "7"]
    assert record["9"].reason == "no block is zero"
    zeros = zeros_of(pruned)
    train(fresh)
    assert still_zero(fresh, zeros)


def test_keep_zero_blocks_releases_layers_without_zero_blocks():
    model = net()
    sparseflow.prune_blocks(model)
    model.load_state_dict(net().state_dict())
    assert not any(layer.pruned for layer in sparseflow.keep_zero_blocks(model).layers)
    train(model, steps=1)
    assert all(bool((p != 0).all()) for p in model.parameters() if p.dim() > 1)


def test_a_dead_model_leaves_no_mask_behind():
    model = net()
    sparseflow.prune_blocks(model)
    held = len(pruning._live)
    del model
    gc.collect()
    assert len(pruning._live) < held


# ---- frameworks and accelerated models ------------------------------------------------------------------------------


def spikingjelly_net():
    torch.manual_seed(0)
    model = nn.Sequential(
        layer.Conv2d(2, 32, 3, padding=1, bias=False),
        neuron.LIFNode(),
        layer.Conv2d(32, 48, 3, padding=1, bias=False),
        neuron.LIFNode(),
        layer.Flatten(),
        layer.Linear(48 * 64, 32),
        neuron.LIFNode(),
        layer.Linear(32, 10),
    )
    functional.set_step_mode(model, "m")
    with torch.no_grad():
        model[2].weight.mul_(6.0)
        model[5].weight.mul_(6.0)
    return model


class SnnTorchNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.lif1 = nn.Conv2d(2, 32, 3, padding=1), snntorch.Leaky(beta=0.5)
        self.conv2, self.lif2 = nn.Conv2d(32, 48, 3, padding=1), snntorch.Leaky(beta=0.5)
        self.fc, self.lif3 = nn.Linear(48 * 64, 10), snntorch.Leaky(beta=0.5)

    def forward(self, x):
        m1, m2, m3 = self.lif1.init_leaky(), self.lif2.init_leaky(), self.lif3.init_leaky()
        out = []
        for step in x:
            s1, m1 = self.lif1(self.conv1(step), m1)
            s2, m2 = self.lif2(self.conv2(s1), m2)
            s3, m3 = self.lif3(self.fc(s2.flatten(1)), m3)
            out.append(s3)
        return torch.stack(out)


@pytest.mark.parametrize("build", [spikingjelly_net, SnnTorchNet])
def test_networks_of_both_frameworks_are_fine_tuned(build):
    model = build()
    record = sparseflow.prune_blocks(model, density=0.25)
    assert sum(layer.pruned for layer in record.layers) >= 1
    zeros = zeros_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(2):
        functional.reset_net(model)
        optimizer.zero_grad()
        F.mse_loss(model((torch.rand(3, 2, 2, 8, 8) < 0.5).float()), torch.ones(3, 2, 10)).backward()
        optimizer.step()
    assert still_zero(model, zeros)
