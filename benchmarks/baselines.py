"""What whole networks are timed against, and how a case says what to time: shared by the end-to-end benchmarks.

Dense competitors, all steps in one call: ``eager`` as the user wrote it, ``eager channels_last``, and ``torch.compile``
with inductor freezing (batch norm folded, weights prepacked) in fp32 and bf16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from sparseflow.frameworks import neuron_spec


def mean_over_time(output: Tensor) -> Tensor:
    """Logits ``[N, C]`` of a multi-step SpikingJelly network's output ``[T, N, C]``."""
    return output.mean(0)


@dataclasses.dataclass(frozen=True)
class Case:
    """One model at one batch size: how to build it, and inputs ``[T, N, C, H, W]`` that follow each other.

    ``reset`` puts the neurons to rest and ``readout`` makes what the class is read from, ``[N, C]``, of an output.
    ``freeze`` is not for networks that replace a buffer in each call, as snnTorch's do: each would compile anew.
    """

    name: str
    activity: str
    build: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    compiled: bool = True
    reset: Callable[[nn.Module], object] = functional.reset_net
    readout: Callable[[Any], Tensor] = mean_over_time
    freeze: bool = True


def compiled(
    net: nn.Module, x: Tensor, reset: Callable[[nn.Module], object] = functional.reset_net, freeze: bool = True
) -> nn.Module:
    """``torch.compile``, with ``freeze`` with weights frozen into the graph: batch norm folded, convolutions prepacked.

    The setting stays on: what is recompiled at a later call would otherwise not be frozen, and
    ``torch._dynamo.reset()``, which makes every compiled network recompile, is left to :func:`fresh_compiler`. The
    first call is eager, so that neuron states have their shapes and none becomes a dynamic one.

    Raises:
        torch._dynamo.exc.FailOnRecompileLimitHit: in a later call, instead of running eager under this name.
    """
    import torch._inductor.config as inductor

    inductor.freezing = freeze
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    fast = torch.compile(net)
    with torch.no_grad():
        for run in (net, fast, fast, fast):
            reset(net)
            run(x)
    return fast


def in_dtype(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``net`` itself, computing in ``dtype``: snnTorch's surrogates give float32 spikes whatever they get."""
    for module in net.modules():
        if neuron_spec(module) is not None:
            module.register_forward_hook(_spikes_like_input)
    return net.to(dtype)


def _spikes_like_input(_module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
    if isinstance(output, tuple):
        return (output[0].to(args[0].dtype), *output[1:])
    return output.to(args[0].dtype)


def fresh_compiler() -> None:
    """Forget what was compiled before, so that the variants of a case do not run into the recompilation limit."""
    torch._dynamo.reset()


def baselines(case: Case, with_compile: bool) -> Iterator[tuple[str, nn.Module, torch.dtype]]:
    """Name, network and input dtype of every dense competitor."""
    yield "eager", case.build(), torch.float32
    yield "eager channels_last", case.build().to(memory_format=torch.channels_last), torch.float32
    if with_compile:
        fast = compiled(case.build(), case.inputs[0], case.reset, case.freeze)
        yield "compiled fp32", fast, torch.float32
        half = in_dtype(case.build(), torch.bfloat16)
        yield "compiled bf16", compiled(half, case.inputs[0].bfloat16(), case.reset, case.freeze), torch.bfloat16


class Call:
    """Runs a network on the next input, neuron state reset before."""

    def __init__(
        self,
        net: nn.Module,
        inputs: tuple[Tensor, ...],
        dtype: torch.dtype = torch.float32,
        reset: Callable[[nn.Module], object] = functional.reset_net,
    ):
        self.net, self.inputs, self.turn, self.reset = net, [x.to(dtype) for x in inputs], 0, reset

    def __call__(self) -> Any:
        self.turn = (self.turn + 1) % len(self.inputs)
        self.reset(self.net)
        return self.net(self.inputs[self.turn])
