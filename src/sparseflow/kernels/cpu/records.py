"""Records of the native CPU engine: its parameter structures and the variants of a kernel."""

from __future__ import annotations

import ctypes
import dataclasses
import re

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
WORD = 64  # channels whose events share one machine word


class ConvStruct(ctypes.Structure):
    """``SfConv`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "in_channels", "out_channels", "groups")),
        *((name, ctypes.c_int64 * 3) for name in ("in_size", "kernel", "stride", "padding", "dilation", "out_size")),
        *((name, ctypes.c_int64) for name in ("block", "width", "slab", "tile")),
        *((name, ctypes.c_int32) for name in ("type", "x_channels_last", "out_channels_last", "split_outputs")),
    ]


class ScanStruct(ctypes.Structure):
    """``SfScan`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels", "pixels", "row_pixels")),
        *((name, ctypes.c_int32) for name in ("type", "channels_last")),
    ]


class NeuronStruct(ctypes.Structure):
    """``SfNeuron`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("charge", "reset", "timing")),
        *((name, ctypes.c_float) for name in ("reset_value", "rest", "start")),
        *((name, ctypes.c_void_p) for name in ("fires_above", "threshold", "decay")),
        ("gains", ctypes.c_void_p * 3),
        ("synapse_decay", ctypes.c_void_p),
    ]


class BlockStruct(ctypes.Structure):
    """``SfBlock`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("steps", "batch", "pixels", "row_pixels", "channels")),
        *((name, ctypes.c_int64 * 3) for name in ("window", "map")),
        *((name, ctypes.c_void_p) for name in ("scale", "shift", "residual", "residual_bits", "residual_counts")),
        ("neuron", NeuronStruct),
        *((name, ctypes.c_void_p) for name in ("v", "syn", "v_seq", "bits", "row_counts", "nonzero", "out")),
        *((name, ctypes.c_int32) for name in ("fresh", "invariant")),
    ]


class LinkStruct(ctypes.Structure):
    """``SfLink`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("convs", "block", "bits", "row_counts", "counts", "packed", "index")),
        ("nonzero", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("most", "event_work", "fixed_work", "seen")),
    ]


class WatchedStruct(ctypes.Structure):
    """``SfWatched`` of abi.h."""

    PIECE, SAMPLES = 32, 8
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bytes", "at", "size")),
        ("piece", ctypes.c_char * PIECE),
        ("samples", ctypes.c_char * (4 * SAMPLES)),
    ]


class PoolStruct(ctypes.Structure):
    """``SfPool`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("images", "channels")),
        *((name, ctypes.c_int64 * 3) for name in ("in_size", "out_size", "kernel", "stride", "padding", "dilation")),
        ("include_pad", ctypes.c_int32),
    ]


class LinearStruct(ctypes.Structure):
    """``SfLinear`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "in_features", "out_features", "block", "slab")),
        ("type", ctypes.c_int32),
    ]


class Structure:
    """How a kernel is organised; see :class:`Variant`."""

    PIXELS = "pixels"
    OUTPUTS = "outputs"
    DEPTHWISE = "depthwise"
    ROWS = "rows"
    BLOCKS = "blocks"
    BLOCK_ROWS = "blockrows"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run a layer. ``block`` decides how weights are packed, the rest how they are walked.

    ``structure``: threads share the output ``pixels`` or the ``outputs`` (channels); ``depthwise``; or, for linear
    layers, whole weight ``rows`` are streamed; ``blocks``: of a weight with zero blocks only the others are kept, and
    met with the events block by block; ``blockrows``: for linear layers, what is left of whole rows is streamed.
    ``block``: output channels side by side in a packed row. ``width``:
    output channels per walk over the events, 0 to choose by density at every call (then ``slab`` and ``tile`` are
    chosen too). ``slab``: (kernel row, 64-channel word) pairs per walk, 0 for all. ``tile``: output pixels per tile.
    """

    structure: str
    block: int
    width: int = 0
    slab: int = 0
    tile: int = 0

    @property
    def name(self) -> str:
        """Stable text form; :meth:`from_name` reads it back.

        >>> Variant.from_name("pixels-b32-w0-s0-t0").block
        32
        """
        return f"{self.structure}-b{self.block}-w{self.width}-s{self.slab}-t{self.tile}"

    @classmethod
    def from_name(cls, name: str) -> Variant:
        """The variant called ``name``. Raises ``ValueError`` if it is no variant's name."""
        match = re.fullmatch(r"(depthwise|pixels|outputs|rows|blocks|blockrows)-b(\d+)-w(\d+)-s(\d+)-t(\d+)", name)
        if match is None:
            raise ValueError(f"not a kernel variant: {name!r}")
        block, width, slab, tile = (int(number) for number in match.groups()[1:])
        return cls(match.group(1), block, width, slab, tile)
