"""Small spiking nets whose results do not depend on the order of sums, and their comparison with a dense twin.

Weights, inputs and batch norms are multiples of powers of two, so that every sum is exact: fused or not, all spikes and
membranes have to be equal bit for bit.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import snntorch
import torch
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

import sparseflow
from sparseflow.frameworks import neuron_spec, state_tensors
from sparseflow.graph.steps import Eager
from sparseflow.modules.fused.model import fusion_of
from sparseflow.modules.fused.program import Program

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Net(nn.Module):
    """Modules by name and a function of itself and the inputs as its forward."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def lif(**options: Any) -> nn.Module:
    return neuron.LIFNode(**{"tau": 2.0, "step_mode": "m", **options})


def iff(**options: Any) -> nn.Module:
    return neuron.IFNode(step_mode="m", **options)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Module:
    defaults = {"padding": kernel // 2, "bias": False, "step_mode": "m"}
    return layer.Conv2d(inputs, outputs, kernel, **{**defaults, **options})


def norm(channels: int) -> nn.Module:
    return layer.BatchNorm2d(channels, step_mode="m")


def linear(inputs: int, outputs: int, **options: Any) -> nn.Module:
    return layer.Linear(inputs, outputs, step_mode="m", **options)


def leaky(**options: Any) -> nn.Module:
    return snntorch.Leaky(**{"beta": 0.5, "threshold": 0.5, **options})


def images(steps: int = 3, batch: int = 2, channels: int = 3, size: int = 8, seed: int = 1) -> Tensor:
    """``[T, N, C, H, W]`` of eighths."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 24, (steps, batch, channels, size, size), generator=generator) / 8


def features(steps: int = 3, batch: int = 2, width: int = 6, seed: int = 1) -> Tensor:
    """``[T, N, F]`` of eighths."""
    return torch.randint(-8, 24, (steps, batch, width), generator=torch.Generator().manual_seed(seed)) / 8


def on_grid(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give every layer and batch norm numbers of few bits, and about a fifth more positive than negative weights."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, shape: torch.Size) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).float()

    def one_of(shape: torch.Size) -> Tensor:
        return torch.tensor([0.5, 1.0, 2.0])[torch.randint(0, 3, shape, generator=generator)]

    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, _LAYERS):
                grain = 16 if isinstance(module, nn.Linear) else 64
                module.weight.copy_(whole(-16, 25, module.weight.shape) / grain)
                if module.bias is not None:
                    module.bias.copy_(whole(-8, 9, module.bias.shape) / 16)
            elif isinstance(module, _BatchNorm):
                module.eps = 0.0
                module.running_mean.copy_(whole(-8, 9, module.running_mean.shape) / 16)
                module.running_var.copy_(one_of(module.running_var.shape) ** 2)
                if module.affine:
                    module.weight.copy_(one_of(module.weight.shape))
                    module.bias.copy_(whole(-8, 9, module.bias.shape) / 16)
    return net


def twins(net: nn.Module, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """A dense copy of ``net``, and ``net`` accelerated with every block on events."""
    dense = copy.deepcopy(net).eval()
    return dense, sparseflow.accelerate(net.eval(), kwargs or args, mode="sparse")


def program(model: nn.Module) -> Program:
    """The plan that ran last; fails where the last call was not fused."""
    fusion = fusion_of(model)
    assert fusion is not None, sparseflow.report(model).notes
    assert fusion.why is None, fusion.why
    assert fusion.last is not None, "the last call had no plan"
    assert fusion.last.program is not None, fusion.last.detail
    return fusion.last.program


def is_fused(model: nn.Module) -> bool:
    """Whether the last call ran a fused plan."""
    fusion = fusion_of(model)
    ran = fusion is not None and fusion.why is None and fusion.last is not None
    return ran and fusion.last.program is not None


def kinds(model: nn.Module) -> dict[str, int]:
    """How many steps of each kind the plan has; of those that run as they are, the modules and functions."""
    found = Counter(type(step).__name__ for step in program(model).fused.steps if not isinstance(step, Eager))
    eager = [step.out for step in program(model).fused.steps if isinstance(step, Eager)]
    found["Eager"] += sum(node.op.startswith("call") for node in eager)
    return {kind: count for kind, count in found.items() if count}


def fresh(tree: Any) -> Any:
    """Tensors of their own, so that no call sees what another one has written into its input."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def outputs(model: nn.Module, *args: Any, **kwargs: Any) -> list[Any]:
    with torch.no_grad():
        return tree_leaves(model(*fresh(args), **fresh(kwargs)))


def states(model: nn.Module) -> dict[str, Tensor]:
    """What the neurons remember."""
    found = {name: state_tensors(module) for name, module in model.named_modules()}
    return {f"{name}.{key}": value for name, held in found.items() for key, value in held.items()}


def assert_equal(ours: Any, dense: Any) -> None:
    """Equal bit for bit, and laid out as contiguously."""
    assert len(ours) == len(dense)
    for a, b in zip(ours, dense, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            assert a.is_contiguous() or not b.is_contiguous()
        else:
            assert a == b


def assert_twins(dense: nn.Module, ours: nn.Module, *args: Any, calls: int = 2, **kwargs: Any) -> None:
    """Equal outputs and states over several calls without a reset."""
    for _ in range(calls):
        assert_equal(outputs(ours, *args, **kwargs), outputs(dense, *args, **kwargs))
        expected, found = states(dense), states(ours)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
            )


def check(net: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Accelerate ``net`` on the grid, compare it with its twin, and give it back."""
    dense, ours = twins(on_grid(net), *args, **kwargs)
    assert_alive(dense, *args, **kwargs)
    assert_twins(dense, ours, *args, **kwargs)
    return ours


def assert_alive(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Every neuron fires now and then: comparing zeros would prove nothing."""
    model = copy.deepcopy(model)
    fired: dict[str, float] = {}

    def note(name: str, output: Any) -> None:
        spikes_ = output[0] if isinstance(output, tuple) else output
        fired[name] = fired.get(name, 0.0) + float(spikes_.mean())

    for name, module in model.named_modules():
        if neuron_spec(module) is not None:
            module.register_forward_hook(lambda _module, _args, output, name=name: note(name, output))
    outputs(model, *args, **kwargs)
    outputs(model, *args, **kwargs)
    assert all(fired.values()), fired


def stem(width: int = 8) -> dict[str, nn.Module]:
    """Convolution and neuron by which images become spikes."""
    return {"c0": conv(3, width), "n0": iff()}


def spikes(net: Any, x: Tensor) -> Tensor:
    """What :func:`stem` makes of images."""
    return net.n0(net.c0(x))
