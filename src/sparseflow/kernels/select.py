"""Which sparse kernel covers a call. A new kernel is its own file plus one entry in ``_KERNELS``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from sparseflow.plan import Reason

from .base import Call, Kernel


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why no sparse kernel covers a call."""

    reason: Reason
    detail: str


Binder = Callable[[Tensor, Tensor, Call], "Kernel | Refusal"]


def _bind_event(x: Tensor, weight: Tensor, call: Call) -> Kernel | Refusal:
    from . import event

    return event.bind(x, weight, call)


def _bind_gather(x: Tensor, weight: Tensor, call: Call) -> Kernel | Refusal:
    from . import gather

    return gather.bind(x, weight, call)


_KERNELS: dict[str, tuple[Binder, ...]] = {
    "auto": (_bind_event, _bind_gather),
    "cpu": (_bind_event,),
    "torch": (_bind_gather,),
}
BACKENDS = tuple(_KERNELS)


def select(x: Tensor, weight: Tensor, call: Call, backend: str) -> Kernel | Refusal:
    """The first kernel of ``backend`` that covers the call, else the refusal of the preferred one.

    Binding looks at shapes, strides and dtype only, never at values.
    """
    refusals = []
    for bind in _KERNELS[backend]:
        bound = bind(x, weight, call)
        if not isinstance(bound, Refusal):
            return bound
        refusals.append(bound)
    return refusals[0]
