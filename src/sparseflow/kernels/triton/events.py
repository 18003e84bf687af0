"""Event-driven kernels: a weight row is read and added for every event that an output sees, and for nothing else.

Output-stationary. A program owns a block of output pixels and a block of output channels. The lists that stage 1 made
of the pixels under its taps are walked as if they were one list per output pixel, a few events of every pixel at a
time, so that a program takes as long as its busiest pixel. Sums are in float32 registers in a fixed order; every output
is written once.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseflow.kernels.base import DENSITY, Layout
from sparseflow.kernels.geometry import ConvGeometry
from sparseflow.plan import Path

from .launch import launch
from .prescan import is_inside, is_wide
from .rows import RowScan, as_bias, chunk_channels, chunks_of, offset, pixel_stride, scan_rows
from .tiles import by_axis
from .weights import pack_rows, padded_outputs

_PAIRS = 32  # (pixel, event) pairs that a program takes at once
_COUNTS = 512  # (pixel, segment) pairs whose counts it holds
_COMPARED = 4096  # (pixel, event, segment) triples it compares to find where an event comes from
_PROGRAMS = 512  # four for each of the 132 multiprocessors of a large GPU
_SPLITS = 16
_SPLIT_CHANNELS = 256
_SUM_BLOCK = 64
_WARPS = 4
_STAGES = 3


@triton.jit
def _input_pixel(
    tap,
    z,
    y,
    x,
    IN_D,
    IN_H,
    IN_W,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    DILATION_D: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
):
    """Pixel that ``tap`` of a window starting at (z, y, x) meets, and whether that lies inside the image."""
    z += tap // (KERNEL_H * KERNEL_W) * DILATION_D
    y += tap // KERNEL_W % KERNEL_H * DILATION_H
    x += tap % KERNEL_W * DILATION_W
    return (z * IN_H + y) * IN_W + x, is_inside(z, y, x, IN_D, IN_H, IN_W)


@triton.jit
def _locate(event, counts, ends):
    """Segment of each numbered event of a pixel, and its place there, from the segments' counts and running totals."""
    passed = ends[:, None, :] <= event[:, :, None]
    segment = tl.sum(passed.to(tl.int32), axis=2)
    return segment, event - tl.sum(tl.where(passed, counts[:, None, :], 0), axis=2)


