"""A stand-in for CUDA graphs on the CPU, and blocks in plain PyTorch for it to record.

A tape is true to what a graph is: what it records does not happen, a replay runs no Python of the model's, memory from
before is known by its address alone (and kept by nobody), and who looks at a value while it records makes it fail.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sparseflow.kernels.blocks import reference
from sparseflow.kernels.blocks.spikes import WORD, PackedSpikes, channels_last, spatial, unpack

_UNWRITTEN = {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default}


class TapedGraphs:
    """Stands for :class:`~sparseflow.modules.fused.graphs.CudaGraphs`."""

    def __init__(self, device: Any = None) -> None:
        self.captures = self.failures = self.replays = 0
        self.recorded_by_others = False

    def capturing(self) -> bool:
        return self.recorded_by_others

    def follow(self) -> None:
        pass

    def capture(self, run):
        tape = _Tape()
        try:
            with tape:
                run()
        except BaseException:
            self.failures += 1
            raise
        finally:
            tape.undo()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, list[Any]]] = []
        self._own: dict[int, Tensor] = {}
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._constants: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        counts_values = torch.Tag.dynamic_output_shape in func.tags and func is not torch.ops.aten.index.Tensor
        if counts_values or torch.Tag.data_dependent_output in func.tags or _is_mask(func, args):
            raise RuntimeError("operation not permitted when stream is capturing")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func._schema.is_mutable:
            self._save(given)
        known = {_address(x) for x in given}
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for x in made:
            if _address(x) not in known:
                self._own.setdefault(_address(x), x)
        if func is torch.ops.aten.lift_fresh.default:  # of a number in the program
            self._own.setdefault(_address(result), result)
            self._constants.add(_address(result))
            return result
        written = [None if func in _UNWRITTEN or _address(x) in known else self._by_address(x) for x in made]
        self._operations.append((func, *tree_map(self._by_address, (args, kwargs)), written))
        return result

    def _save(self, given: list[Tensor]) -> None:
        for x in given:
            if _address(x) not in self._own and _address(x) not in self._before:
                storage = _alias(x).untyped_storage()
                self._before[_address(x)] = (storage, storage.clone())

    def _by_address(self, x: Any) -> Any:
        """``x`` itself if it was made on the tape, else the same memory without a hold on it."""
        return _alias(x) if isinstance(x, Tensor) and _address(x) not in self._own else x

    def undo(self) -> None:
        """Nothing of what was recorded has happened."""
        for storage, values in self._before.values():
            storage.copy_(values)
        for address, x in self._own.items():
            if address not in self._constants:
                x.untyped_storage().fill_(255)  # not a number

    def replay(self) -> None:
        for func, args, kwargs, written in self._operations:
            made = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for place, x in zip(written, made, strict=True):
                if place is not None:
                    place.copy_(x)


def _is_mask(func: Any, args: Any) -> bool:
    indexed = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
    return indexed and any(x is not None and x.dtype is torch.bool for x in args[1])


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _alias(x: Tensor) -> Tensor:
    storage = x.untyped_storage()
    if not storage.nbytes():
        return x
    memory = torch.frombuffer((ctypes.c_byte * storage.nbytes()).from_address(storage.data_ptr()), dtype=torch.uint8)
    return torch.empty(0, dtype=x.dtype).set_(memory.untyped_storage(), x.storage_offset(), x.shape, x.stride())


class TorchOps:
    """Blocks in PyTorch's operations, which look at no value."""

    name, pool, pools_sums = "torch", None, False

    def pack_weight(self, weight, geometry, variant):
        return weight.clone()

    def weight_share(self, weight, geometry):
        return 1.0

    def variants(self, geometry, steps, weight_share=1.0):
        return ("plain",)

    def conv(self, x, packed, geometry, variant, epilogue, neuron, state, steps):
        currents = reference.affine(reference.sums(x, packed, geometry), epilogue)
        if neuron is None:
            return currents
        return self._fired(currents, geometry.out_size, x.dims, neuron, state, steps)

    def neuron(self, currents, size, dims, epilogue, neuron, state, steps):
        n = state.v.shape[0]
        if currents.shape[0] < n * steps:
            currents = currents.repeat(steps, 1, 1)
        return self._fired(reference.affine(currents, epilogue), spatial(tuple(size)), dims, neuron, state, steps)

    def _fired(self, currents, size, dims, neuron, state, steps):
        spikes = reference.run_neuron(currents, neuron, state, steps)
        return packed(spikes.flatten(0, 1), tuple(spikes.shape[:2]), size, dims)

    def affine(self, currents, epilogue):
        return reference.affine(currents, epilogue)

    def pack(self, x, lead):
        size = tuple(x.shape[lead + 1 :])
        return packed(channels_last(x, lead), tuple(x.shape[:lead]), spatial(size), len(size))

    def unpack(self, x):
        return unpack(x)

    def add(self, a, b):
        return self._of(a, (self._flat(a) + self._flat(b)).clamp(max=255), counted=True)

    def logical(self, a, b, op):
        x, y = self._flat(a), self._flat(b)
        return self._of(a, {"and": x * y, "and_not": x * (1 - y), "or": torch.maximum(x, y)}[op])

    def concat(self, parts):
        flat = torch.cat([self._flat(part) for part in parts], -1)
        return self._of(parts[0], flat, counted=any(part.counts is not None for part in parts))

    def max_pool(self, x, kernel, stride, padding, dilation):
        y = F.max_pool3d(self._maps(x), kernel, stride, padding, dilation)
        return packed(channels_last(y, 1), x.lead, tuple(y.shape[2:]), x.dims)

    def avg_pool(self, x, kernel, stride, padding, include_pad):
        y = F.avg_pool3d(self._maps(x), kernel, stride, padding, count_include_pad=include_pad)
        return y.reshape(*x.lead, x.channels, *y.shape[5 - x.dims :])

    def _maps(self, x):
        return unpack(x).reshape(x.images, x.channels, *x.size)

    def _flat(self, x):
        return channels_last(unpack(x), len(x.lead))

    def _of(self, like, flat, counted=False):
        return packed(flat, like.lead, like.size, like.dims, counted)


def packed(flat: Tensor, lead: tuple[int, ...], size: tuple[int, int, int], dims: int, counted: bool = False):
    """Packed spikes from ``[images, pixels, channels]``."""
    words = F.pad(flat != 0, (0, -flat.shape[-1] % WORD)).unflatten(-1, (-1, WORD))
    bits = (words.long() << torch.arange(WORD)).sum(-1)
    counts = flat.to(torch.uint8) if counted else None
    assert flat.shape[:2] == (math.prod(lead), math.prod(size))
    return PackedSpikes(bits, lead, flat.shape[-1], size, dims, counts=counts)
