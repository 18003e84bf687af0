"""Running models that are stepped from outside: all time steps in one call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .dispatch.crossovers import RuntimeConfig
from .graph.stepping import Stepper, reset
from .kernels.select import BACKENDS
from .modules.fused.model import Fusion, fusion_of, install

_ATTRIBUTE = "_sparseflow_stepper"


class _Holder:
    """Keeps a model's stepper beside the model; copies and pickles start without one."""

    def __init__(self) -> None:
        self.steppers: dict[tuple[str, bool], Stepper] = {}

    def __reduce__(self) -> Any:
        return _Holder, ()

    def stepper(self, model: nn.Module, backend: str, cuda_graph: bool) -> Stepper:
        """The stepper of ``model`` that makes plans for ``backend``, replayed on a GPU with ``cuda_graph``."""
        key = (backend, cuda_graph)
        if key not in self.steppers:
            stepper = Stepper(model).train(model.training)
            install(stepper, Fusion(RuntimeConfig(backend=backend), at_once=True, cuda_graph=cuda_graph))
            self.steppers[key] = stepper
        return self.steppers[key]


def run(model: nn.Module, data: Tensor, *, backend: str = "auto", cuda_graph: bool = True) -> Any:
    """Reset a model's neurons, step it through ``data`` and return its outputs over time.

    Equal to the loop ``reset(model); torch.stack([model(x) for x in data])``, and afterwards the neurons hold the state
    that the loop would leave. Layers without feedback run once for all time steps, and whole blocks as one kernel,
    where no gradients are recorded and that was measured to be faster; the first call of a new shape makes the plan.

    Args:
        model: takes one step ``[N, ...]``: snnTorch neurons with ``init_hidden=True``, SpikingJelly in step mode
            ``"s"``, or neurons of your own that have a ``reset()``.
        data: ``[T, N, ...]``.
        backend, cuda_graph: as in :func:`sparseflow.accelerate`.

    Returns:
        What the model returns, each tensor with T in front; tuples and dictionaries stay.

    Raises:
        ValueError: ``data`` has no time step, or ``backend`` is unknown.
        TypeError: a registered neuron keeps state and has no ``reset()``, or the model returns something that cannot be
            stacked.

    >>> import torch, sparseflow
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2)).eval()
    >>> with torch.no_grad():
    ...     sparseflow.run(net, torch.zeros(5, 1, 4)).shape
    torch.Size([5, 1, 2])
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    holder = model.__dict__.get(_ATTRIBUTE)
    if holder is None:
        holder = model.__dict__[_ATTRIBUTE] = _Holder()
    stepper = holder.stepper(model, backend, cuda_graph)
    stepper.training = model.training
    reset(model)
    return stepper(data)


def stepping_notes(model: nn.Module) -> tuple[str, ...]:
    """Lines for a report about the plans of :func:`run`."""
    holder = model.__dict__.get(_ATTRIBUTE)
    found = [fusion_of(stepper) for stepper in holder.steppers.values()] if holder is not None else []
    return tuple(f"sparseflow.run: {note}" for fusion in found if fusion is not None for note in fusion.notes())


def forget(model: nn.Module) -> None:
    """Drop the plans of :func:`run`."""
    model.__dict__.pop(_ATTRIBUTE, None)
