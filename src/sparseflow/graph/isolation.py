"""Running a model without leaving a trace in it."""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import graph_module
from torch.utils._pytree import tree_map

from sparseflow.frameworks import restore_state, snapshot_state

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@contextlib.contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Run ``model`` inside without gradients, hooks or lasting effects.

    The users' hooks are set aside, so that monitors do not record the run; state, buffers, random generators and the
    hooks are put back on leaving, also after an exception. ``torch.compile`` regions run eagerly.
    """
    snapshot = snapshot_state(model)
    try:
        for module in model.modules():
            module.__dict__.update({name: OrderedDict() for name in _HOOKS})
        with torch.no_grad(), _eagerly():
            yield
    finally:
        restore_state(model, snapshot)


@contextlib.contextmanager
def without_sources() -> Iterator[None]:
    """PyTorch keeps the Python source of every graph module for ever; forget those made inside."""
    cache = getattr(getattr(graph_module, "_loader", None), "eval_cache", {})
    before = set(cache)
    try:
        yield
    finally:
        for key in set(cache) - before:
            cache.pop(key, None)
            linecache.cache.pop(key, None)


def _eagerly() -> contextlib.AbstractContextManager[Any]:
    """Importing the compiler takes seconds, and without it there is nothing compiled to hold back."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def copied(example: Any) -> Any:
    """``example`` with every tensor cloned, so that a model that writes into its input cannot change it."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, example)
