"""The oracle: the dense layer in float64, and the error budget a sparse path is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Call, ConvCall
from .precision import tf32_convolution, tf32_matmul

_TF32_EPS = 2.0**-10


def _double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().double() for t in tensors]


def oracle(x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    """The dense result in float64, whatever the dtype of the arguments.

    >>> import torch
    >>> from sparseflow.kernels.base import LinearCall
    >>> oracle(torch.eye(2), torch.tensor([[1., 2.], [3., 4.]]), None, LinearCall())
    tensor([[1., 3.],
            [2., 4.]], dtype=torch.float64)
    """
    x64, w64, b64 = _double(x, weight, bias)
    assert x64 is not None
    assert w64 is not None
    return call.dense(x64, w64, b64)


def error_budget(x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    """Largest admissible ``|sparse - oracle|``, element by element, in float64.

    Twice the worst error of the dense path in the same dtype, plus the rounding band of a sum of ``n`` nonzero terms:
    ``(sqrt(n) + 1) u`` times the sum of their magnitudes, ``u`` being half the machine epsilon of the dtype. That is
    the growth of rounding errors that are as often up as down (Higham and Mary, *A New Approach to Probabilistic
    Rounding Error Analysis*, 2019); a kernel is free to add in any order. Float64 results have no better oracle than
    another sum of the same kind, so there the band counts twice. Where the user lets a GPU round float32 to TF32, ``u``
    is that of TF32, whether or not the dense layer happens to use it. Below the normal numbers nothing is relative any
    more: what is flushed to zero is no error.
    """
    exact = oracle(x, weight, bias, call)
    with torch.no_grad():
        dense = call.dense(x.detach(), weight.detach().to(x.dtype), None if bias is None else bias.detach().to(x.dtype))
    errors = (dense.double() - exact).abs()
    worst = errors[errors.isfinite()].max() if bool(errors.isfinite().any()) else exact.new_zeros(())
    magnitude = oracle(x.abs(), weight.abs(), None if bias is None else bias.abs(), call)
    terms = oracle(x != 0, torch.ones_like(weight), None if bias is None else torch.ones_like(bias), call)
    return 2 * worst + (terms.sqrt() + 1) * _unit(x, call) * magnitude + _underflow(x.dtype)


def _unit(x: Tensor, call: Call) -> float:
    """Half the machine epsilon that the user lets a layer of this dtype work with, doubled for float64."""
    if x.dtype == torch.float64:
        return torch.finfo(x.dtype).eps
    rounds = tf32_convolution if isinstance(call, ConvCall) else tf32_matmul
    tf32 = x.is_cuda and x.dtype == torch.float32 and rounds()
    return (_TF32_EPS if tf32 else torch.finfo(x.dtype).eps) / 2


def _underflow(dtype: torch.dtype) -> float:
    """Error of a result that is rounded below the normal numbers of ``dtype``, or flushed below those of its sums."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return max(torch.finfo(sums).tiny, torch.finfo(dtype).eps / 2 * torch.finfo(dtype).tiny)


def excess(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> float:
    """How far ``y`` lies outside the budget, in units of the budget: at most 1 is correct.

    Elements where the oracle itself is not finite must be equally non-finite in ``y``; those beyond the range of the
    dtype may be.
    """
    exact = oracle(x, weight, bias, call)
    if not exact.numel():
        return 0.0
    budget = error_budget(x, weight, bias, call)
    overflows = exact.isfinite() & (exact.abs() + budget > torch.finfo(y.dtype).max)
    if not bool(((y.isfinite() == exact.isfinite()) | overflows).all()):
        return float("inf")
    compared = y.isfinite() & exact.isfinite()
    ratio = (y.detach().double() - exact).abs() / budget
    return float(ratio[compared].max()) if bool(compared.any()) else 0.0
