"""Prune weights in blocks that the kernels skip, and keep them zero while the network is trained.

A block is ``(output channels, input channels)`` of one kernel tap. Which blocks are zero is a property of the weights:
``state_dict`` has the same keys, and whoever accelerates the network finds the zero blocks by looking.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .api import refresh
from .graph.eligibility import candidates, layer_kind, refuse
from .kernels.weight_blocks import BLOCK, block_norms, present_blocks, spread
from .lowering import Patterns, check_patterns, matches
from .report import render

_ATTRIBUTE = "_sparseflow_blocks"
_SCOPES = ("layer", "global")
Block = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class PrunedLayer:
    """One convolution or linear layer: its blocks, how many of them hold anything, and why it was left alone if it was.

    >>> PrunedLayer("conv2", "conv2d", blocks=8, present=2).density
    0.25
    """

    name: str
    kind: str
    blocks: int
    present: int
    reason: str = ""

    @property
    def density(self) -> float:
        """present / blocks, in 0..1."""
        return self.present / self.blocks if self.blocks else 1.0

    @property
    def pruned(self) -> bool:
        """Whether the layer's zero blocks are kept zero."""
        return not self.reason


@dataclasses.dataclass(frozen=True)
class PruningRecord:
    """What was pruned, layer by layer; printing it gives a table.

    >>> record = PruningRecord((16, 16), (PrunedLayer("a", "linear", 8, 2), PrunedLayer("b", "linear", 4, 4, "last")))
    >>> record.density, record["b"].reason
    (0.25, 'last')
    """

    block: Block
    layers: tuple[PrunedLayer, ...]

    @property
    def density(self) -> float:
        """Share of the blocks of all pruned layers that hold anything, in 0..1; 1 where no layer is pruned."""
        pruned = [layer for layer in self.layers if layer.pruned]
        return sum(layer.present for layer in pruned) / sum(layer.blocks for layer in pruned) if pruned else 1.0

    def __getitem__(self, name: str) -> PrunedLayer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        return {"density": self.density, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        from rich.table import Table

        count = sum(layer.pruned for layer in self.layers)
        head = f"{count} of {len(self.layers)} layers pruned in blocks of {self.block[0]} x {self.block[1]} a tap"
        table = Table("layer", "kind", "blocks", "present", "density", "not pruned because")
        for layer in self.layers:
            figures = (str(layer.blocks), str(layer.present), f"{layer.density:.3f}")
            table.add_row(layer.name, layer.kind, *figures, layer.reason)
        return render(f"{head}, block density {self.density:.3f}", table)


def prune_blocks(
    model: nn.Module,
    block: Block = BLOCK,
    density: float = 0.25,
    *,
    scope: str = "layer",
    include: Patterns = None,
    exclude: Patterns = None,
) -> PruningRecord:
    """Set the weight blocks of least magnitude to zero, in place, and keep them zero in training. **Lossy**: the pruned
    network is another network, to be fine-tuned; acceleration is then exact with respect to it.

    Left alone, each with its reason in the record: the first and the last layer, in the order of registration (few
    weights, much accuracy), layers with fewer channels than half a block, grouped and depthwise convolutions, and what
    no sparse kernel covers. First and last layers are pruned where ``include`` names them.

    Pruned blocks stay zero after every step of any ``torch.optim`` optimizer, whatever its momentum and weight decay,
    and the gradients that reach them are cleared, so that clipping does not count them. That survives
    ``copy.deepcopy``, pickling of the module, ``load_state_dict``, and moves to another device or dtype. It does not
    survive a new model that only loads the ``state_dict``: call :func:`keep_zero_blocks` there. Other optimizers have
    to leave a weight of zero without gradient at zero.

    Args:
        model: any network with convolution and linear layers, accelerated or not.
        block: output and input channels of a block. The kernels skip blocks of 16 x 16, and multiples of them.
        density: share of the blocks of a layer that stays, above 0 and at most 1. A lower one later prunes further;
            blocks that are zero stay so.
        scope: ``"layer"`` gives every layer the same density, so that none is emptied and the gain in time is even.
            ``"global"`` compares blocks across layers, by their L2 norm over the layer's root mean square (batch norm
            makes the plain scales of two layers incomparable), and keeps at least one block a layer.
        include, exclude: glob patterns on qualified layer names, or ``(name, module) -> bool``.

    Raises:
        ValueError: ``density``, ``block`` or ``scope`` is out of range, or a layer was pruned in other blocks before.
        TypeError: ``include`` or ``exclude`` has a wrong type.

    >>> import sparseflow, torch
    >>> net = nn.Sequential(nn.Conv2d(1, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64, 10))
    >>> record = sparseflow.prune_blocks(net, density=0.25)
    >>> [(layer.name, layer.density) for layer in record.layers if layer.pruned]
    [('2', 0.25)]
    >>> record["0"].reason, record["4"].reason
    ('smaller than half a block', 'last layer')
    """
    _check(block, density, scope, include, exclude)
    reasons = _reasons(model, block, include, exclude)
    chosen = {name: module for name, module in candidates(model).items() if not reasons[name]}
    for name, module in chosen.items():
        _check_held(name, module, block)
    norms = {name: block_norms(_weight(module), block) for name, module in chosen.items()}
    for name, keep in _kept(norms, density, scope).items():
        _hold(chosen[name], BlockMask(block, keep & (norms[name] > 0)))
    refresh(model)
    return _record(model, block, reasons)


def keep_zero_blocks(model: nn.Module, block: Block = BLOCK) -> PruningRecord:
    """Keep what is zero now zero in training: the blocks of every layer that hold nothing, and no others.

    For a network whose pruned weights came by ``load_state_dict`` into a fresh model, and to release layers whose
    weights were replaced by dense ones. Raises ``ValueError`` for an impossible ``block``.

    >>> layer = nn.Linear(32, 32)
    >>> _ = layer.weight.data[:16, :16].zero_()
    >>> keep_zero_blocks(nn.Sequential(layer))["0"].density
    0.75
    """
    _check(block, 1.0, _SCOPES[0], None, None)
    reasons = {name: _uncovered(module, block) for name, module in candidates(model).items()}
    for name, module in candidates(model).items():
        present = None if reasons[name] else present_blocks(_weight(module), block)
        if present is None or bool(present.all()):
            module.__dict__.pop(_ATTRIBUTE, None)
            reasons[name] = reasons[name] or "no block is zero"
        else:
            _hold(module, BlockMask(block, present))
    refresh(model)
    return _record(model, block, reasons)


# ---- which layers ----------------------------------------------------------------------------------------------------


def _check(block: Block, density: float, scope: str, include: Patterns, exclude: Patterns) -> None:
    if len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block):
        raise ValueError(f"block must be two positive numbers (output channels, input channels), got {block!r}")
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be above 0 and at most 1, got {density!r}")
    if scope not in _SCOPES:
        raise ValueError(f"scope must be one of {_SCOPES}, got {scope!r}")
    check_patterns("include", include)
    check_patterns("exclude", exclude)


