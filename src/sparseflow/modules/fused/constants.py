"""What a block reads from its modules, prepared for the kernels, and when it has to be prepared again."""

from __future__ import annotations

import ctypes
import operator
from typing import Any

import torch
from torch import Tensor, nn

from sparseflow.graph.eligibility import layer_kind
from sparseflow.graph.steps import Block
from sparseflow.kernels.functional import conv_call
from sparseflow.kernels.geometry import ConvGeometry

_SAMPLES = 8


class Watched:
    """Tensors that results depend on, and whether any of them was written to or replaced.

    A write is seen by the version counter, new memory by its address. A write through ``.data`` moves neither: it is
    seen by a piece of the memory of every tensor, and by a sample of the values of one tensor a call; not on a GPU,
    where comparing values would wait for the device.
    """

    def __init__(self, owners: list[tuple[dict[str, Any], str]]):
        self._owners = [owner for owner, _ in owners]
        self._names = [name for _, name in owners]
        self._next = 0
        self.renew()

    def renew(self) -> None:
        """Take what there is now as the state to compare with."""
        self._held = self._held_now()
        self._tensors: list[Tensor] = [tensor for tensor in self._held if tensor is not None]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._versions = _versions(self._tensors)
        self._pieces = list(map(_piece, self._tensors))
        self._bytes = self._read_pieces()
        self._kinds = list(map(_kind, self._held))
        self._samples = [(tensor, _sample(tensor)) for tensor in self._tensors if tensor.device.type == "cpu"]

    def changed(self) -> bool:
        """Whether anything is not what it was."""
        if not all(map(operator.is_, self._held_now(), self._held)):
            return True
        if [tensor.data_ptr() for tensor in self._tensors] != self._addresses:
            return True
        written = _versions(self._tensors) != self._versions or self._read_pieces() != self._bytes
        return written or self._looks_changed()

    def fits(self) -> bool:
        """Whether the tensors of now are of the shapes and types of those seen last."""
        return list(map(_kind, self._held_now())) == self._kinds

    def _held_now(self) -> list[Tensor | None]:
        return list(map(dict.get, self._owners, self._names))  # type: ignore[arg-type]

    def _read_pieces(self) -> list[bytes]:
        return [ctypes.string_at(address, size) for address, size in self._pieces]

    def _looks_changed(self) -> bool:
        if not self._samples:
            return False
        self._next = (self._next + 1) % len(self._samples)
        tensor, sample = self._samples[self._next]
        return not torch.equal(_sample(tensor), sample)


def _kind(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def _piece(tensor: Tensor) -> tuple[int, int]:
    """Address and size of a few bytes in the middle of a tensor, empty where they cannot be read."""
    if tensor.device.type != "cpu" or not tensor.data_ptr():
        return 0, 0
    values = tensor.numel() if tensor.is_contiguous() else 1
    return tensor.data_ptr() + values // 2 * tensor.itemsize, min(_SAMPLES, values - values // 2) * tensor.itemsize


def _versions(tensors: list[Tensor]) -> list[int]:
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # made in inference mode, which counts no writes
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // _SAMPLES)].clone()


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
