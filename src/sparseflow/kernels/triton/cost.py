"""What a kernel has to move and to compute, counted from its launch parameters, and the time a machine needs for that.

A roofline (Williams, Waterman, Patterson: *Roofline*, 2009) with two memories: each stage takes as long as the slowest
of device memory, last-level cache and arithmetic units, and stages follow one another. It is a floor, not a forecast:
no latency, no imbalance between programs, no instruction issue. What the prescan hands to the second stage counts as
memory traffic, though little of it may stay in the cache. Times are ms, a multiply-add is two operations.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from sparseflow.kernels.base import Kernel
from sparseflow.kernels.geometry import ConvGeometry

from .backend import TileConv, TileVariant
from .depthwise import BlockVariant, DepthwiseConv
from .events import EventConv, EventLinear, Walk
from .pruned import PrunedKernel, PrunedVariant
from .pruned_gemm import GROUP, blocks_of_program
from .rows import chunk_channels, chunks_of
from .tiles import Tiling
from .weights import padded_outputs

_SECTOR = 32  # bytes: the least that memory moves
_COUNT = 4  # bytes of a count or of an entry of a tile's list
_CHANNEL = 2  # bytes of an entry of a row's list
_L1 = 128 << 10  # bytes of a multiprocessor's L1 cache that stay free beside the shared memory of its programs


@dataclasses.dataclass(frozen=True)
class Machine:
    """Practical ceilings of a GPU: bytes and operations a second, and seconds a node of a graph costs."""

    name: str
    memory: float
    cache: float
    tensor: float
    fma: float
    multiprocessors: int
    node: float


# Seen on one: copy 4.3 TB/s and matrix product 790 TFLOP/s. Data sheet: float32. Assumed: cache (as published for the
# H100) and graph nodes.
H200 = Machine("H200", memory=4.3e12, cache=5.5e12, tensor=790e12, fma=67e12, multiprocessors=132, node=1.5e-6)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One launch: bytes of device memory and of the cache, operations on the matrix (or plain) units, and programs."""

    name: str
    memory: float
    cache: float = 0.0
    tensor: float = 0.0
    fma: float = 0.0
    programs: int = 1 << 30

    def terms(self, machine: Machine) -> dict[str, float]:
        """Seconds by what limits; too few programs leave multiprocessors idle, which slows down all but the memory."""
        busy = min(1.0, self.programs / machine.multiprocessors)
        return {
            "memory": self.memory / machine.memory,
            "cache": self.cache / (machine.cache * busy),
            "tensor": self.tensor / (machine.tensor * busy),
            "fma": self.fma / (machine.fma * busy),
            "launch": machine.node,
        }


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Bytes of device memory, operations, ms, and what takes most of the time: memory, cache, tensor, fma or launch."""

    bytes: float
    flops: float
    ms: float
    bound: str
    stages: tuple[Stage, ...]


def combined(stages: tuple[Stage, ...], machine: Machine) -> Prediction:
    """Stages one after the other.

    >>> combined((Stage("copy", memory=4.3e9),), H200).ms
    1.0015
    """
    spent: dict[str, float] = {}
    for stage in stages:
        terms = stage.terms(machine)
        launch = terms.pop("launch")
        limit = max(terms, key=terms.__getitem__)
        spent[limit] = spent.get(limit, 0.0) + terms[limit]
        spent["launch"] = spent.get("launch", 0.0) + launch
    return Prediction(
        bytes=sum(stage.memory for stage in stages),
        flops=sum(stage.tensor + stage.fma for stage in stages),
        ms=1e3 * sum(spent.values()),
        bound=max(spent, key=spent.__getitem__),
        stages=stages,
    )


def dense(geometry: ConvGeometry, dtype: torch.dtype, machine: Machine = H200) -> Prediction:
    """The dense layer: every tensor through memory once, float32 on the plain units (no TF32)."""
    g = geometry
    moved = _input(g) + g.taps * g.group_channels * g.out_channels + _output(g)
    flops = 2.0 * g.batch * g.out_pixels * g.out_channels * g.taps * g.group_channels
    plain = dtype == torch.float32
    stage = Stage("dense", moved * dtype.itemsize, tensor=0.0 if plain else flops, fma=flops if plain else 0.0)
    return combined((stage,), machine)


def predict(kernel: Kernel, variant: str, load: float, machine: Machine = H200) -> Prediction:
    """Prescan and compute of ``kernel`` in ``variant`` at ``load``, on the kernel's own axis (density or occupancy).

    Raises:
        TypeError: not a Triton kernel.
    """
    if isinstance(kernel, TileConv):
        return combined(tile_stages(kernel.geometry, TileVariant.from_name(variant), kernel.dtype, load), machine)
    if isinstance(kernel, PrunedKernel):
        pruned = PrunedVariant.from_name(variant)
        share = kernel.shares[pruned.width]
        return combined(pruned_stages(kernel.geometry, pruned, kernel.dtype, load, share), machine)
    if isinstance(kernel, EventConv | EventLinear):
        return combined(event_stages(kernel.geometry, Walk.from_name(variant), kernel.dtype, load), machine)
    if isinstance(kernel, DepthwiseConv):
        return combined(block_stages(kernel.geometry, BlockVariant.from_name(variant), kernel.dtype, load), machine)
    raise TypeError(f"no cost model for {type(kernel).__name__}")


def tile_stages(
    geometry: ConvGeometry, variant: TileVariant, dtype: torch.dtype, occupancy: float
) -> tuple[Stage, Stage]:
    """Prescan by tiles, and matrix product over the active channels.

    Halos overlap, so that the prescan reads pixels again from the cache, and gathered pixels are more than there were.
    Every tile reads the weight, and every block of output channels the gathered pixels once: its other taps find them
    in the L1 cache, through which these loads go. In group mode every tap reads the input.
    """
    g, tiling = geometry, Tiling.of_side(geometry, variant.side)
    active = tiling.count * _padded_channels(g, variant, occupancy)
    gathered = active * tiling.halo_pixels * min(2, dtype.itemsize) if variant.gather else 0.0
    scanned = tiling.count * tiling.halo_pixels * g.group_channels * dtype.itemsize
    lists = tiling.count * 3 * _COUNT + active * _COUNT
    outputs = padded_outputs(g.out_channels // g.groups)
    blocks = -(-outputs // variant.block_n)
    parts = 2 if dtype == torch.float32 and not variant.tf32 else 1
    pixels = tiling.halo_pixels if variant.gather else g.taps * tiling.rows
    read = active * blocks * pixels * (2 if variant.gather else dtype.itemsize)
    weights = active * g.taps * outputs * parts * 2
    whole_weight = g.taps * g.in_channels * outputs * parts * 2
    return (
        Stage(
            "prescan",
            memory=_input(g) * dtype.itemsize + gathered + lists,
            cache=scanned + 2 * gathered,
            programs=tiling.count,
        ),
        Stage(
            "compute",
            memory=gathered + lists + min(weights, whole_weight) + _output_bytes(g, dtype),
            cache=read + weights + _output_bytes(g, dtype),
            tensor=2.0 * active * g.taps * tiling.rows * blocks * variant.block_n * parts,
            programs=tiling.count * blocks,
        ),
    )


def _padded_channels(geometry: ConvGeometry, variant: TileVariant, occupancy: float) -> float:
    """Channels that the second stage takes in an average tile: in tiles with any, half a block more than are active."""
    if not variant.gather:
        return occupancy * -(-geometry.group_channels // variant.block_k) * variant.block_k
    mean = occupancy * geometry.group_channels
    filled = mean + min(1.0, mean) * variant.block_k / 2
    return min(filled, -(-geometry.group_channels // variant.block_k) * variant.block_k)


def pruned_stages(
    geometry: ConvGeometry, variant: PrunedVariant, dtype: torch.dtype, occupancy: float, share: float
) -> tuple[Stage, Stage]:
    """Occupancy of (tile, 16 channels), then the pairs of (tap, 16 channels) whose weights are present.

    A program finds the halo again in its L1 cache, for all of its taps and blocks of outputs, where it fits; else every
    pair reads it. Channels that no pair asks for are not read; pairs that fill up a last step are not counted.
    A matrix instruction for 64 pixels reads them from shared memory at 128 bytes a cycle, so that one with ``width``
    outputs takes as long as the arithmetic of ``32 + width / 2`` of them, if that is more.
    """
    g, tiling, size = geometry, Tiling.of_side(geometry, variant.side), dtype.itemsize
    blocks = -(-g.out_channels // variant.width)
    run = blocks_of_program(tiling, blocks)
    programs = tiling.count * -(-blocks // run)
    parts = 2 if dtype == torch.float32 and not variant.tf32 else 1
    groups = -(-g.in_channels // GROUP)
    pairs = tiling.count * blocks * groups * g.taps * occupancy * share
    seen = occupancy * (1.0 - (1.0 - share) ** (run * g.taps))
    halo = tiling.halo_pixels * g.in_channels * size
    scanned = tiling.count * halo
    read = programs * halo * seen if halo <= _L1 else pairs * GROUP * tiling.rows * size
    block = GROUP * variant.width * parts * 2
    weight = blocks * groups * g.taps * share * block
    index = programs * run * groups * g.taps * share * _COUNT
    work = pairs * _COUNT
    bits = tiling.count * 4 * _COUNT
    slots = max(variant.width, 32 + variant.width / 2)
    return (
        Stage("prescan", memory=_input(g) * size + bits, cache=scanned, programs=tiling.count),
        Stage(
            "compute",
            memory=seen * _input(g) * size + bits + weight + _output_bytes(g, dtype),
            cache=read + pairs * block + index + 2 * work + _output_bytes(g, dtype),
            tensor=2.0 * pairs * GROUP * tiling.rows * slots * parts,
            programs=programs,
        ),
    )


def event_stages(geometry: ConvGeometry, walk: Walk, dtype: torch.dtype, density: float) -> tuple[Stage, ...]:
    """Lists of events, and a weight row added for every event under every output's window.

    An event lies under ``taps / stride`` windows. Of the weight only rows of active inputs are read from memory, each
    once; every further use finds it in the cache.
    """
    g, size = geometry, dtype.itemsize
    chunk = chunk_channels(g)
    lists = g.batch * g.groups * chunks_of(g) * g.in_pixels
    events = density * _input(g)
    some = 1.0 - (1.0 - density) ** min(chunk, g.group_channels)
    written = lists * _COUNT + lists * some * 2 * _SECTOR + events * (_CHANNEL + size)
    outputs = padded_outputs(g.out_channels // g.groups)
    meetings = events * g.taps / math.prod(g.stride)
    touched = 1.0 - (1.0 - density) ** (g.batch * g.in_pixels)
    weight = touched * g.taps * g.in_channels * outputs * size
    blocks = -(-outputs // walk.outputs)
    programs = g.batch * g.groups * walk.splits * blocks * -(-g.out_pixels // walk.pixels)
    looked_up = g.batch * g.groups * g.out_pixels * g.taps * chunks_of(g)
    walked = blocks * (looked_up * _COUNT + meetings * (_CHANNEL + size))
    result = _output(g) * walk.splits * 4 if walk.splits > 1 else _output_bytes(g, dtype)
    stages = (
        Stage("prescan", memory=_input(g) * size + written),
        Stage(
            "compute",
            memory=weight + written + result,
            cache=meetings * outputs * size + walked,
            fma=2.0 * meetings * outputs,
            programs=programs,
        ),
    )
    return stages if walk.splits == 1 else (*stages, Stage("sum of splits", memory=result + _output_bytes(g, dtype)))


def block_stages(
    geometry: ConvGeometry, variant: BlockVariant, dtype: torch.dtype, occupancy: float
) -> tuple[Stage, Stage]:
    """Depthwise: occupancy of (tile, channel block) pairs, then the taps of those that hold a spike."""
    g, size = geometry, dtype.itemsize
    tiling = Tiling.of_side(g, variant.side)
    words = g.batch * math.prod(tiling.grid) * -(-g.in_channels // variant.channels)
    taps = words * occupancy * tiling.rows * variant.channels * g.taps * (g.out_channels // g.in_channels)
    halo = words * tiling.halo_pixels * variant.channels * size
    return (
        Stage("prescan", memory=_input(g) * size + 2 * words * _COUNT, cache=halo, programs=words),
        Stage(
            "compute",
            memory=occupancy * _input(g) * size + words * _COUNT + _output_bytes(g, dtype),
            cache=taps * size,
            fma=2.0 * taps,
            programs=words,
        ),
    )


def _input(geometry: ConvGeometry) -> int:
    return geometry.batch * geometry.in_channels * geometry.in_pixels


def _output(geometry: ConvGeometry) -> int:
    return geometry.batch * geometry.out_channels * geometry.out_pixels


def _output_bytes(geometry: ConvGeometry, dtype: torch.dtype) -> int:
    return _output(geometry) * dtype.itemsize