def _reasons(model: nn.Module, block: Block, include: Patterns, exclude: Patterns) -> dict[str, str]:
    """Why each layer is not pruned; empty for those that are."""
    layers, reasons, owners = candidates(model), {}, {}
    ends = dict(zip(list(layers)[:1] + list(layers)[-1:], ("first layer", "last layer"), strict=False))
    for name, module in layers.items():
        named = include is not None and matches(include, name, module)
        if matches(exclude, name, module) or (include is not None and not named):
            reasons[name] = "excluded by include= or exclude="
            continue
        owner = owners.setdefault(id(module._parameters.get("weight")), name)
        shared = "" if owner == name else f"shares its weight with {owner}"
        reasons[name] = _uncovered(module, block) or shared or ("" if named else ends.get(name, ""))
    return reasons


def _uncovered(module: Any, block: Block) -> str:
    """Why no kernel could skip blocks of this layer."""
    refusal = refuse(module)
    if refusal is not None:
        reason, detail = refusal
        return f"{reason} ({detail})"
    if getattr(module, "groups", 1) > 1:
        return "grouped convolution"
    outputs, inputs = module.weight.shape[:2]
    return "smaller than half a block" if 2 * outputs < block[0] or 2 * inputs < block[1] else ""


def _check_held(name: str, module: nn.Module, block: Block) -> None:
    held = _held(module)
    if held is not None and held.mask.block != block:
        raise ValueError(
            f"{name} was pruned in blocks of {held.mask.block}, not {block}: prune in the same blocks, or call "
            f"keep_zero_blocks(model, {block}) first"
        )


