"""Which sparse kernels cover a call. A new backend is its own files plus one entry in ``_BINDERS``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparseflow.plan import Reason

from .base import Call, Kernel, Refusal

Candidates = tuple[Kernel, ...] | Refusal
Binder = Callable[[Tensor, Tensor, Call, bool], Candidates]


def _bind_event(x: Tensor, weight: Tensor, call: Call, inspect: bool) -> Candidates:  # noqa: ARG001
    from . import event

    bound = event.bind(x, weight, call)
    return bound if isinstance(bound, Refusal) else (bound,)


def _bind_gather(x: Tensor, weight: Tensor, call: Call, inspect: bool) -> Candidates:  # noqa: ARG001
    from . import gather

    bound = gather.bind(x, weight, call)
    return bound if isinstance(bound, Refusal) else (bound,)


def _bind_triton(x: Tensor, weight: Tensor, call: Call, inspect: bool) -> Candidates:
    unavailable = why_not_triton(x.device)
    if unavailable:
        return Refusal(Reason.DEVICE, unavailable)
    from .triton import backend

    return backend.bind_all(x, weight, call, inspect=inspect)


_BINDERS: dict[str, Binder] = {"cpu": _bind_event, "torch": _bind_gather, "triton": _bind_triton}
_AUTO = {"cuda": ("triton",)}
_AUTO_ELSEWHERE = ("cpu", "torch")
BACKENDS = ("auto", *_BINDERS)


def candidates(x: Tensor, weight: Tensor, call: Call, backend: str, *, inspect: bool = True) -> Candidates:
    """The kernels that cover the call, best guess first, else the refusal of the preferred backend.

    ``"auto"`` means the Triton kernels for CUDA tensors, and for others the native engine or else its fallback.
    Binding looks at shapes, strides, dtype and device, never at the values of ``x``. At those of ``weight`` it looks
    with ``inspect``, which waits for its device: some kernels are for weights with zero blocks only.
    """
    names = _AUTO.get(x.device.type, _AUTO_ELSEWHERE) if backend == "auto" else (backend,)
    refusals = []
    for name in names:
        bound = _BINDERS[name](x, weight, call, inspect)
        if not isinstance(bound, Refusal):
            return bound
        refusals.append(bound)
    return refusals[0]


def select(x: Tensor, weight: Tensor, call: Call, backend: str) -> Kernel | Refusal:
    """The first of :func:`candidates` without a look at the values of ``weight``: nothing waits for a device."""
    found = candidates(x, weight, call, backend, inspect=False)
    return found if isinstance(found, Refusal) else found[0]


def why_not_triton(device: torch.device) -> str:
    """Why the Triton kernels cannot run on tensors of ``device``; empty if they can."""
    try:
        from .triton import launch
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if launch.runs_on(device):
        return ""
    if launch.interpreting():
        return f"TRITON_INTERPRET=1 is set, which runs the kernels on CPU tensors, and these are on {device}"
    if device.type == "cpu":
        return (
            "the kernels need a GPU and the tensors are on the CPU; set TRITON_INTERPRET=1 before triton is first "
            "imported to run them in its interpreter, which is slow"
        )
    return f"the kernels run on CUDA tensors, and these are on {device}"
