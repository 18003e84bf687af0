"""The public door of the kernels: validated, differentiable ``torch.library`` operations.

``sparseflow::conv`` and ``sparseflow::linear`` carry fakes and gradients, so that ``torch.compile(fullgraph=True)``,
``torch.export`` and autograd see one opaque operation. Their last argument names a *runner*: the object that decides
between dense and sparse for one layer and owns its packed weights; it is negative where gradients are recorded. Runner
``0`` is stateless and always sparse.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .base import Call, ConvCall, LinearCall, Refusal
from .select import select


class Runner(Protocol):
    """Decides how one layer runs; see :class:`sparseflow.dispatch.runtime.LayerRuntime`."""

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, *, training: bool = False) -> Tensor:
        """Compute the layer without recording gradients; ``training`` says that the caller records them."""
        ...


STATELESS = 0
_runners: weakref.WeakValueDictionary[int, Runner] = weakref.WeakValueDictionary()
_handles = itertools.count(1)


def register_runner(runner: Runner) -> int:
    """Give ``runner`` the handle under which the operations find it, for as long as it lives."""
    handle = next(_handles)
    _runners[handle] = runner
    return handle


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution that computes only where ``x`` is nonzero; any values, differentiable.

    Args:
        x: ``[N, C_in, L]``, ``[N, C_in, H, W]`` or ``[N, C_in, D, H, W]`` spikes (or any sparse values).
        weight: ``[C_out, C_in / groups, *kernel]``.
        bias: ``[C_out]`` or ``None``.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`.

    Returns:
        ``[N, C_out, *out]`` in the memory format the dense convolution would choose.

    Raises:
        ValueError: for a rank other than 3, 4 or 5, or where no sparse kernel covers the call.

    >>> import torch
    >>> spikes = (torch.rand(2, 8, 6, 6, generator=torch.manual_seed(0)) < 0.1).float()
    >>> weight = torch.randn(4, 8, 3, 3)
    >>> torch.allclose(conv(spikes, weight, padding=1), torch.conv2d(spikes, weight, padding=1), atol=1e-5)
    True
    """
    call = conv_call(x.dim() - 2, weight, stride, padding, dilation, groups)
    return torch.ops.sparseflow.conv(x, weight, bias, *_flat(call), STATELESS)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer that reads only the weight rows of nonzero inputs; any values, differentiable.

    Args:
        x: ``[..., K]``.
        weight: ``[M, K]``.
        bias: ``[M]`` or ``None``.

    Returns:
        ``[..., M]``.

    Raises:
        ValueError: ``weight`` is not a matrix, or no sparse kernel covers the dtype.

    >>> import torch
    >>> linear(torch.tensor([0., 1., 0.]), torch.arange(6.).view(2, 3))
    tensor([1., 4.])
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be [M, K], got shape {tuple(weight.shape)}")
    return torch.ops.sparseflow.linear(x, weight, bias, STATELESS)


