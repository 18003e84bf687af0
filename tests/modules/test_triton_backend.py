"""Whole small nets on the Triton kernels, which Triton's interpreter runs on CPU tensors."""

from __future__ import annotations

import copy
import pickle
import warnings
from concurrent import futures

import pytest
import torch
from torch import nn

import sparseflow
from sparseflow import Path, Reason
from sparseflow.dispatch.runtime import LayerRuntime, RuntimeConfig
from sparseflow.kernels.base import LinearCall
from sparseflow.modules.swap import runtimes
from sparseflow.plan import LayerPlan, Provenance

from .nets import SPIKE_FED, Fire, conv_net, dense_and_sparse, images


def accelerated(model=None, x=None, **options):
    options = {"backend": "triton", "mode": "sparse"} | options
    options = {"fuse": False, **options}  # layer by layer; fused blocks have tests of their own
    return sparseflow.accelerate((model or conv_net(16)).eval(), images(1) if x is None else x, **options)


@pytest.fixture(scope="module")
def shared():
    """For tests that leave the net as it was."""
    return accelerated()


def spikes(*shape):
    return (torch.rand(*shape) < 0.1).float()


def assert_agrees(model, x):
    dense, ours = dense_and_sparse(model, x)
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-5)
    return ours


def tile_calls(model):
    return {name: runtime.stats.calls[Path.TILE] for name, runtime in runtimes(model).items()}


def test_the_spike_fed_layers_run_on_tiles_within_the_error_budget(shared):
    before = tile_calls(shared)
    with sparseflow.verify(shared) as watch, torch.no_grad():
        shared(images(2))
    assert watch.checked == len(SPIKE_FED)
    assert tile_calls(shared) == {name: before[name] + 1 for name in SPIKE_FED}
    assert_agrees(shared, images(2))
    plan = sparseflow.report(shared)
    assert [layer.path for layer in plan.layers] == ["dense", *["tile"] * 3]
    assert plan.backend == "triton"


def test_memory_formats_unbatched_and_silent_input(shared):
    layer = shared[2]
    with torch.no_grad():
        for x in (spikes(2, 16, 8, 8).to(memory_format=torch.channels_last), spikes(2, 16, 8, 16)[..., ::2]):
            ours = layer(x)
            with sparseflow.disabled(shared):
                dense = layer(x)
            torch.testing.assert_close(ours, dense)
            assert ours.stride() == dense.stride()
        assert layer(spikes(16, 8, 8)).shape == (16, 8, 8)
        silent = layer(torch.zeros(1, 16, 8, 8))
        assert torch.equal(silent, layer.bias.view(1, -1, 1, 1).expand_as(silent))
        assert shared[8](spikes(0, 64)).shape == (0, 10)


def test_gradients_equal_the_dense_ones(shared):
    def gradients():
        shared.zero_grad()
        x = images(1).requires_grad_()
        shared(x).square().sum().backward()
        return [x.grad, *(p.grad.clone() for p in shared.parameters())]

    before, ours = tile_calls(shared), gradients()
    assert all(tile_calls(shared)[name] > before[name] for name in SPIKE_FED)
    with sparseflow.disabled(shared):
        dense = gradients()
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_dense_autocast_gives(shared, dtype):
    layer, x, before = shared[8], spikes(2, 64), tile_calls(shared)["8"]
    with torch.autocast("cpu", dtype):
        dense, ours = dense_and_sparse_layer(shared, layer, x)
        assert ours.dtype == dense.dtype == dtype
        torch.testing.assert_close(ours, dense, rtol=0.02, atol=0.02)
        layer(x).float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert tile_calls(shared)["8"] == before + 2


def dense_and_sparse_layer(model, layer, x):
    with torch.no_grad():
        with sparseflow.disabled(model):
            dense = layer(x)
        return dense, layer(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_fullgraph(shared, backend):
    torch._dynamo.reset()
    compiled = torch.compile(shared, fullgraph=True, backend=backend)
    before = tile_calls(shared)["2"]
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(1)), shared(images(1)))
    assert tile_calls(shared)["2"] == before + 2
    compiled(images(1)).sum().backward()
    assert shared[2].weight.grad is not None


def test_export_records_the_operation(shared):
    program = torch.export.export(shared, (images(1),))
    assert "sparseflow.conv.default" in {str(node.target) for node in program.graph.nodes}
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images(1)), shared(images(1)))


def test_the_operations_pass_opcheck(shared):
    conv, linear = (runtimes(shared)[name].handle for name in ("2", "8"))
    weight = shared[2].weight.detach().requires_grad_()
    arguments = (spikes(1, 16, 8, 8), weight, None, [1, 1], [1, 1, 1, 1], [1, 1], 1, conv)
    torch.library.opcheck(torch.ops.sparseflow.conv.default, arguments)
    arguments = (spikes(1, 64), shared[8].weight.detach().requires_grad_(), None, linear)
    torch.library.opcheck(torch.ops.sparseflow.linear.default, arguments)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_independent_and_still_sparse(shared, clone):
    twin = clone(shared)
    with torch.no_grad():
        twin[2].weight.zero_()
    assert_agrees(twin, images(1))
    assert_agrees(shared, images(1))
    assert tile_calls(twin)["2"] > 0