def _kept(norms: dict[str, Tensor], density: float, scope: str) -> dict[str, Tensor]:
    """Which blocks stay: the largest of each layer, or of all of them together."""
    if scope == "layer" or not norms:
        return {name: _largest(values, max(1, round(density * values.numel()))) for name, values in norms.items()}
    scaled = {name: values / values.square().mean().sqrt().clamp_min(1e-30) for name, values in norms.items()}
    pool = torch.cat([values.flatten().cpu() for values in scaled.values()])
    count = max(1, round(density * pool.numel()))
    parts = _largest(pool, count).split([values.numel() for values in scaled.values()])
    together = zip(scaled.items(), parts, strict=True)
    return {name: part.view(values.shape).to(values.device) | _largest(values, 1) for (name, values), part in together}


def _largest(values: Tensor, count: int) -> Tensor:
    """True at the ``count`` largest elements."""
    kept = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    kept[values.flatten().topk(count).indices] = True
    return kept.view(values.shape)


def _record(model: nn.Module, block: Block, reasons: dict[str, str]) -> PruningRecord:
    return PruningRecord(block, tuple(_layer(name, m, block, reasons[name]) for name, m in candidates(model).items()))


def _layer(name: str, module: nn.Module, block: Block, reason: str) -> PrunedLayer:
    kind, weight = layer_kind(module) or "", module._parameters.get("weight")
    if weight is None or isinstance(weight, nn.UninitializedParameter):
        return PrunedLayer(name, kind, 0, 0, reason)
    present = present_blocks(weight, block)
    return PrunedLayer(name, kind, present.numel(), int(present.sum()), reason)


# ---- masks that survive training -------------------------------------------------------------------------------------


class BlockMask:
    """Which blocks of a weight may be anything but zero: bool ``[ceil(O / b0), ceil(I / b1), taps]``."""

    def __init__(self, block: Block, present: Tensor):
        self.block, self.present = block, present.cpu()
        self._absent: Tensor | None = None

    def clear(self, values: Tensor) -> None:
        """Zero the elements of absent blocks in ``values``, of the weight's shape."""
        absent = self._absent
        if absent is None or absent.device != values.device:
            absent = self._absent = spread(~self.present, values.shape, self.block).to(values.device)
        with torch.no_grad():
            values.masked_fill_(absent, 0.0)

    def clear_gradient(self, weight: Tensor) -> None:
        """What a parameter calls when its gradient has been accumulated."""
        if weight.grad is not None:
            self.clear(weight.grad)

    def __getstate__(self) -> dict[str, Any]:
        return {"block": self.block, "present": self.present, "_absent": None}


class _Held:
    """The mask of a layer, kept in the layer's ``__dict__`` and, while the layer lives, looked up after every step.

    It knows the layer and not its parameter, so that a parameter may be replaced.
    """

    def __init__(self, layer: nn.Module, mask: BlockMask):
        self.mask = mask
        self._layer = weakref.ref(layer)
        self._hooked = self._handle = None
        _live.add(self)
        _watch_optimizers()

    def __reduce__(self) -> Any:
        return _Held, (self._layer(), self.mask)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held | None:
        layer = memo.get(id(self._layer()))
        return None if layer is None else _Held(layer, BlockMask(self.mask.block, self.mask.present))

    def apply(self) -> None:
        """Zero the absent blocks of the weight, and from now on of its gradients."""
        weight = self.weight
        if weight is None:
            return
        self.mask.clear(weight)
        if weight is not self._hooked and weight.requires_grad:
            self.release()
            self._hooked, self._handle = weight, weight.register_post_accumulate_grad_hook(self.mask.clear_gradient)

    def release(self) -> None:
        """Leave the gradients alone."""
        if self._handle is not None:
            self._handle.remove()
            self._hooked = self._handle = None

    @property
    def weight(self) -> Any:
        """The layer's parameter as it is now."""
        layer = self._layer()
        return None if layer is None or layer.__dict__.get(_ATTRIBUTE) is not self else layer._parameters.get("weight")


_live: weakref.WeakSet[_Held] = weakref.WeakSet()


@functools.cache
def _watch_optimizers() -> Any:
    return register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for held in list(_live):
        if id(held.weight) in stepped:
            held.apply()


def _held(module: nn.Module) -> _Held | None:
    return module.__dict__.get(_ATTRIBUTE)


def _hold(module: nn.Module, mask: BlockMask) -> None:
    before = _held(module)
    if before is not None:
        before.release()
    held = module.__dict__[_ATTRIBUTE] = _Held(module, mask)
    held.apply()


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.detach()
