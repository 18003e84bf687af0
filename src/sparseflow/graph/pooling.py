"""Pooling layers of a graph that can run on packed spikes, or between the sums of a layer and its neuron."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from sparseflow.frameworks import spikingjelly
from sparseflow.graph.steps import Layout, Triple

_MAX: dict[Any, int] = {
    **{getattr(nn, f"MaxPool{d}d"): d for d in (1, 2, 3)},
    **{getattr(F, f"max_pool{d}d"): d for d in (1, 2, 3)},
}
_AVERAGE: dict[Any, int] = {
    **{getattr(nn, f"AvgPool{d}d"): d for d in (1, 2, 3)},
    **{getattr(F, f"avg_pool{d}d"): d for d in (1, 2, 3)},
}
_ADAPTIVE: dict[Any, int] = {
    **{getattr(nn, f"AdaptiveAvgPool{d}d"): d for d in (1, 2, 3)},
    **{getattr(F, f"adaptive_avg_pool{d}d"): d for d in (1, 2, 3)},
}
_NAMES = ("kernel_size", "stride", "padding")
_FUNCTION_NAMES = {
    "max": (*_NAMES, "dilation", "ceil_mode", "return_indices"),
    "average": (*_NAMES, "ceil_mode", "count_include_pad", "divisor_override"),
    "adaptive": ("output_size",),
}


@dataclasses.dataclass(frozen=True)
class Window:
    """What a pooling layer does, in three dimensions; ``rank`` says how many it has."""

    average: bool
    rank: int
    kernel: Triple
    stride: Triple
    padding: Triple = (0, 0, 0)
    dilation: Triple = (1, 1, 1)
    include_pad: bool = True

    @property
    def side_by_side(self) -> bool:
        """Whether every pixel belongs to at most one window, and all windows lie inside the map."""
        return self.kernel == self.stride and self.padding == (0, 0, 0) and self.dilation == (1, 1, 1)


def window_of(node: fx.Node, module: nn.Module | None, source: Layout) -> Window | None:
    """The pooling that ``node`` does on a value of layout ``source``; ``None`` where packed spikes cannot do it."""
    for kind, table in (("max", _MAX), ("average", _AVERAGE), ("adaptive", _ADAPTIVE)):
        rank = _rank(node, module, table)
        if rank is None or source.flat or len(source.size) != rank:
            continue
        arguments = _module_arguments(module, kind) if module is not None else _function_arguments(node, kind)
        return _window(kind, rank, arguments, source) if arguments is not None else None
    return None


def _rank(node: fx.Node, module: nn.Module | None, table: dict[Any, int]) -> int | None:
    if module is None:
        return table.get(node.target) if node.op == "call_function" else None
    base = next((cls for cls in type(module).__mro__ if cls in table), None)
    if base is None or "forward" in module.__dict__:
        return None
    wrapper = spikingjelly.layer_class(base.__name__)
    known = type(module).forward is base.forward or (wrapper is not None and type(module).forward is wrapper.forward)
    return table[base] if known else None


def _module_arguments(module: nn.Module, kind: str) -> dict[str, Any]:
    return {name: getattr(module, name) for name in _FUNCTION_NAMES[kind] if hasattr(module, name)}


def _function_arguments(node: fx.Node, kind: str) -> dict[str, Any] | None:
    names = _FUNCTION_NAMES[kind]
    arguments = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    plain = all(_is_plain(value) for value in arguments.values())
    return arguments if plain and arguments.keys() <= set(names) else None


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (int, bool)


def _window(kind: str, rank: int, a: dict[str, Any], source: Layout) -> Window | None:
    if kind == "adaptive":
        return _adaptive(rank, a["output_size"], source)
    if a.get("return_indices") or a.get("divisor_override") is not None:
        return None
    kernel = _triple(a["kernel_size"], rank, 1)
    stride = _triple(a.get("stride") or a["kernel_size"], rank, 1)
    padding = _triple(a.get("padding", 0), rank, 0)
    dilation = _triple(a.get("dilation", 1), rank, 1)
    if a.get("ceil_mode") and not _divides(source.pixels, kernel, stride, padding, dilation):
        return None
    if kind == "max":
        if source.most > 1:
            return None
        # A dilated window may lie in the padding altogether, where the maximum is minus infinity.
        beside = any(p and d > 1 for p, d in zip(padding, dilation, strict=True))
        return None if beside else Window(False, rank, kernel, stride, padding, dilation)
    return Window(True, rank, kernel, stride, padding, include_pad=a.get("count_include_pad", True))


def _divides(size: Triple, kernel: Triple, stride: Triple, padding: Triple, dilation: Triple) -> bool:
    """Whether windows end where the padded map does: ceil mode is floor mode then."""
    sizes = zip(size, kernel, stride, padding, dilation, strict=True)
    return all((extent + 2 * p - d * (k - 1) - 1) % s == 0 for extent, k, s, p, d in sizes)


def _adaptive(rank: int, output_size: Any, source: Layout) -> Window | None:
    sizes = (output_size,) * rank if not isinstance(output_size, (tuple, list)) else tuple(output_size)
    wanted = [have if want is None else want for want, have in zip(sizes, source.size, strict=True)]
    if any(want < 1 or have % want for want, have in zip(wanted, source.size, strict=True)):
        return None
    kernel = _triple([have // want for want, have in zip(wanted, source.size, strict=True)], rank, 1)
    return Window(True, rank, kernel, kernel)


def _triple(value: Any, rank: int, fill: int) -> Triple:
    values = (value,) * rank if isinstance(value, int) else tuple(value) * (rank if len(value) == 1 else 1)
    d, h, w = (*[fill] * (3 - rank), *values)
    return d, h, w
