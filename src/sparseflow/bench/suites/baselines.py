"""What whole networks are timed against, and how a workload says what to time.

Dense competitors, all steps in one call: ``eager`` as the user wrote it, ``eager channels_last``, and ``torch.compile``
with inductor freezing (batch norm folded, weights prepacked) in fp32 and bf16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparseflow.frameworks import neuron_spec


def reset_spikingjelly(net: nn.Module) -> None:
    """Put every neuron of a SpikingJelly network to rest."""
    from spikingjelly.activation_based import functional

    functional.reset_net(net)


def mean_over_time(output: Tensor) -> Tensor:
    """Logits ``[N, C]`` of a multi-step SpikingJelly network's output ``[T, N, C]``."""
    return output.mean(0)


@dataclasses.dataclass(frozen=True)
class Workload:
    """One model at one batch size: how to build it, and inputs ``[T, N, ...]`` that follow each other.

    ``config`` is that of its points: the sizes, and ``activity``, ``"trained"`` or ``"stand-in"``. ``reset`` puts the
    neurons to rest and ``readout`` makes what the class is read from, ``[N, C]``, of an output. ``freeze`` is not for
    networks that replace a buffer in each call, as snnTorch's do: each would compile anew.
    """

    name: str
    config: dict[str, Any]
    build: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    reset: Callable[[nn.Module], object] = reset_spikingjelly
    readout: Callable[[Any], Tensor] = mean_over_time
    freeze: bool = True


def compiled(net: nn.Module, workload: Workload, dtype: torch.dtype = torch.float32) -> nn.Module:
    """``torch.compile`` of a network of this workload, called until it is compiled.

    Where the workload lets it, weights are frozen into the graph: batch norm folded, convolutions prepacked. The
    setting stays on: what is recompiled at a later call would otherwise not be frozen, and ``torch._dynamo.reset()``,
    which makes every compiled network recompile, is left to :func:`fresh_compiler`. The first call is eager, so that
    neuron states have their shapes and none becomes a dynamic one.

    Raises:
        torch._dynamo.exc.FailOnRecompileLimitHit: in a later call, instead of running eager under this name.
    """
    import torch._inductor.config as inductor

    inductor.freezing = workload.freeze
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    fast: Any = torch.compile(net)
    with torch.no_grad():
        for run in (net, fast, fast, fast):
            workload.reset(net)
            run(workload.inputs[0].to(dtype))
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


def baselines(
    workload: Workload, with_compile: bool, with_bf16: bool = True
) -> Iterator[tuple[str, nn.Module, torch.dtype]]:
    """Name, network and input dtype of every dense competitor; a layout only where there are images."""
    eager = workload.build()
    yield "eager", eager, torch.float32
    if any(parameter.dim() == 4 for parameter in eager.parameters()):
        yield "eager channels_last", workload.build().to(memory_format=torch.channels_last), torch.float32
    if with_compile:
        yield "compiled fp32", compiled(workload.build(), workload), torch.float32
    if with_compile and with_bf16:
        half = in_dtype(workload.build(), torch.bfloat16)
        yield "compiled bf16", compiled(half, workload, torch.bfloat16), torch.bfloat16


class Call:
    """Runs a network on the next input of a workload, neuron state reset before."""

    def __init__(self, net: nn.Module, workload: Workload, dtype: torch.dtype = torch.float32):
        self.net, self.reset, self.turn = net, workload.reset, 0
        self.inputs = [x.to(dtype) for x in workload.inputs]

    def __call__(self) -> Any:
        self.turn = (self.turn + 1) % len(self.inputs)
        self.reset(self.net)
        return self.net(self.inputs[self.turn])
