"""What the operations of a fused block take, and the protocol that every backend implements."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor

from sparseflow.kernels.geometry import ConvGeometry, Three
from sparseflow.neuron import Charge, NeuronSpec, Reset, ResetTiming

from .buffers import BufferPool
from .spikes import PackedSpikes

Constant = float | Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Dynamics:
    """A neuron's update rule with its constants as kernels read them: numbers, or float32 ``[channels]`` tensors.

    The formulas are those of :class:`~sparseflow.neuron.Charge`, :class:`~sparseflow.neuron.Reset` and
    :class:`~sparseflow.neuron.ResetTiming`; every operation is rounded to float32 on its own, none is fused.
    """

    charge: Charge
    comparator: str
    reset: Reset
    timing: ResetTiming
    reset_value: float
    threshold: Constant
    decay: Constant = 1.0
    input_gains: tuple[Constant, Constant, Constant] = (1.0, 1.0, 1.0)
    synapse_decay: Constant = 1.0

    @property
    def synaptic(self) -> bool:
        """Whether there is a synaptic current beside the membrane."""
        return self.charge is Charge.SYNAPTIC

    def replace(self, **changes: Any) -> Dynamics:
        """The same dynamics with other constants or another rule."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def of(cls, spec: NeuronSpec, channels: int) -> Dynamics | None:
        """The dynamics of a described neuron with ``channels`` channels; ``None`` where a constant does not fit them.

        >>> Dynamics.of(NeuronSpec(charge=Charge.LEAK_INPUT, decay=2.0), 8).decay
        2.0
        """
        if spec.charge is None:
            return None
        raw = (spec.threshold, spec.decay, *spec.input_gains, spec.synapse_decay)
        constants = [_constant(value, channels) for value in raw]
        if None in [c if not isinstance(c, Tensor) else 0.0 for c in constants]:
            return None
        threshold, decay, g1, g2, g3, synapse_decay = constants
        return cls(
            spec.charge,
            spec.comparator,
            spec.reset,
            spec.reset_timing,
            float(spec.reset_value),
            threshold,  # type: ignore[arg-type]
            decay,  # type: ignore[arg-type]
            (g1, g2, g3),  # type: ignore[arg-type]
            synapse_decay,  # type: ignore[arg-type]
        )


