"""Whether a model is still what its fused plan was made from."""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils._pytree import tree_leaves

from sparseflow.frameworks import fingerprint
from sparseflow.graph.steps import Eager, FusedGraph
from sparseflow.plan import Reason

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_PLAIN_TYPES = (bool, int, float, str, type(None))
_SETTINGS = (
    *("stride", "padding", "dilation", "groups", "padding_mode", "eps"),
    *("kernel_size", "ceil_mode", "return_indices", "count_include_pad", "divisor_override", "output_size"),
)
_GLOBAL_HOOKS = (nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks)


class Guard:
    """Compares everything a traced graph has made a constant of with what the model holds now.

    These are the modules themselves, their training flags, the constants of fused neurons and the settings of layers
    and pooling, and plain Python attributes of the modules that were traced through. Weights are no constants; inputs
    have their signature. Modules in ``whole`` are called as they are, hooks included. Costs some tens of microseconds
    for a ResNet-18.
    """

    def __init__(self, model: nn.Module, fused: FusedGraph, whole: Collection[str] = ()):
        modules = dict(model.named_modules())
        self._modules = list(modules.values())
        self._training = [m.training for m in self._modules]
        self._types = list(map(type, self._modules[1:]))  # the model's own differs while it is planned
        self._plain = [m.__dict__ for m in self._modules if "forward" not in m.__dict__]
        self._families = [m._modules for m in self._modules]
        self._sizes = list(map(len, self._families))
        children = [(m._modules, name, child) for m in self._modules for name, child in m._modules.items()]
        self._tables, self._names, self._children = map(list, zip(*children, strict=True)) if children else ([], [], [])
        neurons = {block.neuron for block in fused.blocks if block.neuron is not None}
        self._neurons = [(modules[name], fingerprint(modules[name])) for name in neurons]
        replaced = [node for step in fused.steps if not isinstance(step, Eager) for node in step.nodes]
        parts = {str(node.target) for node in replaced if node.op == "call_module"}
        settings = [(modules[name].__dict__, _SETTINGS) for name in parts]
        called = {str(n.target) for n in fused.graph.graph.nodes if n.op == "call_module"}
        through = [m.__dict__ for name, m in modules.items() if name not in called and not _below(name, called)]
        self._attributes = [_Attributes(*pair) for pair in settings + [(held, _simple(held)) for held in through]]
        watched = [m for name, m in modules.items() if name and name not in whole and not _below(name, set(whole))]
        self._hooks = [getattr(m, table) for m in watched for table in _HOOKS]
        self._hooked = [[getattr(modules[name], table) for table in _HOOKS] for name in whole if name in modules]

    def holds(self) -> bool:
        """Whether the plan may run: the same modules in the same state, and no hook that wants to see a tensor."""
        if not all(map(operator.is_, map(dict.get, self._tables, self._names), self._children)):
            return False
        if list(map(len, self._families)) != self._sizes or list(map(type, self._modules[1:])) != self._types:
            return False
        if [m.training for m in self._modules] != self._training or any("forward" in held for held in self._plain):
            return False
        if any(self._hooks) or not all(map(any, self._hooked)):
            return False
        if not all(attributes.unchanged() for attributes in self._attributes):
            return False
        return all(fingerprint(module) == seen for module, seen in self._neurons)


class _Attributes:
    """Some attributes of one module and their values."""

    def __init__(self, held: dict[str, Any], names: Collection[str]):
        present = [name for name in names if name in held]
        self._held = held
        self._read = operator.itemgetter(*present) if present else lambda _held: ()
        self._seen = copy.deepcopy(self._read(held))

    def unchanged(self) -> bool:
        try:
            return self._read(self._held) == self._seen
        except KeyError:
            return False


def hooked(model: nn.Module) -> list[str]:
    """Names of submodules with hooks, outermost only: what is inside is called by them."""
    names: list[str] = []
    for name, module in model.named_modules():
        if name and any(getattr(module, table) for table in _HOOKS) and not _below(name, set(names)):
            names.append(name)
    return names


def unsuited(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reason | None:
    """Why this call, whatever the plan, has to go through the model's own forward."""
    if torch.is_grad_enabled() and (any(p.requires_grad for p in model.parameters()) or _wants_gradients(args, kwargs)):
        return Reason.GRADIENTS
    if any(_GLOBAL_HOOKS):
        return Reason.GLOBAL_HOOKS
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return Reason.AUTOCAST
    return None


def _wants_gradients(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs)))


def _simple(attributes: dict[str, Any]) -> list[str]:
    return [name for name, value in attributes.items() if _is_plain(value) and name != "training"]


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if type(value) in (tuple, list) else type(value) in _PLAIN_TYPES


def _below(name: str, outer: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in outer for i in range(1, len(parts)))
