"""Swap a layer in place: the same object, parameters, hooks and keys, under a subclass of its own class."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad
from torch.nn.modules.conv import _ConvNd

from sparseflow.dispatch.runtime import LayerRuntime
from sparseflow.kernels import functional
from sparseflow.kernels.base import Call, ConvCall, LinearCall

ATTRIBUTE = "_sparseflow"
_CALL = "_sparseflow_call"
_PLAIN = (Tensor, nn.Parameter)


class _Swapped(nn.Module):
    """What swapped convolutions and linear layers share: their runtime, and how they are copied and pickled."""

    _sparseflow: LayerRuntime
    _sparseflow_original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(2)  # of which the first two rebuild by a class nobody can import
        return _rebuild, (type(self)._sparseflow_original,), *state

    def extra_repr(self) -> str:
        """The layer's own description plus what it runs."""
        plan = self._sparseflow.describe()
        return f"{super().extra_repr()}, sparseflow={plan.path}"


class SpikeConv(_Swapped):
    """Mixed in before the convolution's own class; replaces the one method every convolution goes through."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        runtime = self._sparseflow
        if torch.compiler.is_compiling() and not runtime.disabled:
            return _record(self, input, weight, bias, _conv_call(self))
        if runtime.goes_dense(input):
            return super()._conv_forward(input, weight, bias)  # type: ignore[misc]
        call = _cached_conv_call(self)
        if input.dim() == weight.dim() - 1:  # no batch dimension
            return _run(runtime, input.unsqueeze(0), weight, bias, call).squeeze(0)
        return _run(runtime, input, weight, bias, call)


class SpikeLinear(_Swapped):
    """Mixed in before the linear layer's own class."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., M]``."""
        runtime = self._sparseflow
        if torch.compiler.is_compiling() and not runtime.disabled:
            return _record(self, input, self.weight, self.bias, _LINEAR)
        if runtime.goes_dense(input):
            return super().forward(input)
        return _run(runtime, input, self.weight, self.bias, _LINEAR)


_LINEAR = LinearCall()


def _conv_call(conv: Any) -> ConvCall:
    return functional.conv_call(
        conv.weight.dim() - 2, conv.weight, conv.stride, conv.padding, conv.dilation, conv.groups
    )


def _cached_conv_call(conv: Any) -> ConvCall:
    arguments = (conv.stride, conv.padding, conv.dilation, conv.groups)
    cached = conv.__dict__.get(_CALL)
    if cached is None or cached[0] != arguments:
        cached = conv.__dict__[_CALL] = (arguments, _conv_call(conv))
    return cached[1]


def _autocast(x: Tensor) -> Tensor:
    """``x`` as the dense layer would see it: autocast leaves float64 and integers alone."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _record(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    """Put the layer's registered operation into the graph that is being compiled or exported."""
    x, training = _autocast(x), _needs_grad(x, weight, bias)
    handle = layer._sparseflow.handle
    if isinstance(call, ConvCall) and x.dim() == weight.dim() - 1:
        return functional.run_op(handle, x.unsqueeze(0), weight, bias, call, training=training).squeeze(0)
    return functional.run_op(handle, x, weight, bias, call, training=training)


def _run(runtime: LayerRuntime, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    """Route one eager call: autograd goes through the registered operation, plain tensors directly."""
    autocast = torch.is_autocast_enabled(x.device.type)
    x = _autocast(x) if autocast else x
    if watched_by_others() or not (_plain(x) and _plain(weight) and (bias is None or _plain(bias))):
        return call.dense(x, weight, bias)
    if not autocast and (x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype)):
        return call.dense(x, weight, bias)  # raises what the dense layer raises
    if _needs_grad(x, weight, bias):
        if runtime.always_dense(x, weight, bias, call):
            return call.dense(x, weight, bias)
        return functional.run_op(runtime.handle, x, weight, bias, call, training=True)
    return runtime.run(x, weight, bias, call)


def _plain(tensor: Tensor) -> bool:
    """Whether the memory of ``tensor`` holds its values: no subclass, sparse layout or pending negation."""
    return type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_neg()


def watched_by_others() -> bool:
    """Whether somebody other than autograd follows the operations, and has to see PyTorch's own.

    These are ``torch.func`` transforms, forward-mode derivatives, ``torch.jit.trace`` and dispatch modes (counters of
    operations, selective checkpointing).
    """
    return (
        maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _needs_grad(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)


@functools.cache
def _swapped_class(original: type[nn.Module]) -> type[nn.Module]:
    mixin = SpikeConv if issubclass(original, _ConvNd) else SpikeLinear
    body = {"_sparseflow_original": original, "__module__": original.__module__, "__doc__": original.__doc__}
    return type(f"Spike{original.__name__}", (mixin, original), body)  # type: ignore[return-value]


def _rebuild(original: type[nn.Module]) -> nn.Module:
    cls = _swapped_class(original)
    return cls.__new__(cls)


def swap(layer: nn.Module, runtime: LayerRuntime) -> None:
    """Turn ``layer`` into its two-stage form in place."""
    setattr(layer, ATTRIBUTE, runtime)
    layer.__class__ = _swapped_class(type(layer))


def unswap(layer: nn.Module) -> None:
    """Undo :func:`swap`, exactly."""
    layer.__class__ = _unswapped_class(type(layer))
    for name in (ATTRIBUTE, _CALL):
        layer.__dict__.pop(name, None)


def _unswapped_class(cls: type) -> type:
    """The class without our part; ``parametrize`` may have derived its own from ours in the meantime."""
    if "_sparseflow_original" in vars(cls):
        return cls._sparseflow_original  # type: ignore[attr-defined]
    if not issubclass(cls, _Swapped):
        return cls
    body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, tuple(map(_unswapped_class, cls.__bases__)), body)


def swap_again(layer: nn.Module, cls: type[nn.Module], runtime: LayerRuntime) -> None:
    """Undo :func:`unswap`: the class and the runtime the layer had before."""
    setattr(layer, ATTRIBUTE, runtime)
    layer.__class__ = cls


def runtime_of(layer: nn.Module) -> LayerRuntime | None:
    """The runtime of a swapped layer, ``None`` for any other module."""
    return layer.__dict__.get(ATTRIBUTE) if isinstance(layer, _Swapped) else None


def runtimes(model: nn.Module) -> dict[str, LayerRuntime]:
    """Every swapped layer of ``model`` by qualified name, shared modules once."""
    found = ((name, runtime_of(module)) for name, module in model.named_modules())
    return {name: runtime for name, runtime in found if runtime is not None}
