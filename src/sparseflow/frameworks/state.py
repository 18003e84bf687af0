"""The state of neurons: reading and writing it, saving and putting back everything a forward pass changes."""

from __future__ import annotations

import dataclasses
import random
import sys
from typing import Any

import torch
from torch import nn

_NOT_STATE = frozenset({"_parameters", "_modules"})


def state_table(module: nn.Module, name: str) -> dict[str, Any] | None:
    """The dictionary in which a neuron holds its state ``name``; ``None`` where it is an attribute like others."""
    memories = module.__dict__.get("_memories")
    if memories is not None and name in memories:
        return memories
    return module._buffers if name in module._buffers else None


def read_state(module: nn.Module, name: str) -> Any:
    """What a neuron holds as its state ``name``: a tensor, or the number that it starts from."""
    memories = module.__dict__.get("_memories")
    if memories is not None and name in memories:
        return memories[name]
    return getattr(module, name, None)


def write_state(module: nn.Module, name: str, value: torch.Tensor | None) -> None:
    """Have a neuron hold ``value`` as its state ``name``."""
    table = state_table(module, name)
    if table is None:
        setattr(module, name, value)
    else:
        table[name] = value


@dataclasses.dataclass(frozen=True)
class _SavedTensor:
    tensor: torch.Tensor
    values: torch.Tensor


@dataclasses.dataclass(frozen=True)
class _SavedContainer:
    container: Any
    items: Any


@dataclasses.dataclass(frozen=True)
class StateSnapshot:
    """What :func:`snapshot_state` saved; opaque, for :func:`restore_state` only."""

    attributes: tuple[tuple[nn.Module, dict[str, Any]], ...]
    rng: dict[str, Any]


def snapshot_state(model: nn.Module) -> StateSnapshot:
    """Save what a forward pass of ``model`` may change.

    Covers every attribute of every submodule other than parameters and children: SpikingJelly ``_memories`` and
    ``v_seq``, snnTorch ``mem``/``syn``/``spk``, batch norm statistics, dropout masks, counters, and the lists,
    dictionaries and tensors among them; and the random generators of torch, its CUDA devices, Python and numpy.
    Objects of other kinds are saved by reference.

    Example:
        >>> bn = nn.BatchNorm1d(2)
        >>> saved = snapshot_state(bn)
        >>> _ = bn(torch.ones(3, 2))
        >>> restore_state(bn, saved)
        >>> bn.running_mean.tolist(), int(bn.num_batches_tracked)
        ([0.0, 0.0], 0)
    """
    modules = list(model.modules())
    attributes = tuple(
        (m, {name: _save(value) for name, value in m.__dict__.items() if name not in _NOT_STATE}) for m in modules
    )
    return StateSnapshot(attributes, _save_rng())


def restore_state(model: nn.Module, snapshot: StateSnapshot) -> None:
    """Put back, bit for bit, what :func:`snapshot_state` saved: the same objects with the same contents.

    Raises:
        ValueError: ``snapshot`` was taken from another model.
    """
    if not snapshot.attributes or snapshot.attributes[0][0] is not model:
        raise ValueError("the snapshot was taken from another model")
    with torch.no_grad():
        for module, saved in snapshot.attributes:
            for name in module.__dict__.keys() - saved.keys() - _NOT_STATE:
                del module.__dict__[name]
            module.__dict__.update({name: _restore(value) for name, value in saved.items()})
    _restore_rng(snapshot.rng)


def _save(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _SavedTensor(value, value.detach().clone())
    if isinstance(value, dict):
        return _SavedContainer(value, {key: _save(item) for key, item in value.items()})
    if isinstance(value, (list, set, tuple)):
        return _SavedContainer(value, [_save(item) for item in value])
    return value


def _restore(saved: Any) -> Any:
    if isinstance(saved, _SavedTensor):
        if not torch.equal(saved.tensor, saved.values):
            saved.tensor.detach().copy_(saved.values)
        return saved.tensor
    if isinstance(saved, _SavedContainer):
        return _refill(saved.container, saved.items)
    return saved


def _refill(container: Any, items: Any) -> Any:
    if isinstance(container, dict):
        restored = {key: _restore(item) for key, item in items.items()}
    else:
        restored = [_restore(item) for item in items]
    if isinstance(container, tuple):  # holds the same items for ever; only what is in them can have changed
        return container
    container.clear()
    if isinstance(container, list):
        container.extend(restored)
    else:
        container.update(restored)
    return container


def _save_rng() -> dict[str, Any]:
    saved = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        saved["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        saved["numpy"] = sys.modules["numpy"].random.get_state()
    return saved


def _restore_rng(saved: dict[str, Any]) -> None:
    torch.set_rng_state(saved["torch"])
    random.setstate(saved["python"])
    if "cuda" in saved:
        torch.cuda.set_rng_state_all(saved["cuda"])
    if "numpy" in saved:
        sys.modules["numpy"].random.set_state(saved["numpy"])