def test_weight_changes_are_noticed_and_writes_through_data_after_refresh():
    net = accelerated()
    before = assert_agrees(net, images(1))
    with torch.no_grad():
        net[2].weight.mul_(-1.5)
        net[8].bias.add_(1.0)
    assert not torch.allclose(assert_agrees(net, images(1)), before)
    net[2].weight.data.mul_(-1.5)
    sparseflow.refresh(net)
    assert_agrees(net, images(1))
    with torch.no_grad():
        net[8].weight[3, 5] = float("nan")
        net[8](
            torch.zeros(1, 64)
        )  # a weight that changed this often is checked without waiting: known at the next call
        assert net[8](torch.zeros(1, 64))[0, 3].isnan(), "dense multiplies zeros by it too"


def test_threads(shared):
    inputs = [images(n) for n in (1, 2, 1)]
    with torch.no_grad():
        expected = [shared(x) for x in inputs]
        with futures.ThreadPoolExecutor(3) as pool:
            found = list(pool.map(torch.no_grad()(shared), inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_state_dict_and_restore():
    plain = conv_net(16)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    net = accelerated(plain)
    for state in (net.state_dict(), sparseflow.restore(net).state_dict()):
        assert list(state) == list(before)
        assert all(torch.equal(state[name], before[name]) for name in before)
    assert type(net[2]) is nn.Conv2d


def small():
    sparseflow.register_neuron(Fire, overwrite=True)
    return nn.Sequential(nn.Linear(8, 16), Fire(), nn.Linear(16, 4)).eval()


def test_measured_choice_calibration_and_profile():
    """The interpreter never wins; that it was measured, on the axis of each kernel, is what counts."""
    model, x = small(), torch.randn(2, 8) * 3
    with torch.no_grad():
        expected = model(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sparseflow.NothingAcceleratedWarning)
            accelerated(model, x, mode="auto")
        torch.testing.assert_close(model(x), expected)
        plan = sparseflow.analyze(model, x)["2"]
        assert plan.reason is Reason.DENSE_WINS
        assert plan.crossover.sparse_ms[0] > plan.crossover.dense_ms > 0
        kernels = {kernel.path: measured for kernel, measured in runtimes(model)["2"].last_site.candidates}
        assert kernels[Path.TILE].eager.axis == "occupancy"
        assert kernels[Path.EVENT].eager.axis == "density"
        calibration = sparseflow.calibrate(model, [x])
        assert len(calibration.crossovers) == 2
        with sparseflow.profile(model) as profile:
            model(x)
    assert {layer.name for layer in profile.layers} == {"0", "1", "2"}


def test_no_call_waits_for_the_device():
    """Tensors on the meta device have no values that anybody could wait for; launches are recorded."""
    from sparseflow.kernels.triton.launch import recording

    model = accelerated(small(), torch.randn(2, 8) * 3)
    runtime = runtimes(model)["2"]
    kernel, measured = runtime.last_site.candidates[0]
    x, weight = spikes(2, 16).to("meta"), torch.zeros(4, 16, device="meta")
    with recording() as launches:
        packed = kernel.pack(weight, measured.eager.variant, inspect=False)
        scan = kernel.prescan(x, measured.eager.variant)
        assert scan.totals().shape == (2,)
        y = kernel.compute(x, scan, packed, None, measured.eager.variant)
    assert y.shape == LinearCall().dense(x, weight, None).shape
    assert len(launches) == 2


def test_a_model_on_the_cpu_says_why_other_backends_stay_dense(monkeypatch):
    from sparseflow.kernels import select

    meta, weight = torch.zeros(2, 16, device="meta"), torch.zeros(4, 16, device="meta")
    for backend in ("cpu", "torch", "triton", "auto"):
        refusal = select.candidates(meta, weight, LinearCall(), backend)
        assert refusal.reason is Reason.DEVICE
        assert "meta" in refusal.detail


def test_a_pruned_layer_runs_its_kernel_whatever_becomes_of_the_weight(monkeypatch):
    """Bound when the weight was pruned, it stays right when the zeros move or are gone."""
    from sparseflow.kernels.triton import backend, pruned

    monkeypatch.setattr(
        backend, "offered", lambda full, weight: (pruned.PrunedKernel(full, dict.fromkeys(pruned.WIDTHS, 0.5)),)
    )
    plan = LayerPlan("layer", "linear", Path.DENSE, Reason.NOT_MEASURED, Provenance.BINARY)
    runtime = LayerRuntime(plan, RuntimeConfig(backend="triton", mode="sparse"))
    weight, x = torch.randn(40, 48), spikes(3, 48)
    with torch.no_grad():
        weight[:16] = 0.0
        for change in (lambda: None, lambda: weight.copy_(weight.roll(16, 0)), lambda: weight.add_(1.0)):
            change()
            torch.testing.assert_close(runtime.run(x, weight, None, LinearCall()), x @ weight.t())
    assert runtime.stats.calls == {Path.PRUNED: 3}
    key = runtime.last_site.candidates[0][1].eager.key
    assert key.startswith("pruned|")
    assert "|blocks0.5|" in key
