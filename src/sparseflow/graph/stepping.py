"""Models that are stepped from outside: one call for all time steps, and putting their state back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sparseflow.frameworks.registry import reset_state


class Stepper(nn.Module):
    """Calls a model once a time step and returns its outputs over time.

    State is neither reset before nor after: a second call goes on where the first one ended. Traced on an example,
    this is the loop that :func:`sparseflow.graph.reroll.reroll` batches.

    Args:
        model: takes one step ``[N, ...]``; e.g. ``nn.Sequential`` of snnTorch neurons with ``init_hidden=True``, or a
            SpikingJelly network in step mode ``"s"``. It is the attribute ``model``.

    Example:
        >>> Stepper(nn.Flatten())(torch.zeros(4, 2, 3, 5)).shape
        torch.Size([4, 2, 15])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, data: torch.Tensor) -> Any:
        """``data`` ``[T, N, ...]`` to what the model returns, each tensor ``[T, ...]``; tuples and dicts stay.

        Raises:
            ValueError: ``data`` has no time step.
            TypeError: the model returns something that is no tensor, tuple, list, dict or ``None``.
        """
        if data.dim() == 0 or len(data) == 0:
            raise ValueError(f"Stepper takes data [T, N, ...] with T of at least 1, got shape {tuple(data.shape)}")
        return _over_time([self.model(data[t]) for t in range(len(data))])


def reset(model: nn.Module) -> nn.Module:
    """Put the state of all neurons in ``model`` back to what it was before the first step.

    Does what ``spikingjelly.activation_based.functional.reset_net(model)`` and ``snntorch.utils.reset(model)`` do for
    modules of theirs, at any depth and for no other model's neurons. Your own neurons are reset by their ``reset()``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: a registered neuron keeps state and has no ``reset()``.

    Example:
        >>> reset(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))[1]
        ReLU()
    """
    for name, module in model.named_modules():
        try:
            reset_state(module)
        except TypeError as error:
            raise TypeError(f"{name or 'model'}: {error}") from None
    return model


def _over_time(outputs: Sequence[Any]) -> Any:
    """Outputs of single steps, stacked; asks by ``isinstance``, because a tracer's stand-ins answer that."""
    first = outputs[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {key: _over_time([output[key] for output in outputs]) for key in first}
    if isinstance(first, (tuple, list)):
        items: Any = [_over_time([output[i] for output in outputs]) for i in range(len(first))]
        return first.__class__(*items) if hasattr(first, "_fields") else first.__class__(items)
    if isinstance(first, (torch.Tensor, torch.fx.Proxy)):
        return torch.stack(list(outputs))
    raise TypeError(f"the model returns {type(first).__name__}, which cannot be put together over time")
