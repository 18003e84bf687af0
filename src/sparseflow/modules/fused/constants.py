"""What a block reads from its modules, prepared for the kernels, and when it has to be prepared again."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, nn

from sparseflow.graph.eligibility import layer_kind
from sparseflow.graph.steps import Block
from sparseflow.kernels.cpu import engine
from sparseflow.kernels.cpu.watch import MemoryWatch
from sparseflow.kernels.functional import conv_call
from sparseflow.kernels.geometry import ConvGeometry


class Watched:
    """Tensors that results depend on, and whether any of them was written to or replaced.

    A write is seen by the version counter, new memory by its address, and on the CPU a write through ``.data``, which
    moves neither, by the values (:class:`~sparseflow.kernels.cpu.watch.MemoryWatch`), for comparing values on a GPU
    would wait for it.
    """

    def __init__(self, owners: list[tuple[dict[str, Any], str]]):
        self._owners = [owner for owner, _ in owners]
        self._names = [name for _, name in owners]
        self.renew()

    def renew(self) -> None:
        """Take what there is now as the state to compare with."""
        self._held = self._held_now()
        self._tensors: list[Tensor] = [tensor for tensor in self._held if tensor is not None]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._versions = _versions(self._tensors)
        self._memory = MemoryWatch(self._tensors) if engine.available() else None
        self._kinds = list(map(_kind, self._held))

    def changed(self) -> bool:
        """Whether anything is not what it was."""
        if not all(map(operator.is_, self._held_now(), self._held)):
            return True
        if [tensor.data_ptr() for tensor in self._tensors] != self._addresses:
            return True
        return _versions(self._tensors) != self._versions or not (self._memory is None or self._memory.holds())

    def fits(self) -> bool:
        """Whether the tensors of now are of the shapes and types of those seen last."""
        return list(map(_kind, self._held_now())) == self._kinds

    def _held_now(self) -> list[Tensor | None]:
        return list(map(dict.get, self._owners, self._names))  # type: ignore[arg-type]


def _kind(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def _versions(tensors: list[Tensor]) -> list[int]:
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # made in inference mode, which counts no writes
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def owners(block: Block, modules: dict[str, nn.Module]) -> list[tuple[dict[str, Any], str]]:
    """Where the tensors of a block's layer and norm live: ``(parameters or buffers, name)``."""
    found: list[tuple[dict[str, Any], str]] = []
    if block.layer is not None:
        parameters: Any = modules[block.layer]._parameters
        found += [(parameters, "weight"), (parameters, "bias")]
    if block.norm is not None:
        norm = modules[block.norm]
        found += [(norm._parameters, "weight"), (norm._parameters, "bias")]  # type: ignore[list-item]
        # Training moves the statistics without counting a write, but counts its batches.
        buffers: Any = norm._buffers
        found += [(buffers, "running_mean"), (buffers, "running_var"), (buffers, "num_batches_tracked")]
    return found


def scale_and_shift(layer: Any, norm: Any) -> tuple[Tensor | None, Tensor | None]:
    """``(scale, shift)`` of float32 ``[channels]`` by which bias and batch norm act on a layer's sums.

    ``norm(sums + bias) = sums * w / sqrt(var + eps) + (bias - mean) * w / sqrt(var + eps) + b``, in float64.

    >>> norm = nn.BatchNorm1d(2).eval()
    >>> scale, shift = scale_and_shift(None, norm)
    >>> shift.tolist()
    [0.0, 0.0]
    """
    bias = None if layer is None or layer.bias is None else layer.bias.detach()
    if norm is None:
        return None, None if bias is None else bias.float().contiguous()
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    if bias is not None:
        shift = shift + bias.double() * scale
    return scale.float().contiguous(), shift.float().contiguous()


def geometry_of(block: Block, layer: Any) -> ConvGeometry:
    """The layer of a block on packed spikes as a convolution.

    A linear layer on flattened maps is a convolution whose kernel covers the whole map.
    """
    source = block.source.packed
    assert source is not None
    images = source.images
    if layer_kind(layer) == "linear":
        shape = (layer.out_features, source.channels, *source.pixels)
        return ConvGeometry.from_call((images, source.channels, *source.pixels), shape, (1,) * 3, (0,) * 3, (1,) * 3, 1)
    rank = layer.weight.dim() - 2
    call = conv_call(rank, layer.weight, layer.stride, layer.padding, layer.dilation, layer.groups)
    x_shape = (images, source.channels, *source.size)
    return ConvGeometry.from_call(
        x_shape, tuple(layer.weight.shape), call.stride, call.padding, call.dilation, call.groups
    )


def kernel_weight(layer: Any, geometry: ConvGeometry) -> Tensor:
    """The layer's weight ``[O, C / groups, D, H, W]``."""
    return layer.weight.detach().reshape(geometry.out_channels, geometry.group_channels, *geometry.kernel)
