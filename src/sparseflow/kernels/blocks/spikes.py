"""Bit-packed spikes: how they lie in memory between fused blocks."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

WORD = 64  # channels of one pixel that share a machine word
MAX_COUNT = 255


@dataclasses.dataclass(frozen=True)
class PackedSpikes:
    """A spike tensor ``[*lead, channels, *size]`` as one bit per value, channels of a pixel side by side.

    Attributes:
        bits: int64 ``[images, pixels, words]``, contiguous; bit ``c % 64`` of word ``c // 64`` is channel ``c``. Bits
            past the last channel are zero.
        lead: leading sizes, e.g. ``(T, N)``; their product is the number of images. Images of one time step lie
            together: image ``t * N + n``.
        channels: number of channels (features of a linear layer).
        size: spatial sizes ``(D, H, W)``, with ones in front where there are fewer; ``dims`` says how many are real.
        dims: number of spatial dimensions, 0 for the input of a linear layer.
        counts: uint8 ``[images, pixels, channels]`` where values above 1 occur (sums of spikes); their nonzeros are
            what ``bits`` says. ``None`` for {0, 1}.
        row_counts: int32 ``[images, D * H]``: nonzeros of every row of pixels, which is all that the next layer's first
            stage has to know on the CPU. ``None`` on a GPU, whose kernels look at the words of a tile themselves.
        nonzero: int64 ``[1]``, on the device of ``bits``: number of nonzeros, for the choice between sparse and dense.
        kept: whether somebody writes into these very tensors at every call, so that they never go back to a pool.
    """

    bits: Tensor
    lead: tuple[int, ...]
    channels: int
    size: tuple[int, int, int]
    dims: int
    counts: Tensor | None = None
    row_counts: Tensor | None = None
    nonzero: Tensor | None = None
    kept: bool = False

    @property
    def images(self) -> int:
        """Product of the leading sizes."""
        return math.prod(self.lead)

    @property
    def pixels(self) -> int:
        """Pixels of one image; 1 for a linear layer's features."""
        return math.prod(self.size)

    @property
    def words(self) -> int:
        """Words of one pixel."""
        return -(-self.channels // WORD)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense tensor it stands for."""
        return (*self.lead, self.channels, *self.size[3 - self.dims :])

    @property
    def numel(self) -> int:
        """Number of values."""
        return self.images * self.pixels * self.channels


def spatial(sizes: tuple[int, ...]) -> tuple[int, int, int]:
    """Three spatial sizes from at most three.

    >>> spatial((7, 5)), spatial(())
    ((1, 7, 5), (1, 1, 1))
    """
    padded = (*[1] * (3 - len(sizes)), *sizes)
    return padded[0], padded[1], padded[2]


def channels_last(x: Tensor, lead: int) -> Tensor:
    """``x [*lead, C, *size]`` as a contiguous ``[images, pixels, C]``; a view where it lies in memory like that."""
    images = math.prod(x.shape[:lead])
    return x.reshape(images, x.shape[lead], -1).transpose(1, 2).contiguous()


def as_tensor(flat: Tensor, shape: tuple[int, ...], lead: int) -> Tensor:
    """The view ``[*lead, C, *size]`` of a contiguous ``[images, pixels, C]``: channels last in memory."""
    last = flat.view(*shape[:lead], *shape[lead + 1 :], shape[lead])
    return last.movedim(-1, lead)


def pack(x: Tensor, lead: int) -> PackedSpikes:
    """Pack a dense tensor ``[*lead, C, *size]`` of whole numbers in 0..255; ``lead`` says how many sizes lead.

    Plain PyTorch, for tests and as the meaning of the layout.

    Raises:
        ValueError: a value is not a whole number in 0..255.

    >>> packed = pack(torch.tensor([[[0., 1.], [2., 0.]]]), lead=1)  # one image, two channels, two pixels
    >>> packed.bits.flatten().tolist(), packed.shape
    ([2, 1], (1, 2, 2))
    """
    values = channels_last(x, lead)
    counts = values.to(torch.uint8)
    if not torch.equal(counts.to(values.dtype), values):
        raise ValueError("packed spikes are whole numbers in 0..255")
    size = spatial(tuple(x.shape[lead + 1 :]))
    events = torch.nn.functional.pad(counts != 0, (0, -counts.shape[-1] % WORD)).unflatten(-1, (-1, WORD))
    places = torch.arange(WORD, device=x.device)
    bits = (events.long() << places).sum(-1).contiguous()
    rows = (counts != 0).view(counts.shape[0], size[0] * size[1], -1).sum(-1, dtype=torch.int32)
    return PackedSpikes(
        bits,
        tuple(x.shape[:lead]),
        x.shape[lead],
        size,
        x.dim() - lead - 1,
        counts=counts.contiguous() if bool((counts > 1).any()) else None,
        row_counts=rows,
        nonzero=(counts != 0).sum().view(1),
    )


def unpack(spikes: PackedSpikes, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense tensor ``[*lead, C, *size]`` (channels last in memory); plain PyTorch, as :func:`pack`.

    >>> x = torch.tensor([[[0., 1.], [3., 0.]]])
    >>> torch.equal(unpack(pack(x, 1)), x)
    True
    """
    if spikes.counts is not None:
        flat = spikes.counts.to(dtype)
    else:
        places = torch.arange(WORD, device=spikes.bits.device)
        events = (spikes.bits.view(spikes.images, spikes.pixels, spikes.words, 1) >> places) & 1
        flat = events.flatten(2)[..., : spikes.channels].to(dtype)
    return as_tensor(flat.contiguous(), spikes.shape, len(spikes.lead))
