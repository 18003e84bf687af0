"""What a block reads from its modules, prepared for the kernels, and when it has to be prepared again."""

from __future__ import annotations

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

    A write is seen by the version counter. One through ``.data`` moves none: it is seen by a sample of the values.
    """

    def __init__(self, owners: list[tuple[dict[str, Any], str]]):
        self._owners = [(owner, name) for owner, name in owners if owner.get(name) is not None]
        self._next = 0
        self.renew()

    def renew(self) -> None:
        """Take what there is now as the state to compare with."""
        self._seen = [_token(owner[name]) for owner, name in self._owners]
        self._samples = [_sample(owner[name]) for owner, name in self._owners]

    def changed(self) -> bool:
        """Whether a tensor was replaced or written to, as far as its version says."""
        for (owner, name), seen in zip(self._owners, self._seen, strict=True):
            tensor = owner.get(name)
            if tensor is None or _token(tensor) != seen:
                return True
        return False

    def looks_changed(self) -> bool:
        """Compare a sample of one tensor, the next one at every call."""
        if not self._owners:
            return False
        self._next = (self._next + 1) % len(self._owners)
        owner, name = self._owners[self._next]
        return not torch.equal(_sample(owner[name]), self._samples[self._next])


def _token(tensor: Tensor) -> tuple[Any, int, int]:
    # A bound method equals another of the same object; tensors would compare their elements.
    return tensor.data_ptr, tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
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
        found += [(norm._buffers, "running_mean"), (norm._buffers, "running_var")]  # type: ignore[list-item]
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
