"""Stage 1 of the event-driven kernels: the active channels of every input pixel, as short lists on the device.

One launch. A program takes a block of pixels of one image and one chunk of the channels of one group, so that a long
row (a linear layer has a single pixel) is walked by many programs, each with a list of its own: no scan goes over
more than a chunk, and nothing is exchanged between programs.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseflow.kernels.geometry import ConvGeometry, Three

from .launch import launch

_CHUNK = 512
_MAX_CHUNK = 16384  # positions in a list are 16-bit numbers
_CHUNKS = 32
_ELEMENTS = 4096  # of one program: 32 a thread with 4 warps
_SECTOR_PIXELS = 16  # fewer neighbouring pixels would read part of a memory sector where channels are not innermost


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
):
    pid = tl.program_id(0)
    chunk = pid % CHUNKS
    group = (pid // CHUNKS) % GROUPS
    blocks = tl.cdiv(pixels, PIXELS)
    block = (pid // (CHUNKS * GROUPS)) % blocks
    image = (pid // (CHUNKS * GROUPS) // blocks).to(tl.int64)

    pixel = block * PIXELS + tl.arange(0, PIXELS)
    position = tl.arange(0, CHUNK)
    channel = chunk * CHUNK + position
    known = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    corner = x_ptr + image * x_n + (group * channels).to(tl.int64) * x_c
    where = corner + pixel.to(tl.int64)[:, None] * x_p + channel.to(tl.int64)[None, :] * x_c
    value = tl.load(where, mask=known, other=0.0)

    active = value.to(tl.float32) != 0  # true for NaN
    place = tl.cumsum(active.to(tl.int32), axis=1) - 1
    row = ((image * GROUPS + group) * CHUNKS + chunk) * pixels + pixel
    entry = row[:, None] * CHUNK + place
    tl.store(channels_ptr + entry, tl.broadcast_to(position[None, :], (PIXELS, CHUNK)).to(tl.int16), mask=active)
    tl.store(values_ptr + entry, value, mask=active)
    tl.store(counts_ptr + row, tl.sum(active.to(tl.int32), axis=1), mask=pixel < pixels)


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
    if pixel_stride(x) is None:
        x = x.contiguous()
    block = min(triton.next_power_of_2(pixels), max(_SECTOR_PIXELS, _ELEMENTS // chunk))
    launch(
        _scan_rows,
        (geometry.batch * -(-pixels // block) * geometry.groups * chunks,),
        warps=4 if block * chunk <= _ELEMENTS else 8,
        stages=1,
        constants={"GROUPS": geometry.groups, "CHUNKS": chunks, "CHUNK": chunk, "PIXELS": block},
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


def pixel_stride(t: Tensor) -> int | None:
    """Distance of neighbouring pixels of ``t`` ``[N, C, *size]`` in row-major order, ``None`` if it varies.

    >>> x = torch.empty(2, 8, 5, 7)
    >>> pixel_stride(x), pixel_stride(x.to(memory_format=torch.channels_last)), pixel_stride(x[..., :3])
    (1, 8, None)
    """
    spatial = [(size, stride) for size, stride in zip(t.shape[2:], t.stride()[2:], strict=True) if size != 1]
    for (_, outer), (size, inner) in zip(spatial, spatial[1:], strict=False):
        if outer != size * inner:
            return None
    return spatial[-1][1] if spatial else 1


def axes(name: str, sizes: Three) -> dict[str, int]:
    """Kernel arguments ``name_D``, ``name_H`` and ``name_W``.

    >>> axes("PAD", (0, 1, 2))
    {'PAD_D': 0, 'PAD_H': 1, 'PAD_W': 2}
    """
    return {f"{name}_{axis}": size for axis, size in zip("DHW", sizes, strict=True)}
