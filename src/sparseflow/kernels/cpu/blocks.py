"""Fused blocks on the native engine: :class:`NativeBlockOps` implements the protocol of ``kernels.blocks``."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import weakref
from typing import Any

import torch
from torch import Tensor

from sparseflow.kernels.blocks.buffers import BufferPool
from sparseflow.kernels.blocks.records import Constant, Dynamics, Epilogue, State, pooled_size
from sparseflow.kernels.blocks.spikes import WORD, PackedSpikes, as_tensor, channels_last, spatial
from sparseflow.kernels.geometry import ConvGeometry, Three
from sparseflow.kernels.weight_blocks import present_share
from sparseflow.neuron import Charge, Reset, ResetTiming

from . import engine
from .chain import NativeChain
from .records import BlockStruct, LinkStruct, NeuronStruct, PoolStruct, Structure, Variant
from .schedule import block_variants, resolve, with_blocks

_CHARGES = {charge: i for i, charge in enumerate(Charge)}
_RESETS = {reset: i for i, reset in enumerate(Reset)}
_TIMINGS = {timing: i for i, timing in enumerate(ResetTiming)}
_LOGICAL = {"and": 0, "and_not": 1, "or": 2}
_UNIT = 16  # channels that the kernels take at a time: constants are padded to a multiple
_NO_NEURON = -1
_MIN_PARALLEL_NEURONS = 1 << 14  # below it, waking other threads costs more than it saves
_native_neurons: weakref.WeakKeyDictionary[Dynamics, _NativeNeuron] = weakref.WeakKeyDictionary()


class NativeBlockOps:
    """The operations of fused blocks on CPU tensors.

    Results come from ``pool``; who knows that a result is no longer read may give its buffers back.
    """

    name = "cpu"
    pools_sums = True

    def __init__(self, pool: BufferPool | None = None):
        self.pool = pool or BufferPool()
        self._blocks: dict[Any, _Block] = {}

    def weight_share(self, weight: Tensor, geometry: ConvGeometry) -> float:
        """Share of the weight's blocks that are not zero, to two decimals."""
        return present_share(weight) if geometry.groups == 1 else 1.0

    def variants(self, geometry: ConvGeometry, steps: int, weight_share: float = 1.0) -> tuple[str, ...]:  # noqa: ARG002
        """Configurations of :meth:`conv`, best guess first; none where spikes of two groups would share a byte."""
        outputs = geometry.out_channels // geometry.groups
        if geometry.groups > 1 and outputs % _UNIT:
            return ()
        if engine.conv_supported(geometry, torch.float32) is not None:
            return ()
        blocks = block_variants(geometry, weight_share)
        return tuple(variant.name for variant in with_blocks(_full_variants(geometry), blocks, weight_share))

    def pack_weight(self, weight: Tensor, geometry: ConvGeometry, variant: str) -> engine.Packed:
        """See :func:`sparseflow.kernels.cpu.engine.pack_weight`."""
        return engine.pack_weight(weight, geometry.groups, _variant(variant))

    def conv(
        self,
        x: PackedSpikes,
        packed: engine.Packed,
        geometry: ConvGeometry,
        variant: str,
        epilogue: Epilogue,
        neuron: Dynamics | None,
        state: State | None,
        steps: int,
    ) -> PackedSpikes | Tensor:
        assert x.row_counts is not None
        nonzero = int(x.nonzero) if x.nonzero is not None else x.numel
        block = self._block(geometry.out_size, geometry.out_channels, x.images, steps, neuron, epilogue.window)
        result = block.fill(epilogue, state, x.dims)
        geometry, numel = _covered(geometry, epilogue.window), x.numel
        fixed = _fixed(variant, geometry, nonzero / numel if numel else 0.0)
        status = engine.library().sf_block_conv(
            engine.conv_struct(geometry, fixed, torch.float32, x_channels_last=True, out_channels_last=True),
            block.pointer,
            x.bits.data_ptr(),
            x.row_counts.data_ptr(),
            None if x.counts is None else x.counts.data_ptr(),
            *engine.addresses(packed),
            engine.threads_for(nonzero * geometry.taps * (geometry.out_channels // geometry.groups) + 4 * block.numel),
        )
        _check(status)
        return result

    def prepare(
        self,
        x: PackedSpikes,
        packed: engine.Packed,
        geometry: ConvGeometry,
        variant: str,
        epilogue: Epilogue,
        neuron: Dynamics | None,
        steps: int,
    ) -> PreparedConv:
        """:meth:`conv` again and again, into a result that lies in the same memory at every call."""
        return PreparedConv(x, packed, geometry, variant, epilogue, neuron, steps)

    def chain(self, size: int) -> NativeChain:
        """Room for so many prepared blocks that run in one call."""
        return NativeChain(size)

    def neuron(
        self,
        currents: Tensor,
        size: tuple[int, int, int],
        dims: int,
        epilogue: Epilogue,
        neuron: Dynamics,
        state: State,
        steps: int,
    ) -> PackedSpikes:
        batch = state.v.shape[0]
        block = self._block(size, currents.shape[-1], steps * batch, steps, neuron, epilogue.window)
        block.struct.invariant = steps > 1 and currents.shape[0] == batch
        result = block.fill(epilogue, state, dims)
        assert isinstance(result, PackedSpikes)
        _check(engine.library().sf_block_dense(block.pointer, currents.data_ptr(), _threads(block.numel)))
        return result

    def affine(self, currents: Tensor, epilogue: Epilogue) -> Tensor:
        images, pixels, channels = currents.shape
        block = self._block((1, 1, pixels), channels, images, 1, None)
        result = block.fill(epilogue, None, 1)
        assert isinstance(result, Tensor)
        _check(engine.library().sf_block_dense(block.pointer, currents.data_ptr(), _threads(block.numel)))
        return result

    def _block(
        self,
        size: Three,
        channels: int,
        images: int,
        steps: int,
        neuron: Dynamics | None,
        window: Three | None = None,
    ) -> _Block:
        """The block's parameters, made once."""
        key = (size, channels, images, steps, neuron, window)
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = _Block(self.pool, *key)
        return block

    def pack(self, x: Tensor, lead: int) -> PackedSpikes | None:
        images, channels, size = math.prod(x.shape[:lead]), x.shape[lead], spatial(tuple(x.shape[lead + 1 :]))
        flat = channels_last(x, lead)
        geometry = _pixels_of(images, channels, size)
        scan = engine.prescan_conv(flat.transpose(1, 2).reshape(images, channels, *size), geometry)
        if not scan.binary:
            return None
        bits, rows = scan.bits[: scan.words], images * size[0] * size[1]
        return PackedSpikes(
            bits.view(images, -1, -(-channels // WORD)),
            tuple(x.shape[:lead]),
            channels,
            size,
            x.dim() - lead - 1,
            row_counts=scan.bits[scan.words :].view(torch.int32)[:rows].view(images, -1),
            nonzero=torch.tensor([scan.nonzero]),
        )

    def unpack(self, x: PackedSpikes) -> Tensor:
        out = self.pool.take((x.images, x.pixels, x.channels), torch.float32)
        counts = x.counts.data_ptr() if x.counts is not None else None
        pixels = x.images * x.pixels
        engine.library().sf_unpack(x.bits.data_ptr(), counts, pixels, x.channels, out.data_ptr(), _threads(x.numel))
        return as_tensor(out, x.shape, len(x.lead))

    def add(self, a: PackedSpikes, b: PackedSpikes) -> PackedSpikes:
        counts = self.pool.take((a.images, a.pixels, a.channels), torch.uint8)
        out = self._like(a, a.channels, counts)
        engine.library().sf_add(
            *(*_pointers(a), *_pointers(b), *_rows(a), a.channels),
            *(out.bits.data_ptr(), counts.data_ptr(), *_count_pointers(out), _threads(a.numel)),
        )
        return out

    def logical(self, a: PackedSpikes, b: PackedSpikes, op: str) -> PackedSpikes:
        out = self._like(a, a.channels)
        rows, row_pixels = _rows(a)
        where = (a.bits.data_ptr(), b.bits.data_ptr(), _LOGICAL[op], rows, row_pixels * a.words, out.bits.data_ptr())
        engine.library().sf_logical(*where, *_count_pointers(out), _threads(a.numel // WORD))
        return out

    def max_pool(self, x: PackedSpikes, kernel: Any, stride: Any, padding: Any, dilation: Any) -> PackedSpikes:
        pool, size = _pool(x.images, x.channels, x.size, kernel, stride, padding, dilation, False)
        bits = self.pool.take((x.images, math.prod(size), x.words), torch.int64)
        out = self._packed(bits, x.lead, x.channels, size, x.dims)
        engine.library().sf_max_pool(
            *(pool, x.bits.data_ptr(), bits.data_ptr(), *_count_pointers(out)),
            _threads(x.numel // WORD * math.prod(kernel)),
        )
        return out

    def avg_pool(self, x: PackedSpikes, kernel: Any, stride: Any, padding: Any, include_pad: bool) -> Tensor:
        pool, size = _pool(x.images, x.channels, x.size, kernel, stride, padding, (1, 1, 1), include_pad)
        out = self.pool.take((x.images, math.prod(size), x.channels), torch.float32)
        bits, counts = _pointers(x)
        engine.library().sf_avg_pool(pool, bits, counts, out.data_ptr(), _threads(x.numel))
        return as_tensor(out, (*x.lead, x.channels, *size[3 - x.dims :]), len(x.lead))

    def concat(self, parts: tuple[PackedSpikes, ...]) -> PackedSpikes:
        first, n = parts[0], len(parts)
        out = self._like(first, sum(part.channels for part in parts))
        bits = (ctypes.c_void_p * n)(*(part.bits.data_ptr() for part in parts))
        channels = (ctypes.c_int64 * n)(*(part.channels for part in parts))
        where = (n, bits, channels, *_rows(first), out.bits.data_ptr(), *_count_pointers(out))
        engine.library().sf_concat(*where, _threads(out.numel // WORD))
        return out

    def _like(self, x: PackedSpikes, channels: int, counts: Tensor | None = None) -> PackedSpikes:
        bits = self.pool.take((x.images, x.pixels, -(-channels // WORD)), torch.int64)
        return self._packed(bits, x.lead, channels, x.size, x.dims, counts)

    def _packed(
        self,
        bits: Tensor,
        lead: tuple[int, ...],
        channels: int,
        size: tuple[int, int, int],
        dims: int,
        counts: Tensor | None = None,
    ) -> PackedSpikes:
        rows = self.pool.take((bits.shape[0], size[0] * size[1]), torch.int32)
        return PackedSpikes(
            bits, lead, channels, size, dims, counts, row_counts=rows, nonzero=self.pool.take((1,), torch.int64)
        )


class _Block:
    """An ``SfBlock`` of which only the pointers change from call to call. ``size`` is that of the sums."""

    def __init__(
        self,
        pool: BufferPool,
        size: Three,
        channels: int,
        images: int,
        steps: int,
        neuron: Dynamics | None,
        window: Three | None,
    ):
        self.numel = images * math.prod(size) * channels
        map_size, size = size, pooled_size(size, window)
        self._pool, self._size, self._channels, self._lead = pool, size, channels, (steps, images // steps)
        pixels = math.prod(size)
        self._bits_shape = (images, pixels, -(-channels // WORD))
        self._rows_shape = (images, size[0] * size[1])
        self._dense_shape = (images, pixels, channels)
        windows = ((ctypes.c_int64 * 3)(*v) for v in (window or (1, 1, 1), map_size))
        self.struct = BlockStruct(steps, images // steps, pixels, size[2], channels, *windows)
        self.pointer = ctypes.byref(self.struct)
        self._epilogue: Epilogue | None = None
        self._neuron = None if neuron is None else _native(neuron, channels)
        if self._neuron is None:
            self.struct.neuron.charge = _NO_NEURON
        else:
            ctypes.pointer(self.struct.neuron)[0] = self._neuron.struct

    def fill(self, epilogue: Epilogue, state: State | None, dims: int) -> PackedSpikes | Tensor:
        """Point to this call's tensors; returns the memory of the result."""
        self._set_epilogue(epilogue)
        struct = self.struct
        if self._neuron is None or state is None:
            out = self._pool.take(self._dense_shape, torch.float32)
            struct.out = out.data_ptr()
            return out
        struct.v, struct.fresh, struct.neuron.start = state.v.data_ptr(), state.fresh, state.start
        struct.syn = None if state.syn is None else state.syn.data_ptr()
        struct.v_seq = None if state.v_seq is None else state.v_seq.data_ptr()
        bits = self._pool.take(self._bits_shape, torch.int64)
        rows = self._pool.take(self._rows_shape, torch.int32)
        nonzero = self._pool.take((1,), torch.int64)
        struct.bits, struct.row_counts, struct.nonzero = bits.data_ptr(), rows.data_ptr(), nonzero.data_ptr()
        return PackedSpikes(bits, self._lead, self._channels, self._size, dims, None, rows, nonzero)

    def _set_epilogue(self, epilogue: Epilogue) -> None:
        struct, residual = self.struct, epilogue.residual
        kept = self._epilogue
        if kept is None or kept.scale is not epilogue.scale or kept.shift is not epilogue.shift:
            self._scale, self._shift = self._padded(epilogue.scale), self._padded(epilogue.shift)
            struct.scale = None if self._scale is None else self._scale.data_ptr()
            struct.shift = None if self._shift is None else self._shift.data_ptr()
        packed = isinstance(residual, PackedSpikes)
        struct.residual_bits, struct.residual_counts = _pointers(residual) if packed else (None, None)
        struct.residual = None if packed or residual is None else residual.data_ptr()
        self._epilogue = epilogue

    def _padded(self, constant: Tensor | None) -> Tensor | None:
        if constant is None or self._channels % _UNIT == 0:
            return constant
        return torch.nn.functional.pad(constant, (0, -self._channels % _UNIT))


class PreparedConv:
    """A block on packed spikes with all that does not change between calls laid out for the engine.

    Between two layers the caches hold weights, not Python's objects: what a call touches is what it costs. The result
    lies in the same memory at every call. Several run in one call as a
    :class:`~sparseflow.kernels.cpu.chain.NativeChain`.
    """

    def __init__(
        self,
        x: PackedSpikes,
        packed: engine.Packed,
        geometry: ConvGeometry,
        variant: str,
        epilogue: Epilogue,
        neuron: Dynamics | None,
        steps: int,
    ):
        channels, window = geometry.out_channels, epilogue.window
        block = _Block(BufferPool(), geometry.out_size, channels, x.images, steps, neuron, window)
        geometry = _covered(geometry, window)
        state = None if neuron is None else State(torch.empty(0))
        result = block.fill(epilogue, state, x.dims)
        self.result = dataclasses.replace(result, kept=True) if isinstance(result, PackedSpikes) else result
        self._struct = block.struct
        self._x: PackedSpikes | None = None
        self._added: PackedSpikes | None = None
        self._kept = (block, packed, neuron, epilogue.scale, epilogue.shift)
        self._convs = (ctypes.c_void_p * 65)()
        self._variant, self._geometry, self._numel = variant, geometry, max(1, x.numel)
        self._structs: dict[int, Any] = {}
        values, index = engine.addresses(packed)
        self.link = LinkStruct(
            convs=ctypes.addressof(self._convs),
            block=ctypes.addressof(block.struct),
            packed=values,
            index=index,
            most=self._numel,
            event_work=geometry.taps * (geometry.out_channels // geometry.groups),
            fixed_work=4 * block.numel,
        )

    def bind(self, x: PackedSpikes, residual: PackedSpikes | Tensor | None) -> None:
        """Point to what this call reads. ``residual`` as an epilogue has it."""
        if x is not self._x:
            self._read(x)
        if isinstance(residual, Tensor):  # must outlive the call, and no more
            self._struct.residual = residual.data_ptr()
        elif residual is not None and residual is not self._added:
            self._struct.residual_bits, self._struct.residual_counts = _pointers(residual)
            self._added = residual

    def start_from(self, state: State | None) -> None:
        """Point to the memory of the neuron, if there is one."""
        if state is not None:
            struct = self._struct
            struct.v, struct.fresh, struct.neuron.start = state.v.data_ptr(), state.fresh, state.start
            struct.syn = None if state.syn is None else state.syn.data_ptr()
            struct.v_seq = None if state.v_seq is None else state.v_seq.data_ptr()

    def _read(self, x: PackedSpikes) -> None:
        assert x.row_counts is not None
        assert x.nonzero is not None
        link = self.link
        link.bits, link.row_counts, link.nonzero = x.bits.data_ptr(), x.row_counts.data_ptr(), x.nonzero.data_ptr()
        link.counts = None if x.counts is None else x.counts.data_ptr()
        self._x = x

    def __call__(
        self, x: PackedSpikes, residual: PackedSpikes | Tensor | None, state: State | None, nonzero: int
    ) -> PackedSpikes | Tensor:
        """Run on ``x``, which has ``nonzero`` spikes."""
        self.bind(x, residual)
        self.start_from(state)
        if not self._convs[nonzero.bit_length()]:
            self._make_conv(nonzero.bit_length())
        engine.run_links(ctypes.byref(self.link), 1)
        return self.result

    def _make_conv(self, bits: int) -> None:
        """The walk over the weights that suits a density; it decides in powers of two."""
        density = min(1.0, 0.75 * 2**bits / self._numel)
        fixed = resolve(_variant(self._variant), self._geometry, torch.float32, density)
        struct = engine.conv_struct(self._geometry, fixed, torch.float32, x_channels_last=True, out_channels_last=True)
        self._structs[bits] = struct
        self._convs[bits] = ctypes.cast(struct, ctypes.c_void_p)


class _NativeNeuron:
    """The constants of a neuron laid out for the kernels; made once."""

    def __init__(self, neuron: Dynamics, channels: int):
        neuron = _without_division(neuron)
        fires_above = neuron.threshold
        if neuron.comparator == ">=":  # v >= threshold where v > the number just below it
            at = torch.as_tensor(fires_above, dtype=torch.float32)
            fires_above = torch.nextafter(at, torch.full_like(at, -math.inf))
        constants = (fires_above, neuron.threshold, neuron.decay, *neuron.input_gains, neuron.synapse_decay)
        self.table = torch.stack([_vector(constant, channels) for constant in constants])
        same_hard = neuron.reset is Reset.HARD and neuron.timing is ResetTiming.SAME_STEP
        rest = neuron.reset_value if same_hard else 0.0
        rules = (_CHARGES[neuron.charge], _RESETS[neuron.reset], _TIMINGS[neuron.timing])
        pointers = [self.table[i].data_ptr() for i in range(len(constants))]
        gains = (ctypes.c_void_p * 3)(*pointers[3:6])
        self.struct = NeuronStruct(*rules, neuron.reset_value, rest, 0.0, *pointers[:3], gains, pointers[6])


def _native(neuron: Dynamics, channels: int) -> _NativeNeuron:
    native = _native_neurons.get(neuron)
    if native is None or native.table.shape[1] < channels:
        native = _native_neurons[neuron] = _NativeNeuron(neuron, channels)
    return native


def _without_division(neuron: Dynamics) -> Dynamics:
    """Dividing by a power of two and multiplying by its inverse round alike, and one of them is slow."""
    rates = {Charge.LEAK_INPUT: Charge.LEAK_INPUT_RATE, Charge.LEAK: Charge.LEAK_RATE}
    decay = neuron.decay
    if neuron.charge not in rates or isinstance(decay, Tensor) or abs(math.frexp(decay)[0]) != 0.5:
        return neuron
    return neuron.replace(charge=rates[neuron.charge], decay=1.0 / decay)


def _vector(constant: Constant, channels: int) -> Tensor:
    padded = -(-channels // _UNIT) * _UNIT
    vector = torch.zeros(padded)
    vector[:channels] = constant if isinstance(constant, Tensor) else float(constant)
    return vector


def _full_variants(geometry: ConvGeometry) -> tuple[Variant, ...]:
    outputs = geometry.out_channels // geometry.groups
    if outputs <= 32:
        return (Variant(Structure.PIXELS, 16 if outputs <= 16 else 32),)
    found = (Variant(Structure.PIXELS, 32), Variant(Structure.PIXELS, 64), Variant(Structure.OUTPUTS, 64))
    return (*_streamed(geometry), *found[::-1]) if geometry.out_pixels == 1 else found


def _streamed(geometry: ConvGeometry) -> tuple[Variant, ...]:
    """Variants of a linear layer that stream whole weight rows, and step the neuron behind: what few rows want."""
    if geometry.groups > 1 or geometry.in_size != (1, 1, 1) or geometry.taps > 1 or any(geometry.padding):
        return ()
    sizes = (geometry.batch, geometry.in_channels, geometry.out_channels)
    return tuple(v for v in engine.linear_variants(*sizes, torch.float32) if v.structure == Structure.ROWS)


@functools.lru_cache(maxsize=256)
def _variant(name: str) -> Variant:
    return Variant.from_name(name)


def _fixed(name: str, geometry: ConvGeometry, density: float) -> Variant:
    """The fixed variant for this density, which is rounded up to a power of two's quarter: it decides in steps."""
    mantissa, exponent = math.frexp(density)
    return _fixed_for(name, geometry, math.ldexp(math.ceil(mantissa * 8) / 8, exponent))


@functools.lru_cache(maxsize=4096)
def _fixed_for(name: str, geometry: ConvGeometry, density: float) -> Variant:
    return resolve(_variant(name), geometry, torch.float32, density)


@functools.lru_cache(maxsize=256)
def _covered(geometry: ConvGeometry, window: Three | None) -> ConvGeometry:
    """The convolution without the rows and columns of its result that no window covers."""
    if window is None:
        return geometry
    d, h, w = (extent // n * n for extent, n in zip(geometry.out_size, window, strict=True))
    return geometry if (d, h, w) == geometry.out_size else dataclasses.replace(geometry, out_size=(d, h, w))


def _check(status: int) -> None:
    if status != 0:
        raise MemoryError("the native engine could not allocate its workspace")


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= _MIN_PARALLEL_NEURONS else 1


def _pointers(x: PackedSpikes) -> tuple[int, int | None]:
    return x.bits.data_ptr(), x.counts.data_ptr() if x.counts is not None else None


def _count_pointers(x: PackedSpikes) -> tuple[int, int]:
    assert x.row_counts is not None
    assert x.nonzero is not None
    return x.row_counts.data_ptr(), x.nonzero.data_ptr()


def _rows(x: PackedSpikes) -> tuple[int, int]:
    """Number of rows of pixels, and pixels of one."""
    return x.images * x.size[0] * x.size[1], x.size[2]


@functools.lru_cache(maxsize=256)
def _pool(
    images: int,
    channels: int,
    size: Three,
    kernel: Three,
    stride: Three,
    padding: Three,
    dilation: Three,
    include_pad: bool,
) -> tuple[Any, Three]:
    """Reference to the ``SfPool`` of a pooling, and the size of its output; made once."""
    three = ctypes.c_int64 * 3
    sizes = zip(size, kernel, stride, padding, dilation, strict=True)
    d, h, w = ((extent + 2 * p - n * (k - 1) - 1) // s + 1 for extent, k, s, p, n in sizes)
    arguments = (three(*v) for v in (size, (d, h, w), kernel, stride, padding, dilation))
    return ctypes.byref(PoolStruct(images, channels, *arguments, include_pad)), (d, h, w)


def _pixels_of(images: int, channels: int, size: tuple[int, int, int]) -> ConvGeometry:
    """The geometry of a 1x1 convolution: what the prescan wants to know of a tensor."""
    return ConvGeometry.from_call((images, channels, *size), (1, channels, 1, 1, 1), (1,) * 3, (0,) * 3, (1,) * 3, 1)
