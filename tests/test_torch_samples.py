"""PyTorch's own samples for Conv and Linear, run through the swapped layers and the functional operations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

from sparseflow.dispatch.runtime import LayerRuntime, RuntimeConfig
from sparseflow.kernels import functional
from sparseflow.modules.swap import swap
from sparseflow.plan import LayerPlan, Path, Provenance, Reason

_MODULES = [m for m in module_db if m.module_cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)]
_OPS = {op.name: op for op in op_db if op.name.startswith("nn.functional.")}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def swapped(layer):
    plan = LayerPlan("layer", "conv", Path.DENSE, Reason.NOT_MEASURED, Provenance.BINARY)
    swap(layer, LayerRuntime(plan, RuntimeConfig(mode="sparse")))
    return layer


def sparsify(x):
    return x * (torch.rand_like(x, dtype=torch.float32) < 0.3)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("info", _MODULES, ids=lambda m: m.module_cls.__name__)
def test_module_samples(info, dtype, training):
    samples = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=training)
    count = 0
    for sample in samples:
        build, call = sample.constructor_input, sample.forward_input
        layer = info.module_cls(*build.args, **build.kwargs).to(dtype).train(training)
        x = sparsify(call.args[0] if call.args else call.kwargs["input"])
        dense = layer(x)
        ours = swapped(layer)(x)
        torch.testing.assert_close(ours, dense)
        assert ours.stride() == dense.stride()
        count += 1
    assert count


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d", "linear"])
def test_functional_samples(name):
    op = _OPS[f"nn.functional.{name}"]
    ours = functional.linear if name == "linear" else functional.conv
    count = 0
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        x = sample.input.detach()
        if name != "linear" and x.dim() != int(name[4]) + 2:
            continue  # unbatched: the module adds the dimension
        if name == "linear" and sample.args[0].dim() == 1:
            with pytest.raises(ValueError, match="weight"):
                ours(x, *sample.args)
            continue
        names = ("weight", "bias", "stride", "padding", "dilation", "groups")
        arguments = {**dict(zip(names, sample.args, strict=False)), **sample.kwargs}
        torch.testing.assert_close(ours(x, **arguments), op.op(x, *sample.args, **sample.kwargs))
        count += 1
    assert count
