"""Stage 1 of the event-driven kernels: the active channels of every input pixel, as short lists on the device.

One launch. A program takes a block of pixels of one image and one chunk of the channels of one group, so that a long
row (a linear layer has a single pixel) is walked by many programs, each with a list of its own: no scan goes over
more than a chunk, and nothing is exchanged between programs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseflow.kernels.geometry import ConvGeometry

from .launch import launch
from .prescan import is_wide

_CHUNK = 512
_MAX_CHUNK = 16384  # positions in a list are 16-bit numbers
_CHUNKS = 32
_ELEMENTS = 2048  # of one program
_ELEMENTS_A_WARP = 256  # 8 a thread
_SECTOR = 32  # bytes of neighbouring pixels that memory moves at once, where these are adjacent


@triton.jit
def offset(index, WIDE: tl.constexpr):
    """``index`` as a factor of an offset, in 64 bits where ``WIDE``."""
    if WIDE:
        return index.to(tl.int64)
    else:  # noqa: RET505 - a compiled function must not fall through to a second type
        return index


@triton.jit
def _scan_rows(
    x_ptr,
    counts_ptr,
    channels_ptr,
    values_ptr,
    x_n,
    x_c,
    x_p,
    pixels,
    channels,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    pid = tl.program_id(0)
    chunk = pid % CHUNKS
    group = (pid // CHUNKS) % GROUPS
    blocks = tl.cdiv(pixels, PIXELS)
    block = (pid // (CHUNKS * GROUPS)) % blocks
    image = (pid // (CHUNKS * GROUPS) // blocks).to(tl.int64)

    pixel = tl.arange(0, PIXELS)
    channel = tl.arange(0, CHUNK)
    there = pixel < pixels - block * PIXELS
    corner = (
        x_ptr
        + image * x_n
        + (block * PIXELS).to(tl.int64) * x_p
        + (group * channels + chunk * CHUNK).to(tl.int64) * x_c
    )
    where = offset(pixel, WIDE)[:, None] * x_p + offset(channel, WIDE)[None, :] * x_c
    known = there[:, None] & (channel < channels - chunk * CHUNK)[None, :]
    value = tl.load(corner + where, mask=known, other=0.0)

    active = value.to(tl.float32) != 0  # true for NaN
    first = ((image * GROUPS + group) * CHUNKS + chunk) * pixels + block * PIXELS
    entry = pixel[:, None] * CHUNK + tl.cumsum(active.to(tl.int32), axis=1) - 1
    name = tl.broadcast_to(channel[None, :], (PIXELS, CHUNK)).to(tl.int16)
    tl.store(channels_ptr + first * CHUNK + entry, name, mask=active)
    tl.store(values_ptr + first * CHUNK + entry, value, mask=active)
    tl.store(counts_ptr + first + pixel, tl.sum(active.to(tl.int32), axis=1), mask=there)


@dataclasses.dataclass(frozen=True)
class RowScan:
    """Events of an input, all on its device; nothing here waits for it.

    The lists of an image are ordered by group, chunk of channels, and pixel. Beyond its count a list is uninitialised.

    Attributes:
        numel: elements of the input.
        words: number of lists.
        counts: int32 ``[words]``: events of every list.
        channels: int16 ``[words, chunk]``: channel of every event, relative to the first of its chunk, ascending.
        values: ``[words, chunk]``, dtype of the input: value of every event.
    """

    numel: int
    words: int
    counts: Tensor
    channels: Tensor
    values: Tensor

    def totals(self) -> Tensor:
        """int64 ``[2]``: nonzero elements, and lists that are not empty."""
        return torch.stack([self.counts.sum(dtype=torch.int64), (self.counts > 0).sum(dtype=torch.int64)])


def chunk_channels(geometry: ConvGeometry) -> int:
    """Channels of one list: a power of two, the group where it is small, else such that there are few lists.

    >>> sizes = (1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1), (1, 1, 1)
    >>> [chunk_channels(ConvGeometry(1, channels, 8, 1, *sizes)) for channels in (48, 2048, 25088)]
    [64, 512, 1024]
    """
    whole = triton.next_power_of_2(max(1, geometry.group_channels))
    return min(max(min(whole, _CHUNK), whole // _CHUNKS), _MAX_CHUNK)


def chunks_of(geometry: ConvGeometry) -> int:
    """Lists that one pixel has in one group."""
    return max(1, -(-geometry.group_channels // chunk_channels(geometry)))


def scan_rows(x: Tensor, geometry: ConvGeometry) -> RowScan:
    """List the events of ``x`` ``[N, C, *size]``.

    A layout in which pixels are not evenly spaced is copied first; contiguous, channels-last, and slices of these
    along batch or channels are read as they are.
    """
    chunk, chunks, pixels = chunk_channels(geometry), chunks_of(geometry), geometry.in_pixels
    words = geometry.batch * geometry.groups * chunks * pixels
    counts = torch.empty(words, dtype=torch.int32, device=x.device)
    channels = torch.empty((words, chunk), dtype=torch.int16, device=x.device)
    values = torch.empty((words, chunk), dtype=x.dtype, device=x.device)
    if not evenly_spaced(x):
        x = x.contiguous()
    least = 1 if x.stride(1) == 1 else _SECTOR // x.element_size()
    block = min(triton.next_power_of_2(pixels), max(least, _ELEMENTS // chunk))
    launch(
        _scan_rows,
        (geometry.batch * -(-pixels // block) * geometry.groups * chunks,),
        warps=min(max(block * chunk // _ELEMENTS_A_WARP, 4), 16),
        stages=1,
        constants={"GROUPS": geometry.groups, "CHUNKS": chunks, "CHUNK": chunk, "PIXELS": block, "WIDE": is_wide(x)},
        x_ptr=x,
        counts_ptr=counts,
        channels_ptr=channels,
        values_ptr=values,
        x_n=x.stride(0),
        x_c=x.stride(1),
        x_p=pixel_stride(x),
        pixels=pixels,
        channels=geometry.group_channels,
    )
    return RowScan(math.prod(x.shape), words, counts, channels, values)


def evenly_spaced(t: Tensor) -> bool:
    """Whether neighbouring pixels of ``t`` ``[N, C, *size]``, in row-major order, are all the same distance apart.

    >>> x = torch.empty(2, 8, 5, 7)
    >>> evenly_spaced(x), evenly_spaced(x.to(memory_format=torch.channels_last)), evenly_spaced(x[..., :3])
    (True, True, False)
    """
    return all(outer == size * inner for (_, outer), (size, inner) in itertools.pairwise(_spatial(t)))


def pixel_stride(t: Tensor) -> int:
    """Distance of neighbouring pixels of an evenly spaced ``t`` ``[N, C, *size]``.

    >>> pixel_stride(torch.empty(2, 8, 5, 7).to(memory_format=torch.channels_last))
    8
    """
    return next((stride for _, stride in reversed(_spatial(t))), 1)


def _spatial(t: Tensor) -> list[tuple[int, int]]:
    """Size and stride of the spatial dimensions in which there is a next pixel."""
    return [(size, stride) for size, stride in zip(t.shape[2:], t.stride()[2:], strict=True) if size != 1]


def as_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias as the kernels read it; no copy where it already is."""
    return None if bias is None else bias.detach().to(dtype).contiguous()
