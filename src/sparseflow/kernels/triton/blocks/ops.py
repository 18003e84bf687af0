"""Fused spiking blocks on a GPU: the protocol :class:`~sparseflow.kernels.blocks.records.BlockOps` in Triton."""

from __future__ import annotations

from torch import Tensor

from sparseflow.kernels.blocks.buffers import BufferPool
from sparseflow.kernels.blocks.records import Dynamics, Epilogue, State
from sparseflow.kernels.blocks.spikes import PackedSpikes
from sparseflow.kernels.geometry import ConvGeometry, Three

from ..weights import Packed
from . import bits, layout, pool
from .conv import conv
from .neuron import affine, run_neuron


class TritonBlockOps:
    """The operations of fused blocks for CUDA tensors (CPU tensors under ``TRITON_INTERPRET=1``).

    Nothing waits for the device and nothing branches on its values, so that a captured CUDA graph replays right with
    other spikes. :meth:`pack` therefore does not look at what it packs: the caller warrants zeros and ones.
    """

    name = "triton"
    pool: BufferPool | None = None  # PyTorch's allocator keeps memory too, and knows of streams and CUDA graphs
    pools_sums = False

    def pack_weight(self, weight: Tensor, geometry: ConvGeometry, variant: str) -> Packed:  # noqa: ARG002
        """Looks at the values once, to choose the parts that hold them, and so waits for the device."""
        return layout.pack_weight(weight, geometry)

    def weight_share(self, weight: Tensor, geometry: ConvGeometry) -> float:  # noqa: ARG002
        return 1.0

    def variants(self, geometry: ConvGeometry, steps: int, weight_share: float = 1.0) -> tuple[str, ...]:  # noqa: ARG002
        return layout.variants(geometry, steps)

    def conv(
        self,
        x: PackedSpikes,
        packed: Packed,
        geometry: ConvGeometry,
        variant: str,
        epilogue: Epilogue,
        neuron: Dynamics | None,
        state: State | None,
        steps: int,
    ) -> PackedSpikes | Tensor:
        return conv(x, packed, geometry, variant, epilogue, neuron, state, steps)

    def neuron(
        self,
        currents: Tensor,
        size: Three,
        dims: int,
        epilogue: Epilogue,
        neuron: Dynamics,
        state: State,
        steps: int,
    ) -> PackedSpikes:
        return run_neuron(currents, size, dims, epilogue, neuron, state, steps)

    def affine(self, currents: Tensor, epilogue: Epilogue) -> Tensor:
        return affine(currents, epilogue)

    def pack(self, x: Tensor, lead: int) -> PackedSpikes:
        return bits.pack(x, lead)

    def unpack(self, x: PackedSpikes) -> Tensor:
        return bits.unpack(x)

    def add(self, a: PackedSpikes, b: PackedSpikes) -> PackedSpikes:
        return bits.add(a, b)

    def logical(self, a: PackedSpikes, b: PackedSpikes, op: str) -> PackedSpikes:
        return bits.logical(a, b, op)

    def max_pool(self, x: PackedSpikes, kernel: Three, stride: Three, padding: Three, dilation: Three) -> PackedSpikes:
        return pool.max_pool(x, kernel, stride, padding, dilation)

    def avg_pool(self, x: PackedSpikes, kernel: Three, stride: Three, padding: Three, include_pad: bool) -> Tensor:
        return pool.avg_pool(x, kernel, stride, padding, include_pad)

    def concat(self, parts: tuple[PackedSpikes, ...]) -> PackedSpikes:
        return bits.concat(parts)
