"""One fused block at run time: its constants, its neuron's memory, and the choice between events and dense."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseflow.dispatch.blocks import block_crossover, block_key
from sparseflow.dispatch.crossovers import RuntimeConfig
from sparseflow.dispatch.measure import wait_for
from sparseflow.dispatch.policy import Policy
from sparseflow.dispatch.sites import pruned_detail
from sparseflow.dispatch.stats import LayerStats
from sparseflow.frameworks import neuron_spec
from sparseflow.graph.eligibility import layer_kind
from sparseflow.graph.steps import Block, Layout, Operand
from sparseflow.kernels.blocks.records import BlockOps, Dynamics, Epilogue, State
from sparseflow.kernels.blocks.reference import pooled
from sparseflow.kernels.blocks.spikes import PackedSpikes, as_tensor, channels_last
from sparseflow.kernels.geometry import Three
from sparseflow.plan import Crossover, LayerPlan, Path, Reason

from .constants import geometry_of, kernel_weight, scale_and_shift
from .state import NeuronMemory

MAX_INPUT_DENSITY = 0.5
"""Share of nonzeros from which on an input of zeros and ones counts as an image."""


class BlockRun:
    """Executes one :class:`~sparseflow.graph.steps.Block`.

    A block on packed spikes runs event-driven up to its measured crossover, and above it a dense convolution in front
    of the same neuron. A block on a dense tensor runs its layer, once where all time steps are equal, and the neuron;
    where that tensor holds spikes, as event streams do, they are packed here, and the block is one on packed spikes.
    ``private`` says of a dense result that only other blocks read it.
    """

    def __init__(
        self, block: Block, modules: dict[str, nn.Module], ops: BlockOps, device: torch.device, *, private: bool = False
    ):
        self.block, self.ops = block, ops
        self.layer: Any = modules[block.layer] if block.layer else None
        self.norm: Any = modules[block.norm] if block.norm else None
        self.memory = NeuronMemory(modules[block.neuron], block, device) if block.neuron else None
        self.dynamics = self._dynamics(modules)
        self.geometry = geometry_of(block, self.layer) if block.source.packed and self.layer is not None else None
        self.stats = LayerStats()
        self.policy: Policy | None = None
        self._share = 1.0
        self._entry: int | None = None  # leading dimensions of a dense input that is packed here
        # A result that outlives the call, as a dense one may, cannot lie in the same memory at every call.
        self._can_prepare = hasattr(ops, "prepare") and (self.dynamics is not None or private)
        self.refresh()

    @property
    def name(self) -> str:
        """The layer, or else the neuron, by which reports know the block."""
        return self.block.layer or self.block.neuron or ""

    @property
    def layout(self) -> Any:
        """Layout of the result."""
        return self.block.layout

    def _dynamics(self, modules: dict[str, nn.Module]) -> Dynamics | None:
        if self.block.neuron is None:
            return None
        spec = neuron_spec(modules[self.block.neuron])
        assert spec is not None
        return Dynamics.of(spec, self.block.layout.channels)

    def refresh(self) -> None:
        """Prepare weights anew at the next call."""
        self._affine: tuple[Tensor | None, Tensor | None] | None = None
        self._packed: dict[str, Any] = {}
        self.prepared: Any = None
        self._dense_weight: Tensor | None = None

    @property
    def can_chain(self) -> bool:
        """Whether the block can be part of a :class:`~sparseflow.modules.fused.chain.Chain`."""
        return self.geometry is not None and self._can_prepare

    def describe(self, plan: LayerPlan) -> LayerPlan:
        """``plan``, of the block's layer, as it runs here."""
        if self.policy is None:
            return plan
        path, reason = (Path.FUSED, Reason.FUSED) if self.policy.sparse else (Path.DENSE, Reason.FUSED_DENSE)
        crossover = self.policy.crossover if self.policy.crossover.variant else None
        seen = self.stats.density
        detail = pruned_detail(self._share, crossover.variant) if crossover and self.policy.sparse else plan.detail
        found = dataclasses.replace(plan, path=path, reason=reason, density=seen, occupancy=None, crossover=crossover)
        return dataclasses.replace(found, detail=detail)

    # ---- one call

    def __call__(self, source: Any, residual: Any, given: tuple[Any, ...]) -> Any:
        """The result: packed spikes, or a dense tensor where the block has no neuron."""
        state = self.begin(given)
        spikes: PackedSpikes | None = source if isinstance(source, PackedSpikes) else self._entered(source)
        if spikes is not None:
            result = self._on_spikes(spikes, residual, state)
        else:
            result = self._on_dense(source, self.epilogue(residual), state)
        return self.end(state, result)

    def _entered(self, x: Any) -> PackedSpikes | None:
        """A dense input packed, where the plan found spikes in it and it holds nothing else this time either."""
        return None if self._entry is None else self.ops.pack(x, self._entry)

    def begin(self, given: tuple[Any, ...]) -> State | None:
        """The state that the neuron starts from."""
        return self.memory.begin(given) if self.memory is not None else None

    def end(self, state: State | None, result: PackedSpikes | Tensor) -> PackedSpikes | Tensor:
        """Leave the state in the neuron; the result as the graph knows it."""
        if self.memory is not None:
            self.memory.end()
        self.last_state = state
        return self.shaped(result)

    def shaped(self, result: PackedSpikes | Tensor) -> PackedSpikes | Tensor:
        """The result of a kernel as the graph knows it."""
        layout = self.block.layout
        return result if isinstance(result, PackedSpikes) else as_tensor(result, layout.shape, len(layout.lead))

    def epilogue(self, residual: Any) -> Epilogue:
        """Scale, shift, residual and pooling of this call."""
        if self._affine is None:
            self._affine = scale_and_shift(self.layer, self.norm)
        pool = self.block.pool
        return Epilogue(*self._affine, self.flat(residual), None if pool is None else pool.window)

    def flat(self, residual: Any) -> Any:
        """A dense residual as ``[images, pixels, channels]``."""
        if not isinstance(residual, Tensor):
            return residual
        return channels_last(residual, residual.dim() - 1 - len(self.block.layout.size))

    def _on_spikes(self, x: PackedSpikes, residual: Any, state: State | None) -> PackedSpikes | Tensor:
        assert self.policy is not None
        if x.bits.is_cuda:
            return self._on_device(x, residual, state)
        nonzero = _spikes_of(x)
        sparse = self.policy.decide(nonzero / x.numel if x.numel else 0.0)
        self._count(x.numel, nonzero, sparse)
        if sparse and self._can_prepare:
            return self._run_prepared(x, residual, state, nonzero)
        return self.compute(x, self.policy.crossover.variant if sparse else None, self.epilogue(residual), state)

    def _count(self, numel: int, nonzero: int, sparse: bool) -> None:
        """Note for the report what a call saw and did."""
        self.stats.nonzero += nonzero
        self.stats.numel += numel
        self.stats.calls[Path.FUSED if sparse else Path.DENSE] += 1

    def _on_device(self, x: PackedSpikes, residual: Any, state: State | None) -> PackedSpikes | Tensor:
        """On a GPU nobody waits for the count of this call: what planning saw decides."""
        assert self.policy is not None
        self.stats.calls[Path.FUSED if self.policy.sparse else Path.DENSE] += 1
        variant = self.policy.crossover.variant if self.policy.sparse else None
        return self.compute(x, variant, self.epilogue(residual), state)

    # ---- prepared calls

    @property
    def most_spikes(self) -> int:
        """Nonzeros of the input up to which the prepared call may run; -1 without one, and while the block is dense."""
        return -1 if self.prepared is None or self.policy is None else self.policy.most(self._numel)

    def note(self, nonzero: int) -> None:
        """The prepared call ran, as part of a chain, on so many spikes."""
        self._count(self._numel, nonzero, sparse=True)

    def _run_prepared(self, x: PackedSpikes, residual: Any, state: State | None, nonzero: int) -> PackedSpikes | Tensor:
        if self.prepared is None:
            assert self.policy is not None
            variant = self.policy.crossover.variant
            arguments = (self._weight_for(variant), self.geometry, variant, self.epilogue(residual), self.dynamics)
            self.prepared = self.ops.prepare(x, *arguments, self.block.steps)  # type: ignore[attr-defined]
            self._numel = x.numel
        return self.prepared(x, self.flat(residual), state, nonzero)

    def compute(
        self, x: PackedSpikes, variant: str | None, epilogue: Epilogue, state: State | None
    ) -> PackedSpikes | Tensor:
        """The block on packed spikes, event-driven in a configuration or (``None``) by a dense convolution."""
        assert self.geometry is not None
        steps = self.block.steps
        if variant is not None:
            packed = self._weight_for(variant)
            if epilogue.window is None or self.ops.pools_sums:
                return self.ops.conv(x, packed, self.geometry, variant, epilogue, self.dynamics, state, steps)
            plain = epilogue.before_pooling
            currents = self.ops.conv(x, packed, self.geometry, variant, plain, None, None, steps)
            assert isinstance(currents, Tensor)
            return self._after_pooling(currents, epilogue.window, state)
        source = self.block.source.packed
        assert source is not None
        dense = self.ops.unpack(x).reshape(source.images, source.channels, *source.size)
        return self._after(self._dense_sums(dense), epilogue, state)

    def _weight_for(self, variant: str) -> Any:
        """The layer's weight in the layout of ``variant``, packed once."""
        assert self.geometry is not None
        packed = self._packed.get(variant)
        if packed is None:
            weight = kernel_weight(self.layer, self.geometry)
            packed = self._packed[variant] = self.ops.pack_weight(weight, self.geometry, variant)
        return packed

    def _dense_sums(self, x: Tensor) -> Tensor:
        """``[images, pixels, channels]`` of the layer on dense images, without its bias."""
        layer = self.layer
        if layer_kind(layer) == "linear":
            return F.linear(x.reshape(-1, layer.in_features), layer.weight).unsqueeze(1)
        if self._dense_weight is None:
            self._dense_weight = _in_channels_last(layer.weight.detach())
        convolution, settings = _CONVOLUTIONS[x.dim() - 2], (layer.stride, layer.padding, layer.dilation, layer.groups)
        return channels_last(convolution(_in_channels_last(x), self._dense_weight, None, *settings), 1)

    def _after(self, sums: Tensor, epilogue: Epilogue, state: State | None) -> PackedSpikes | Tensor:
        if self.dynamics is None or state is None:
            return self.ops.affine(sums, epilogue)
        if epilogue.window is not None and not self.ops.pools_sums:
            if epilogue.residual is not None and sums.shape[0] < self.block.layout.images:
                sums = sums.repeat(self.block.steps, 1, 1)  # the same at every step, but the residual is not
            return self._after_pooling(self.ops.affine(sums, epilogue.before_pooling), epilogue.window, state)
        block = self.block
        return self.ops.neuron(
            sums, block.map_size, len(block.layout.size), epilogue, self.dynamics, state, block.steps
        )

    def _after_pooling(self, currents: Tensor, window: Three, state: State | None) -> PackedSpikes:
        """Pooling and neuron for a backend whose kernels have them apart."""
        assert self.dynamics is not None
        assert state is not None
        layout, x = self.block.layout, pooled(currents, self.block.map_size, window)
        return self.ops.neuron(x, layout.pixels, len(layout.size), Epilogue(), self.dynamics, state, self.block.steps)

    def _on_dense(self, x: Any, epilogue: Epilogue, state: State | None) -> PackedSpikes | Tensor:
        if self.layer is not None:
            once = None if self.block.repeated else self._first_step(x)
            x = x if once is None else once
            return self._after(self._dense_sums(self.images_of(x)), epilogue, state)
        if self.block.steps > 1 and x.stride(0) == 0 and x.shape[0] == self.block.steps:
            x = x[:1]
        lead = x.dim() - 1 - len(self.block.layout.size)
        return self._after(channels_last(x, lead), epilogue, state)

    def images_of(self, x: Tensor) -> Tensor:
        """``[images, channels, *size]`` of the input of a convolution; that of a linear layer stays."""
        rank = self.layer.weight.dim() - 1
        return x.flatten(0, x.dim() - rank - 1) if rank > 1 and x.dim() > rank + 1 else x

    def _first_step(self, x: Tensor) -> Tensor | None:
        """The input of the first time step, if it is that of all of them (direct encoding)."""
        steps = self.block.steps
        if steps == 1 or x.shape[0] % steps:
            return None
        size = x.shape[0] // steps
        first = x[:size]
        if size == 1 and x.stride(0) == 0:
            return first
        if x.device.type != "cpu":  # comparing values would wait for the device
            return None
        return first if _repeats(x, size) else None

    # ---- the choice

    def plan(self, config: RuntimeConfig, like: PackedSpikes, residual: Any) -> None:
        """Find the crossover of a block on packed spikes; ``like`` and ``residual`` are what it gets."""
        if self.geometry is None:
            return
        self._share = self._share_now()
        variants = self.ops.variants(self.geometry, self.block.steps, self._share)
        neuron = f"{self.dynamics.charge}/{self.dynamics.reset}" if self.dynamics else "none"
        if self.block.pool is not None:
            neuron = f"pool{self.block.pool.window}/{neuron}"
        kind = "packed" if isinstance(residual, PackedSpikes) else "dense" if residual is not None else "none"
        key = block_key(self.ops.name, self.geometry, self.block.steps, neuron.replace(" ", ""), kind, self._share)
        if not variants:
            self.policy = Policy(Crossover(key, 0.0, 0.0, 0.0, 0.0, (0.0,), (0.0,), ""))
            return
        epilogue, state = self.epilogue(residual), self._scratch_state(like)

        def run(x: PackedSpikes, variant: str | None) -> object:
            result = self.compute(x, variant, epilogue, state)
            wait_for(x.bits.device)
            return result

        self.policy = Policy(block_crossover(self.name, key, variants, like, run, config))
        self.policy.decide(_spikes_of(like) / max(1, like.numel))
        self._packed = {v: packed for v, packed in self._packed.items() if v == self.policy.crossover.variant}
        if self.policy.sparse:
            self._dense_weight = None  # measured with, and perhaps never needed again

    def plan_entry(self, config: RuntimeConfig, x: Any, residual: Any) -> None:
        """The same for a dense ``x`` that is made of spikes, as event streams and rate-coded images are.

        On a GPU nobody looks at the values of an input: that would wait for the device.
        """
        if self.layer is None or self.block.repeated or not self._can_prepare or not isinstance(x, Tensor) or x.is_cuda:
            return
        layout = self._layout_of(x)
        packed = None if self._first_step(x) is not None else self.ops.pack(x, len(layout.lead))
        if packed is None or not 0 < _spikes_of(packed) < MAX_INPUT_DENSITY * packed.numel:
            return
        self.block = dataclasses.replace(self.block, source=Operand(self.block.source.node, layout))
        self.geometry = geometry_of(self.block, self.layer)
        self.plan(config, packed, residual)
        assert self.policy is not None
        if self.policy.crossover.variant:
            self._entry = len(layout.lead)
        else:
            self.policy, self.geometry = None, None

    def _layout_of(self, x: Tensor) -> Layout:
        """Of a dense input of the layer: ``[*lead, channels, *size]``."""
        lead = x.dim() - max(1, self.layer.weight.dim() - 1)
        return Layout(tuple(x.shape[:lead]), x.shape[lead], tuple(x.shape[lead + 1 :]))

    def fits(self) -> bool:
        """Whether the crossover is that of the weight as it is now: of as many zero blocks."""
        return self.policy is None or self._share == self._share_now()

    def _share_now(self) -> float:
        assert self.geometry is not None
        return self.ops.weight_share(kernel_weight(self.layer, self.geometry), self.geometry)

    def _scratch_state(self, like: PackedSpikes) -> State | None:
        if self.dynamics is None or self.geometry is None:
            return None
        layout = self.block.layout
        shape = (like.images // self.block.steps, math.prod(layout.pixels), layout.channels)
        v = torch.zeros(shape, device=like.bits.device)
        syn = torch.zeros_like(v) if self.dynamics.synaptic else None
        return State(v, syn, fresh=True)


def _spikes_of(x: PackedSpikes) -> int:
    return int(x.nonzero) if x.nonzero is not None else x.numel


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


_memcmp = ctypes.CDLL("msvcrt" if os.name == "nt" else None).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def _repeats(x: Tensor, size: int) -> bool:
    """Whether every ``size`` images of ``x`` are those before them; compared as memory, which is ten times as fast."""
    if not (x.is_contiguous() or (x.dim() in _FORMATS and x.is_contiguous(memory_format=_FORMATS[x.dim()]))):
        return torch.equal(x[size:], x[:-size])
    image = x.numel() // len(x) * x.element_size()
    return _memcmp(x.data_ptr() + size * image, x.data_ptr(), (len(x) - size) * image) == 0


def _in_channels_last(x: Tensor) -> Tensor:
    format = _FORMATS.get(x.dim())
    return x.contiguous() if format is None else x.contiguous(memory_format=format)
