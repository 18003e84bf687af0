"""Weights that are replaced, recomputed or of an unusual kind: the sparse result is that of the weight of now."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor

import sparseflow
from sparseflow.modules.swap import runtimes

from .nets import conv_net, dense_and_sparse, images


@pytest.fixture
def net():
    return sparseflow.accelerate(conv_net().eval(), images(), mode="sparse")


def spikes(*shape):
    return (torch.rand(*shape) < 0.1).float()


def assert_agrees(model, x):
    dense, ours = dense_and_sparse(model, x)
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-5, equal_nan=True)
    return ours


def test_a_recomputed_weight_at_a_used_address(net):
    """A pre-hook (pruning, weight norm) makes a new weight each call, often where the last one lay."""
    layer, x = net[8], torch.ones(1, 128)
    base = layer.weight.detach().clone()
    for step in range(40):
        del layer.weight
        layer.weight = base.clone()
        layer.weight[step % 10, step * 13 % 128] += 100.0
        assert_agrees(layer, x)


def test_pruning_after_accelerate(net):
    prune.l1_unstructured(net[2], "weight", 0.5)
    assert_agrees(net, images())
    net[2].weight_mask.zero_().view(-1)[7] = 1
    assert_agrees(net, images())
    prune.remove(net[2], "weight")
    assert_agrees(net, images())


def test_output_channels_pruned_away(net):
    """The strides of the weight stay, its shape does not."""
    layer = net[2]
    layer.weight, layer.bias = nn.Parameter(layer.weight[:24].detach()), nn.Parameter(layer.bias[:24].detach())
    assert assert_agrees(layer, spikes(2, 32, 8, 8)).shape[1] == 24


def test_parametrization_after_accelerate_survives_restore(net):
    parametrizations.weight_norm(net[2])
    ours = assert_agrees(net, images())
    with torch.no_grad():
        net[2].parametrizations.weight.original0.mul_(1.5)
    assert not torch.allclose(assert_agrees(net, images()), ours)
    sparseflow.restore(net)
    assert parametrize.is_parametrized(net[2])
    with torch.no_grad():
        expected = net(images())
    parametrize.remove_parametrizations(net[2], "weight")
    assert type(net[2]) is nn.Conv2d
    with torch.no_grad():
        torch.testing.assert_close(net(images()), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_poisons_like_dense(net, value):
    """Dense gives NaN also where there is no spike; a diverged training must not be hidden."""
    with torch.no_grad():
        net[8].weight[3, 5] = value
    assert not torch.isfinite(assert_agrees(net[8], torch.zeros(1, 128))[0, 3])
    with torch.no_grad():
        net[8].weight[3, 5] = 0.5
    assert torch.isfinite(assert_agrees(net[8], spikes(1, 128))).all()
    assert runtimes(net)["8"].stats.calls["event"] > 1


def test_writes_through_data_are_seen_under_autocast(net):
    x = spikes(2, 128)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = net[8](x)
        net[8].weight.data.mul_(-3)
        dense, ours = dense_and_sparse(net[8], x)
        torch.testing.assert_close(ours, dense, rtol=0.05, atol=0.05)
        assert not torch.allclose(ours, before)


def _csr(weight):
    return weight.to_sparse_csr()


def _negated_view(weight):
    view = torch.complex(torch.zeros_like(weight), -weight).conj().imag
    assert view.is_neg()
    return view


def _subclass(weight):
    return TwoTensor(weight, weight.clone())


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("kind", [_csr, _negated_view, _subclass])
def test_weights_whose_memory_is_not_their_values(net, kind):
    layer = net[8]
    weight, x = layer.weight.detach(), spikes(3, 128)
    del layer.weight
    layer.weight = kind(weight)
    with torch.no_grad():
        dense, ours = nn.functional.linear(x, layer.weight, layer.bias), layer(x)
    assert type(ours) is type(dense)
    torch.testing.assert_close(ours, dense)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_inputs_whose_memory_is_not_their_values(net):
    layer, x = net[8], spikes(3, 128)
    with torch.no_grad():
        expected = layer(x)
        torch.testing.assert_close(layer(x.to_sparse()), expected)
        torch.testing.assert_close(layer(_negated_view(x)), expected)


@pytest.mark.parametrize("bias", [torch.zeros(7), torch.zeros(10, dtype=torch.float64), torch.zeros(10, device="meta")])
def test_a_bias_that_does_not_fit_raises_what_dense_raises(net, bias):
    net[8].bias = nn.Parameter(bias)
    for watch in (sparseflow.disabled(net), sparseflow.verify(net)):
        with watch, torch.no_grad(), pytest.raises(RuntimeError):
            net[8](spikes(3, 128))


def test_two_dtypes_in_turn_are_not_packed_again_and_again():
    """One packed copy is kept: where two are wanted in turn, packing is weighed against what it brings."""
    from sparseflow.dispatch.packing import PackedWeight
    from sparseflow.plan import Crossover

    class Kernel:
        dtype, packs = torch.float32, 0

        def pack(self, weight, variant):
            self.packs += 1
            return weight

        def matches(self, *_):
            return True

    kernel, packed, weight = Kernel(), PackedWeight(), torch.randn(4, 4)
    dear = Crossover("k", 0.5, 1.0, 0.1, 10.0, (0.1,), (0.5,), "a")
    for variant in "abababab":
        packed.get(weight, kernel, variant, dear, gain_ms=0.5)
    assert kernel.packs == 1
    for _ in range(50):
        packed.get(weight, kernel, "b", dear, gain_ms=0.5)
    assert kernel.packs == 2


def test_threads_that_want_the_weight_in_two_forms(net):
    """One packed copy serves all threads, and any of them may replace or drop it at any time."""
    spikes_in, failures = spikes(3, 128), []

    def call(autocast):
        try:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                expected = nn.functional.linear(spikes_in, net[8].weight, net[8].bias)
                for _ in range(200):
                    torch.testing.assert_close(net[8](spikes_in), expected, rtol=0.02, atol=0.02)
                    sparseflow.refresh(net)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(index % 2 == 0,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
