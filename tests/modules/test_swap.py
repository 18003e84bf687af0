"""The swapped layer is the user's layer: same object, parameters, hooks, keys, copies and gradients."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

import sparseflow
from sparseflow.modules.swap import runtimes

from .nets import SPIKE_FED, Fire, conv_net, dense_and_sparse, images


@pytest.fixture
def net():
    return sparseflow.accelerate(conv_net().eval(), images(), mode="sparse")


def ran_sparse(model) -> set[str]:
    return {
        name for name, r in runtimes(model).items() if sum(n for path, n in r.stats.calls.items() if path != "dense")
    }


def assert_agrees(model, x=None):
    dense, ours = dense_and_sparse(model, images() if x is None else x)
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-5)


def test_the_spike_fed_layers_run_sparse_and_agree(net):
    assert set(runtimes(net)) == set(SPIKE_FED)
    assert ran_sparse(net) == set(SPIKE_FED)
    assert_agrees(net)


def test_identity_of_module_parameters_and_state_dict():
    plain = conv_net().eval()
    layers, parameters = list(plain.modules()), dict(plain.named_parameters())
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    attributes = [set(m.__dict__) for m in layers]
    classes = [type(m) for m in layers]
    accelerated = sparseflow.accelerate(plain, images(), mode="sparse")
    assert accelerated is plain
    assert all(a is b for a, b in zip(layers, plain.modules(), strict=True))
    assert all(parameters[k] is v for k, v in plain.named_parameters())
    assert isinstance(plain[2], nn.Conv2d)
    for state in (plain.state_dict(), sparseflow.restore(plain).state_dict()):
        assert list(state) == list(before)
        assert all(torch.equal(state[k], before[k]) for k in before)
    assert [type(m) for m in layers] == classes
    assert [set(m.__dict__) for m in layers] == attributes


def test_restored_and_plain_models_are_left_alone_by_restore():
    plain = conv_net().eval()
    assert sparseflow.restore(plain) is plain
    x = images()
    with torch.no_grad():
        before = plain(x)
        sparseflow.restore(sparseflow.accelerate(plain, x, mode="sparse"))
        assert torch.equal(plain(x), before)


def test_hooks_fire_as_before_and_not_while_planning():
    plain, seen = conv_net().eval(), []
    plain[2].register_forward_hook(lambda m, args, out: seen.append(out.shape))
    plain[2].register_forward_pre_hook(lambda m, args: None)
    sparseflow.accelerate(plain, images(), mode="sparse")
    assert seen == []
    plain(images())
    assert seen == [(2, 32, 8, 8)]


def test_a_hook_may_replace_the_output(net):
    handle = net[2].register_forward_hook(lambda m, args, out: out * 0)
    with torch.no_grad():
        assert torch.equal(net[2](images(1).new_ones(1, 32, 8, 8)), torch.zeros(1, 32, 8, 8))
    handle.remove()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_independent_and_still_sparse(net, clone):
    twin = clone(net)
    assert type(twin[2]) is type(net[2])
    with torch.no_grad():
        twin[2].weight.zero_()
    assert_agrees(net)
    assert_agrees(twin)
    with torch.no_grad():
        assert not torch.equal(net(images()), twin(images()))
    assert ran_sparse(twin) == set(SPIKE_FED)


def test_torch_save_and_load(net):
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        assert torch.equal(again(images()), net(images()))


def _by_optimizer(layer):
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=0.1).step()


WRITES = {
    "in place": lambda layer: layer.weight.detach().mul_(-1.5),
    "through data": lambda layer: layer.weight.data.mul_(-1.5),
    "new data": lambda layer: setattr(layer.weight, "data", layer.weight.data * -1.5),
    "new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach() * -1.5)),
    "load_state_dict": lambda layer: layer.load_state_dict({k: v * -1.5 for k, v in layer.state_dict().items()}),
    "optimizer": _by_optimizer,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_weight_updates_are_never_stale(net, write):
    with torch.no_grad():
        before = net(images())
    write(net[2])
    write(net[8])
    assert_agrees(net)
    with torch.no_grad():
        assert not torch.allclose(net(images()), before)


def test_refresh_drops_the_packed_copy(net):
    net[2].weight.data[0, 0, 0, 0] += 100.0
    sparseflow.refresh(net)
    assert_agrees(net)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_conversion(net, dtype):
    net.to(dtype)
    with sparseflow.verify(net) as watch, torch.no_grad():
        assert net(images().to(dtype)).dtype == dtype
    assert watch.checked == len(SPIKE_FED)


def test_memory_formats_and_strided_input(net):
    x = images(3)
    assert_agrees(net, x.to(memory_format=torch.channels_last))
    assert_agrees(net, images(6)[::2])
    layer = net[2]
    spikes = (torch.rand(2, 32, 8, 16) < 0.1).float()[..., ::2]
    dense, ours = dense_and_sparse(net, x)
    with torch.no_grad(), sparseflow.disabled(net):
        dense = layer(spikes)
    with torch.no_grad():
        ours = layer(spikes)
    torch.testing.assert_close(ours, dense)
    assert ours.stride() == dense.stride()
    net.to(memory_format=torch.channels_last)
    assert_agrees(net, x)


def test_batch_zero_and_unbatched(net):
    with torch.no_grad():
        assert net(images(0)).shape == (0, 10)
        single = (torch.rand(32, 8, 8) < 0.1).float()
        ours = net[2](single)
        with sparseflow.disabled(net):
            torch.testing.assert_close(ours, net[2](single))


def test_silent_input_gives_the_bias(net):
    with torch.no_grad():
        y = net[2](torch.zeros(2, 32, 8, 8))
    assert torch.equal(y, net[2].bias.view(1, -1, 1, 1).expand_as(y))


def test_wrong_input_raises_what_dense_raises(net):
    with pytest.raises(RuntimeError):
        net[2](torch.zeros(2, 31, 8, 8))
    with pytest.raises(RuntimeError):
        net[8](torch.zeros(2, 127))
    with pytest.raises(RuntimeError):
        net[2](torch.zeros(2, 32, 8, 8, dtype=torch.float64))


def test_gradients_equal_the_dense_ones(net):
    net.train()

    def grads():
        net.zero_grad()
        x = images().requires_grad_()
        net(x).square().sum().backward()
        return [x.grad, *(p.grad for p in net.parameters())]

    before = sum(n for r in runtimes(net).values() for path, n in r.stats.calls.items() if path != "dense")
    ours = grads()
    assert sum(n for r in runtimes(net).values() for p, n in r.stats.calls.items() if p != "dense") == before + 3
    with sparseflow.disabled(net):
        theirs = grads()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_an_ordinary_training_loop_trains_the_same():
    losses = []
    for fast in (False, True):
        model = conv_net()
        if fast:
            sparseflow.accelerate(model, images(), mode="sparse")
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        labels = torch.arange(8) % 10
        history = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images(8)), labels)
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-3, atol=1e-4)


def test_autocast_gives_what_dense_autocast_gives(net):
    with torch.autocast("cpu", torch.bfloat16):
        dense, ours = dense_and_sparse(net, images())
        assert ours.dtype == dense.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), dense.float(), rtol=0.05, atol=0.05)
        net(images()).sum().backward()
    assert net[2].weight.grad.dtype == torch.float32


def test_compile_fullgraph(net):
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    before = runtimes(net)["2"].stats.calls.total()
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), net(images()))
        torch.testing.assert_close(compiled(images() * 1.1), net(images() * 1.1))
    assert runtimes(net)["2"].stats.calls.total() == before + 4
    loss = compiled(images()).sum()
    loss.backward()
    assert net[2].weight.grad is not None


def test_export_records_the_operation(net):
    program = torch.export.export(net, (images(),))
    targets = {str(node.target) for node in program.graph.nodes}
    assert "sparseflow.conv.default" in targets
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images()), net(images()))


def test_function_transforms_and_tracing_run_dense(net):
    layer, x = net[2], (torch.rand(3, 2, 32, 8, 8) < 0.1).float()
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(layer)(x), torch.stack([layer(v) for v in x]))
        traced = torch.jit.trace(layer, x[0])
        torch.testing.assert_close(traced(x[1]), layer(x[1]))


def test_shared_modules_are_swapped_once():
    sparseflow.register_neuron(Fire, overwrite=True)
    shared = nn.Linear(16, 16)
    model = nn.Sequential(nn.Linear(16, 16), Fire(), shared, Fire(), shared).eval()
    sparseflow.accelerate(model, torch.randn(2, 16) * 3, mode="sparse")
    assert list(runtimes(model)) == ["2"]
    assert runtimes(model)["2"].stats.calls.total() == 2
    assert_agrees(model, torch.randn(2, 16) * 3)


def test_two_models_and_many_threads():
    nets = [sparseflow.accelerate(conv_net(width).eval(), images(), mode="sparse") for width in (16, 32)]
    with torch.no_grad():
        expected = [net(images()) for net in nets]
        results: list[bool] = []

        def work(index):
            with torch.no_grad():
                for _ in range(20):
                    results.append(torch.equal(nets[index % 2](images()), expected[index % 2]))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 80
    assert all(results)


def test_inference_mode(net):
    with torch.inference_mode():
        ours = net(images())
    with torch.no_grad():
        torch.testing.assert_close(ours, net(images()))


def test_repr_says_what_runs(net):
    assert "sparseflow=event" in repr(net[2])
    assert repr(net[2]).startswith("SpikeConv2d(32, 32")
