"""Which layers the sparse path can take, judged from the module alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from sparseflow.frameworks import spikingjelly
from sparseflow.plan import Reason

_CONVOLUTIONS: dict[type[nn.Module], str] = {nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}
_TRANSPOSED: dict[type[nn.Module], str] = {
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
}
_KINDS: dict[type[nn.Module], str] = {**_CONVOLUTIONS, **_TRANSPOSED, nn.Linear: "linear"}
_STANDARDISED = frozenset({"WSConv2d", "WSLinear"})


def layer_kind(module: nn.Module) -> str | None:
    """``"conv1d"``, ``"conv2d"``, ``"conv3d"``, ``"conv_transpose1d"``..., ``"linear"``, or ``None``.

    Example:
        >>> layer_kind(nn.Conv2d(1, 1, 3)), layer_kind(nn.ReLU())
        ('conv2d', None)
    """
    return next((kind for base, kind in _KINDS.items() if isinstance(module, base)), None)


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution and linear layer of ``model`` by qualified name, refused and never-run ones included.

    A layer that is shared under several names is listed once, under the first.

    Example:
        >>> list(candidates(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))))
        ['0', '2']
    """
    return {name: module for name, module in model.named_modules() if layer_kind(module) is not None}


def refuse(module: nn.Module) -> tuple[Reason, str] | None:
    """Why the sparse path cannot take ``module``, with a detail for the report; ``None`` when it can.

    Raises:
        TypeError: ``module`` is neither a convolution nor a linear layer.

    Example:
        >>> refuse(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"))
        (<Reason.PADDING_MODE: ...>, "padding_mode='circular'")
    """
    if layer_kind(module) is None:
        raise TypeError(f"{type(module).__name__} is neither a convolution nor a linear layer")
    for check in (_transposed, _uninitialised, _parametrized, _foreign_weight, _custom_forward, _padding_mode):
        refusal = check(module)
        if refusal is not None:
            return refusal
    return None


def _transposed(module: nn.Module) -> tuple[Reason, str] | None:
    return (Reason.TRANSPOSED, type(module).__name__) if isinstance(module, tuple(_TRANSPOSED)) else None


def _uninitialised(module: Any) -> tuple[Reason, str] | None:
    if isinstance(module.weight, UninitializedParameter):
        return Reason.NEVER_RUN, f"{type(module).__name__} has no weight before its first forward; run the model once"
    return None


def _parametrized(module: Any) -> tuple[Reason, str] | None:
    """Parametrizations, ``weight_norm``, ``spectral_norm`` and pruning all take ``weight`` out of ``_parameters``."""
    if spikingjelly.is_layer(module, _STANDARDISED):
        return Reason.PARAMETRIZED, f"{type(module).__name__} standardises its weight"
    missing = [name for name in ("weight", "bias") if name not in module._parameters]
    if missing:
        return Reason.PARAMETRIZED, f"{' and '.join(missing)} computed by a parametrization or hook"
    return None


def _foreign_weight(module: Any) -> tuple[Reason, str] | None:
    kind = type(module.weight.data)
    if kind is not torch.Tensor:
        return Reason.CUSTOM_FORWARD, f"weight is a {kind.__name__}"
    return None


def _custom_forward(module: nn.Module) -> tuple[Reason, str] | None:
    cls = getattr(type(module), "_sparseflow_original", type(module))  # a layer that is swapped already
    if "forward" in module.__dict__:
        return Reason.CUSTOM_FORWARD, "forward is replaced on this module"
    if cls.forward not in _known_forwards(module):
        return Reason.CUSTOM_FORWARD, f"{cls.__qualname__} overrides forward"
    if _conv_forward(cls) is not _conv_forward(_plain(module)):
        return Reason.CUSTOM_FORWARD, f"{cls.__qualname__} overrides _conv_forward"
    return None


def _conv_forward(cls: type[nn.Module]) -> Any:
    return getattr(cls, "_conv_forward", None)


def _plain(module: nn.Module) -> type[nn.Module]:
    return next(base for base in _KINDS if isinstance(module, base))


def _known_forwards(module: nn.Module) -> tuple[Callable[..., Any], ...]:
    plain = _plain(module)
    wrapper = spikingjelly.layer_class(plain.__name__)
    return (plain.forward,) if wrapper is None else (plain.forward, wrapper.forward)


def _padding_mode(module: nn.Module) -> tuple[Reason, str] | None:
    mode = getattr(module, "padding_mode", "zeros")
    return (Reason.PADDING_MODE, f"padding_mode={mode!r}") if mode != "zeros" else None