def _constant(value: Constant, channels: int) -> Constant | None:
    """A number, or one number a channel; ``None`` for any other shape."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.numel() == 1:
        return float(value)
    if value.numel() == channels and value.shape[:1] == (channels,) and value.dtype is torch.float32:
        return value.detach().reshape(channels).contiguous()
    return None


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What is done to a layer's sums before the neuron: ``x = sums * scale + shift + residual``, then max pooling.

    ``scale`` and ``shift`` are float32 ``[channels]`` (a folded batch norm, or ones and a bias); ``None`` leaves the
    step out. ``residual`` is float32 ``[images, pixels, channels]`` (contiguous) or packed spikes of the same images.
    ``window`` (D, H, W): the neuron gets the maximum over windows that lie side by side, in floor mode; NaN wins.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | PackedSpikes | None = None
    window: Three | None = None

    @property
    def before_pooling(self) -> Epilogue:
        """The same without the pooling."""
        return self if self.window is None else dataclasses.replace(self, window=None)


def pooled_size(size: Three, window: Three | None) -> Three:
    """``(D, H, W)`` of what max pooling in windows side by side leaves of maps of ``size``; floor mode.

    >>> pooled_size((1, 7, 8), (1, 2, 2))
    (1, 3, 4)
    """
    d, h, w = size if window is None else (extent // n for extent, n in zip(size, window, strict=True))
    return d, h, w


@dataclasses.dataclass
class State:
    """Memory of one neuron layer, float32 ``[N, pixels, channels]`` contiguous, overwritten with what it ends in.

    ``fresh``: the tensors are not read; the neuron starts from ``start`` everywhere and a synaptic current of 0.
    ``v_seq``, if given, is float32 ``[T, N, pixels, channels]`` and gets the membrane at the end of every step.
    """

    v: Tensor
    syn: Tensor | None = None
    fresh: bool = True
    start: float = 0.0
    v_seq: Tensor | None = None


class BlockOps(Protocol):
    """The operations of fused blocks on one device; :mod:`.reference` says what each computes.

    ``steps`` is T: ``images = steps * N`` and the neuron runs over the T groups of N images in order. ``pool`` is where
    packed results come from, and where they go back to when nobody reads them any more; ``None`` leaves both to
    PyTorch's allocator.
    """

    name: str
    pools_sums: bool
    """Whether :meth:`conv` and :meth:`neuron` take an epilogue with a ``window``."""

    @property
    def pool(self) -> BufferPool | None: ...

    def pack_weight(self, weight: Tensor, geometry: ConvGeometry, variant: str) -> Any:
        """``weight [O, C / groups, *kernel]`` float32 as the kernels of ``variant`` read it."""
        ...

    def weight_share(self, weight: Tensor, geometry: ConvGeometry) -> float:
        """Share of blocks of ``weight [O, C / groups, D, H, W]`` that are not zero; 1 where zero blocks do not matter.

        Times belong to it.
        """
        ...

    def variants(self, geometry: ConvGeometry, steps: int, weight_share: float = 1.0) -> tuple[str, ...]:
        """Configurations of :meth:`conv` worth measuring, best guess first; empty where it is not supported."""
        ...

    def conv(
        self,
        x: PackedSpikes,
        packed: Any,
        geometry: ConvGeometry,
        variant: str,
        epilogue: Epilogue,
        neuron: Dynamics | None,
        state: State | None,
        steps: int,
    ) -> PackedSpikes | Tensor:
        """Convolution of spikes (a linear layer has a 1x1x1 kernel), epilogue, neuron over T.

        ``geometry.batch`` is the number of images, ``geometry.out_size`` that of the sums before any pooling. Without a
        neuron, which goes without pooling: the float32 sums ``[images, pixels, channels]``.
        """
        ...

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
        """Epilogue and neuron on dense sums ``[images or N, pixels, channels]`` (N: the same at every step).

        ``size`` (D, H, W) and ``dims`` are those of the sums.
        """
        ...

    def affine(self, currents: Tensor, epilogue: Epilogue) -> Tensor:
        """The epilogue alone on dense sums ``[images, pixels, channels]``; may overwrite ``currents``."""
        ...

    def pack(self, x: Tensor, lead: int) -> PackedSpikes | None:
        """Pack a dense spike tensor ``[*lead, C, *size]``; ``None`` if a value is neither 0 nor 1."""
        ...

    def unpack(self, x: PackedSpikes) -> Tensor:
        """The dense float32 tensor, channels last in memory."""
        ...

    def add(self, a: PackedSpikes, b: PackedSpikes) -> PackedSpikes:
        """Sum of spikes (SEW ADD), at most 255."""
        ...

    def logical(self, a: PackedSpikes, b: PackedSpikes, op: str) -> PackedSpikes:
        """``"and"`` (a * b), ``"and_not"`` (a * (1 - b)) or ``"or"`` (max(a, b)) of {0, 1} spikes."""
        ...

    def max_pool(self, x: PackedSpikes, kernel: Any, stride: Any, padding: Any, dilation: Any) -> PackedSpikes:
        """Max pooling of {0, 1} spikes: the or over the window. Arguments are (D, H, W) triples; floor mode."""
        ...

    def avg_pool(self, x: PackedSpikes, kernel: Any, stride: Any, padding: Any, include_pad: bool) -> Tensor:
        """Average pooling: dense float32, channels last in memory. Arguments are (D, H, W) triples; floor mode."""
        ...

    def concat(self, parts: tuple[PackedSpikes, ...]) -> PackedSpikes:
        """Concatenation of channels."""
        ...