@triton.jit
def _add_rows(
    counts_ptr,
    channels_ptr,
    values_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    y_split,
    y_n,
    y_c,
    y_p,
    IN_D,
    IN_H,
    IN_W,
    OUT_H,
    OUT_W,
    PAD_D,
    PAD_H,
    PAD_W,
    pixels,
    channels,
    outputs,
    padded,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_D: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PIXELS: tl.constexpr,
    EVENTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    pid = tl.program_id(0)
    blocks = tl.cdiv(outputs, OUTPUTS)
    output = pid % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    pid = pid // blocks
    group = pid % GROUPS
    split = pid // GROUPS % SPLITS
    pid = pid // (GROUPS * SPLITS)
    patches = tl.cdiv(pixels, PIXELS)
    pixel = pid % patches * PIXELS + tl.arange(0, PIXELS)
    image = (pid // patches).to(tl.int64)

    z = pixel // (OUT_H * OUT_W) * STRIDE_D - PAD_D
    y = pixel // OUT_W % OUT_H * STRIDE_H - PAD_H
    x = pixel % OUT_W * STRIDE_W - PAD_W
    in_pixels = IN_D * IN_H * IN_W
    lists = (image * GROUPS + group) * CHUNKS * in_pixels
    channels_ptr += lists * CHUNK
    values_ptr += lists * CHUNK

    # A segment is one list an output pixel has to walk: a tap and a chunk of its channels.
    segment = tl.arange(0, SEGMENTS)[None, :]
    met, inside = _input_pixel(
        segment // CHUNKS, z[:, None], y[:, None], x[:, None], IN_D, IN_H, IN_W,
        KERNEL_H, KERNEL_W, DILATION_D, DILATION_H, DILATION_W,
    )  # fmt: skip
    inside = inside & (segment < TAPS * CHUNKS) & (pixel < pixels)[:, None]
    counts = tl.load(counts_ptr + lists + segment % CHUNKS * in_pixels + met, mask=inside, other=0)
    ends = tl.cumsum(counts, axis=1)
    total = tl.sum(counts, axis=1)
    first = total * split // SPLITS
    last = total * (split + 1) // SPLITS

    acc = tl.zeros((PIXELS * EVENTS, OUTPUTS), tl.float32)
    for start in tl.range(0, tl.max(last - first, axis=0), EVENTS, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        event = first[:, None] + start + tl.arange(0, EVENTS)[None, :]
        known = event < last[:, None]
        at, place = _locate(event, counts, ends)
        tap = at // CHUNKS
        chunk = at - tap * CHUNKS
        source, _ = _input_pixel(
            tap, z[:, None], y[:, None], x[:, None], IN_D, IN_H, IN_W,
            KERNEL_H, KERNEL_W, DILATION_D, DILATION_H, DILATION_W,
        )  # fmt: skip
        entry = offset(chunk * in_pixels + source, WIDE) * CHUNK + place
        channel = chunk * CHUNK + tl.load(channels_ptr + entry, mask=known, other=0).to(tl.int32)
        value = tl.load(values_ptr + entry, mask=known, other=0.0).to(tl.float32)
        row = tl.reshape(offset((group * TAPS + tap) * channels + channel, WIDE) * padded, (PIXELS * EVENTS,))
        read = tl.reshape(known, (PIXELS * EVENTS,))[:, None] & (output < padded)[None, :]
        weight = tl.load(weight_ptr + (row[:, None] + output[None, :]), mask=read, other=0.0)
        acc += weight.to(tl.float32) * tl.reshape(value, (PIXELS * EVENTS,))[:, None]

    result = tl.sum(tl.reshape(acc, (PIXELS, EVENTS, OUTPUTS)), axis=1)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + group * outputs + output, mask=output < outputs, other=0.0)
        result += bias.to(tl.float32)[None, :]
    corner = y_ptr + split.to(tl.int64) * y_split + image * y_n + (group * outputs).to(tl.int64) * y_c
    where = offset(pixel, WIDE)[:, None] * y_p + offset(output, WIDE)[None, :] * y_c
    tl.store(
        corner + where, result.to(y_ptr.dtype.element_ty), mask=(pixel < pixels)[:, None] & (output < outputs)[None, :]
    )


@triton.jit
def _add_splits(partial_ptr, bias_ptr, y_ptr, numel, outputs, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, SPLITS).to(tl.int64)
    partial = tl.load(partial_ptr + split[:, None] * numel + at[None, :], mask=(at < numel)[None, :], other=0.0)
    result = tl.sum(partial, axis=0)
    if bias_ptr is not None:
        result += tl.load(bias_ptr + at % outputs, mask=at < numel, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, result.to(y_ptr.dtype.element_ty), mask=at < numel)


@dataclasses.dataclass(frozen=True)
class Walk:
    """How a program walks: its output pixels and channels, events of a pixel at once, programs that share an output.

    >>> Walk.from_name("p1e64o64s16")
    Walk(pixels=1, events=64, outputs=64, splits=16)
    """

    pixels: int
    events: int
    outputs: int
    splits: int = 1

    @property
    def name(self) -> str:
        """Short name, which :meth:`from_name` reads back."""
        return f"p{self.pixels}e{self.events}o{self.outputs}s{self.splits}"

    @classmethod
    @functools.cache
    def from_name(cls, name: str) -> Walk:
        """The walk called ``name``. Raises ``ValueError`` for a name of another form."""
        found = re.fullmatch(r"p(\d+)e(\d+)o(\d+)s(\d+)", name)
        if found is None:
            raise ValueError(f"{name!r} is not a walk such as 'p16e4o64s1'")
        return cls(*map(int, found.groups()))


class EventConv:
    """Convolution by the events under every output's window; any values, groups and number of dimensions."""

    path = Path.EVENT
    axis = DENSITY
    deferred = True
    weight_share = 1.0

    def __init__(self, geometry: ConvGeometry, layout: Layout, dtype: torch.dtype):
        self.geometry, self.layout, self.dtype = geometry, layout, dtype

    @functools.cached_property
    def _variants(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(walk.name for walk in conv_walks(self.geometry)))

    def variants(self) -> tuple[str, ...]:
        return self._variants

    def pack(self, weight: Tensor, variant: str, *, inspect: bool = True) -> Tensor:  # noqa: ARG002
        return pack_rows(weight.detach().to(self.dtype), self.geometry.groups)

    def prescan(self, x: Tensor, variant: str) -> RowScan:  # noqa: ARG002
        return scan_rows(x, self.geometry)

    def compute(self, x: Tensor, scan: RowScan, packed: Tensor, bias: Tensor | None, variant: str) -> Tensor:
        y = self.layout.empty(self.dtype, x.device)
        at = _Strides(y.stride(0), y.stride(1), pixel_stride(y))
        _launch_add_rows(scan, packed, as_bias(bias, self.dtype), y, at, self.geometry, Walk.from_name(variant))
        return y


class EventLinear:
    """Linear layer for few rows: the weights of inactive inputs are not read.

    It is the convolution of images of one pixel. Where its rows and output blocks are too few programs to keep the
    memory busy, the events of a row are shared out evenly among several, whose sums a second launch adds up in order.
    """

    path = Path.EVENT
    axis = DENSITY
    deferred = True
    weight_share = 1.0

    def __init__(self, rows: int, in_features: int, out_features: int, dtype: torch.dtype):
        self.geometry = _one_pixel_images(rows, in_features, out_features)
        self.dtype = dtype

    @functools.cached_property
    def _variants(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(walk.name for walk in linear_walks(self.geometry)))

    def variants(self) -> tuple[str, ...]:
        return self._variants

    def pack(self, weight: Tensor, variant: str, *, inspect: bool = True) -> Tensor:  # noqa: ARG002
        return pack_rows(weight.detach().to(self.dtype), 1)

    def prescan(self, x: Tensor, variant: str) -> RowScan:  # noqa: ARG002
        return scan_rows(x.reshape(self.geometry.batch, self.geometry.in_channels, 1), self.geometry)

    def compute(self, x: Tensor, scan: RowScan, packed: Tensor, bias: Tensor | None, variant: str) -> Tensor:
        rows, outputs, walk = self.geometry.batch, self.geometry.out_channels, Walk.from_name(variant)
        y = torch.empty((*x.shape[:-1], outputs), dtype=self.dtype, device=x.device)
        bias = as_bias(bias, self.dtype)
        at = _Strides(outputs, 1, 1, split=rows * outputs)
        if walk.splits == 1:
            _launch_add_rows(scan, packed, bias, y, at, self.geometry, walk)
            return y
        partial = torch.empty((walk.splits, rows * outputs), dtype=torch.float32, device=x.device)
        _launch_add_rows(scan, packed, None, partial, at, self.geometry, walk)
        _launch_add_splits(partial, bias, y)
        return y


def _one_pixel_images(rows: int, in_features: int, out_features: int) -> ConvGeometry:
    """A linear layer as a pointwise convolution."""
    return ConvGeometry.from_call((rows, in_features, 1), (out_features, in_features, 1), (1,), (0,), (1,), 1)


def conv_walks(geometry: ConvGeometry) -> tuple[Walk, ...]:
    """The walks worth measuring for a convolution, best guess first.

    Many pixels a program cost little where most of them see no event; few pixels wait less for each other.
    """
    segments, outputs = _segments(geometry), _output_block(geometry, 64)
    pairs = max(1, min(_PAIRS, _COMPARED // segments))
    most = min(pairs, max(1, _COUNTS // segments), triton.next_power_of_2(geometry.out_pixels))
    pixels = (min(p, most) for p in (16, 64, 8))
    return tuple(Walk(p, pairs // p, outputs) for p in pixels)


def linear_walks(geometry: ConvGeometry) -> tuple[Walk, ...]:
    """The walks worth measuring for a linear layer: shared out, shared out with long rows, and alone."""
    events = max(1, _COMPARED // _segments(geometry))
    narrow, wide = _output_block(geometry, 64), _output_block(geometry, 128)
    return (
        Walk(1, min(64, events), narrow, _splits(geometry, narrow)),
        Walk(1, min(32, events), wide, _splits(geometry, wide)),
        Walk(1, min(128, events), _output_block(geometry, 32)),
    )


class _Strides(NamedTuple):
    """Distances in an output of its images, channels, pixels and splits."""

    image: int
    channel: int
    pixel: int
    split: int = 0


def _launch_add_rows(
    scan: RowScan, packed: Tensor, bias: Tensor | None, y: Tensor, at: _Strides, g: ConvGeometry, walk: Walk
) -> None:
    outputs = g.out_channels // g.groups
    blocks = g.batch * -(-g.out_pixels // walk.pixels) * g.groups * walk.splits * -(-outputs // walk.outputs)
    launch(
        _add_rows,
        (blocks,),
        warps=_WARPS,
        stages=_STAGES,
        constants={
            "GROUPS": g.groups,
            "CHUNKS": chunks_of(g),
            "CHUNK": chunk_channels(g),
            **by_axis({"KERNEL": g.kernel, "STRIDE": g.stride, "DILATION": g.dilation}),
            "SEGMENTS": _segments(g),
            "PIXELS": walk.pixels,
            "EVENTS": walk.events,
            "OUTPUTS": walk.outputs,
            "SPLITS": walk.splits,
            "STAGES": _STAGES,
            "WIDE": is_wide(y) or packed.numel() >= 2**31 or scan.values.numel() >= 2**31 * max(1, g.batch),
        },
        counts_ptr=scan.counts,
        channels_ptr=scan.channels,
        values_ptr=scan.values,
        weight_ptr=packed,
        bias_ptr=bias,
        y_ptr=y,
        y_split=at.split,
        y_n=at.image,
        y_c=at.channel,
        y_p=at.pixel,
        **by_axis({"IN": g.in_size, "PAD": g.padding}),
        OUT_H=g.out_size[1],
        OUT_W=g.out_size[2],
        pixels=g.out_pixels,
        channels=g.group_channels,
        outputs=outputs,
        padded=padded_outputs(outputs),
    )


def _launch_add_splits(partial: Tensor, bias: Tensor | None, y: Tensor) -> None:
    splits, numel = partial.shape
    launch(
        _add_splits,
        (-(-numel // _SUM_BLOCK),),
        warps=_WARPS,
        stages=1,
        constants={"SPLITS": splits, "BLOCK": _SUM_BLOCK},
        partial_ptr=partial,
        bias_ptr=bias,
        y_ptr=y,
        numel=numel,
        outputs=y.shape[-1],
    )


def _segments(geometry: ConvGeometry) -> int:
    """Lists that an output has to walk, rounded up to a power of two."""
    return triton.next_power_of_2(geometry.taps * chunks_of(geometry))


def _output_block(geometry: ConvGeometry, largest: int) -> int:
    """Output channels of a program: a power of two, no more than there are."""
    outputs = max(1, geometry.out_channels // geometry.groups)
    return min(largest, triton.next_power_of_2(padded_outputs(outputs)))


def _splits(geometry: ConvGeometry, outputs: int) -> int:
    """Programs that share a row: enough of them to fill a large GPU, none with next to nothing to do."""
    programs = max(1, geometry.batch * -(-geometry.out_channels // outputs))
    useful = geometry.in_channels // _SPLIT_CHANNELS
    wanted = min(_SPLITS, _PROGRAMS // programs, useful)
    return 1 << max(0, wanted.bit_length() - 1)