def conv_call(
    rank: int,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> ConvCall:
    """Normalise convolution arguments. Raises ``ValueError`` for a rank or padding PyTorch would refuse."""
    if rank not in (1, 2, 3):
        raise ValueError(f"expected 1, 2 or 3 spatial dimensions, got an input of rank {rank + 2}")
    dilations = _per_dim(dilation, rank)
    if padding == "valid":
        pads = ((0, 0),) * rank
    elif padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
        pads = tuple((total // 2, total - total // 2) for total in totals)
    elif isinstance(padding, str):
        raise ValueError(f"padding must be 'same', 'valid' or integers, got {padding!r}")
    else:
        pads = tuple((p, p) for p in _per_dim(padding, rank))
    return ConvCall(_per_dim(stride, rank), pads, dilations, groups)


def run_op(
    handle: int, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, *, training: bool = False
) -> Tensor:
    """Run ``call`` through its registered operation: what compiled graphs and autograd record."""
    handle = -handle if training else handle
    if isinstance(call, ConvCall):
        return torch.ops.sparseflow.conv(x, weight, bias, *_flat(call), handle)
    return torch.ops.sparseflow.linear(x, weight, bias, handle)


def _per_dim(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        values *= rank
    if len(values) != rank:
        raise ValueError(f"expected one value or {rank}, got {values}")
    return values


def _flat(call: ConvCall) -> tuple[list[int], list[int], list[int], int]:
    pads = [p for pair in call.padding for p in pair]
    return list(call.stride), pads, list(call.dilation), call.groups


def _unflat(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> ConvCall:
    pads = tuple(zip(padding[::2], padding[1::2], strict=True))
    return ConvCall(tuple(stride), pads, tuple(dilation), groups)


def _run(handle: int, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    if handle == STATELESS:
        return _run_stateless(x, weight, bias, call)
    runner = _runners.get(abs(handle))
    if runner is None:  # an exported graph outlives the layer it was recorded from
        return call.dense(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return runner.run(x, weight, bias, call, training=handle < 0)


def _run_stateless(x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    kernel = select(x, weight, call, "auto")
    if isinstance(kernel, Refusal):
        raise ValueError(f"no sparse kernel covers this call: {kernel.reason}. {kernel.detail}")
    variant = kernel.variants()[0]
    packed = kernel.pack(weight.detach().to(x.dtype), variant, inspect=False)
    return kernel.compute(x, kernel.prescan(x, variant), packed, bias, variant)


@torch.library.custom_op("sparseflow::conv", mutates_args=())
def _conv_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    runner: int,
) -> Tensor:
    return _run(runner, x, weight, bias, _unflat(stride, padding, dilation, groups))


@_conv_op.register_fake
def _(x, weight, bias, stride, padding, dilation, groups, runner):  # noqa: ARG001
    call = _unflat(stride, padding, dilation, groups)
    return call.dense(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _save_for_backward(ctx, inputs, output):  # noqa: ARG001
    x, weight, bias, *rest = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.call = _unflat(*rest[:4]) if len(rest) > 1 else LinearCall()


def _conv_backward(ctx, grad):
    """Dense gradients: a surrogate needs the input's gradient also where there was no spike."""
    x, weight = ctx.saved_tensors
    call: ConvCall = ctx.call
    pads = [p for pair in reversed(call.padding) for p in pair]
    padded = x if call.symmetric else torch.nn.functional.pad(x, pads)
    inner = [before for before, _ in call.padding] if call.symmetric else [0] * len(call.padding)
    mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.bias_dtype is not None and ctx.needs_input_grad[2]]
    gx, gw, gb = torch.ops.aten.convolution_backward(
        grad,
        padded,
        weight.to(x.dtype),
        [weight.shape[0]],
        list(call.stride),
        inner,
        list(call.dilation),
        False,
        [0] * len(inner),
        call.groups,
        mask,
    )
    if gx is not None and not call.symmetric:
        gx = torch.nn.functional.pad(gx, [-p for p in pads])
    return (gx, _as(gw, weight.dtype), _as(gb, ctx.bias_dtype), None, None, None, None, None)


@torch.library.custom_op("sparseflow::linear", mutates_args=())
def _linear_op(x: Tensor, weight: Tensor, bias: Tensor | None, runner: int) -> Tensor:
    return _run(runner, x, weight, bias, LinearCall())


@_linear_op.register_fake
def _(x, weight, bias, runner):  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    needs_x, needs_w, needs_b, _ = ctx.needs_input_grad
    gx = grad @ weight.to(grad.dtype) if needs_x else None
    gw = grads.t() @ rows if needs_w else None
    gb = grads.sum(0) if needs_b and ctx.bias_dtype is not None else None
    return gx, _as(gw, weight.dtype), _as(gb, ctx.bias_dtype), None


def _as(grad: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return None if grad is None else grad.to(dtype)


_conv_op.register_autograd(_conv_backward, setup_context=_save_for_backward)
_linear_op.register_autograd(_linear_backward, setup_context=_save_for_backward)
