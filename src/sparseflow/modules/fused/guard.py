"""Whether a model is still what its fused plan was made from."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from sparseflow.frameworks import fingerprint
from sparseflow.graph.steps import FusedGraph
from sparseflow.plan import Reason

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SIMPLE = (bool, int, float, str, type(None))
_LAYER_SETTINGS = ("stride", "padding", "dilation", "groups", "padding_mode", "eps")
_GLOBAL_HOOKS = (nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks)


class Guard:
    """Compares everything a traced graph has made a constant of with what the model holds now.

    These are the modules themselves, their training flags, the constants of fused neurons and the settings of layers,
    and plain Python attributes of the modules that were traced through. Weights are no constants; inputs have their
    signature. Modules in ``whole`` are called as they are, hooks included. Costs some tens of microseconds for a
    ResNet-18.
    """

    def __init__(self, model: nn.Module, fused: FusedGraph, whole: Collection[str] = ()):
        self._children = [(m._modules, name, child) for m in model.modules() for name, child in m._modules.items()]
        self._modules = list(model.modules())
        self._training = [m.training for m in self._modules]
        modules = dict(model.named_modules())
        neurons = {block.neuron for block in fused.blocks if block.neuron is not None}
        self._neurons = [(modules[name], fingerprint(modules[name])) for name in neurons]
        parts = {name for block in fused.blocks for name in (block.layer, block.norm) if name is not None}
        self._layers = [(modules[name].__dict__, _settings(modules[name].__dict__)) for name in parts]
        called = {str(n.target) for n in fused.graph.graph.nodes if n.op == "call_module"}
        through = [m for name, m in modules.items() if name not in called and not _below(name, called)]
        self._plain = [(m.__dict__, _plain(m.__dict__)) for m in through]
        watched = [m for name, m in modules.items() if name and name not in whole and not _below(name, set(whole))]
        self._hooks = [getattr(m, table) for m in watched for table in _HOOKS]

    def holds(self) -> bool:
        """Whether the plan may run: the same modules in the same state, and no hook that wants to see a tensor."""
        for table, name, child in self._children:
            if table.get(name) is not child:
                return False
        if [m.training for m in self._modules] != self._training or any(self._hooks) or any(_GLOBAL_HOOKS):
            return False
        if any(_settings(attributes) != seen for attributes, seen in self._layers):
            return False
        if any(fingerprint(module) != seen for module, seen in self._neurons):
            return False
        return all(_still(attributes, seen) for attributes, seen in self._plain)


def hooked(model: nn.Module) -> list[str]:
    """Names of submodules with hooks, outermost only: what is inside is called by them."""
    names: list[str] = []
    for name, module in model.named_modules():
        if name and any(getattr(module, table) for table in _HOOKS) and not _below(name, set(names)):
            names.append(name)
    return names


def unsuited(model: nn.Module, args: tuple[Any, ...]) -> Reason | None:
    """Why this call, whatever the plan, has to go through the model's own forward."""
    if torch.is_grad_enabled() and (_wants_gradients(args) or any(p.requires_grad for p in model.parameters())):
        return Reason.GRADIENTS
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return Reason.AUTOCAST
    return None


def _wants_gradients(args: tuple[Any, ...]) -> bool:
    return any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)


def _settings(attributes: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(attributes.get(name) for name in _LAYER_SETTINGS)


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if type(value) in _SIMPLE and name != "training"}


def _still(attributes: dict[str, Any], seen: dict[str, Any]) -> bool:
    return all(attributes.get(name) == value for name, value in seen.items())


def _below(name: str, outer: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in outer for i in range(1, len(parts)))
