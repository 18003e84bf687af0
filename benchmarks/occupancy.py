"""How much of a dense convolution each way of skipping leaves over, on the spikes of real nets. Counts, no times.

    python -m benchmarks.occupancy [--out benchmarks/results/occupancy.json]

For every spike-fed 3x3 convolution: the share of (tile, channel) products that remain when single silent channels are
skipped per tile of 16, 8 or 4 pixels; when groups of 16 channels are skipped; when these groups are formed in the order
of the channels' activity on calibration data; and when channels that were silent on all calibration data are cut out.
Shares are weighted by the layers' multiplications. The digits net is trained, its calibration data are training images;
the ResNet-18 is a stand-in with random weights and calibrated batch norm.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from sparseflow.bench.suites import nets
from sparseflow.env import environment
from sparseflow.kernels.geometry import ConvGeometry
from sparseflow.kernels.triton.tiles import Tiling

_SIDES = (16, 8, 4)
_GROUP = 16
_IMAGES = 32

Inputs = dict[str, Tensor]


def spikes(net: nn.Module, x: Tensor) -> tuple[Inputs, dict[str, nn.Conv2d]]:
    """Inputs ``[T*N, C, H, W]`` of every 3x3 convolution that zeros reach, as masks of what is not zero."""
    found: Inputs = {}
    layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)}

    def recorder(name: str) -> Callable[..., None]:
        def record(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = (args[0] != 0).flatten(0, -4)

        return record

    handles = [layer.register_forward_pre_hook(recorder(name)) for name, layer in layers.items()]
    functional.reset_net(net)
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return {name: mask for name, mask in found.items() if mask.float().mean() < 0.9}, layers


def tile_activity(mask: Tensor, layer: nn.Conv2d, side: int) -> Tensor:
    """``[T*N * tiles, C]``: which channels have a spike in the tile's halo."""
    arguments = layer.stride, layer.padding, layer.dilation, layer.groups
    tiling = Tiling.of_side(ConvGeometry.from_call(mask.shape, layer.weight.shape, *arguments), side)
    (_, height, width), (_, tile_h, tile_w) = tiling.halo, tiling.tile
    step = tile_h * layer.stride[0], tile_w * layer.stride[1]
    pad_h, pad_w = layer.padding
    padded = F.pad(mask.float(), (pad_w, width + step[1], pad_h, height + step[0]))
    pooled = F.max_pool2d(padded, (height, width), step)[..., : tiling.grid[1], : tiling.grid[2]]
    return pooled.movedim(1, -1).flatten(0, -2) > 0


def grouped(active: Tensor, order: Tensor) -> Tensor:
    """Share of groups of 16 channels, taken in ``order``, with an active channel, tile by tile."""
    sorted_ = F.pad(active[:, order], (0, -active.shape[1] % _GROUP))
    return sorted_.unflatten(1, (-1, _GROUP)).any(2).float().mean()


def shares(test: Inputs, calibration: Inputs, layers: dict[str, nn.Conv2d]) -> dict[str, float]:
    """What is left of the dense products, weighted over the layers; and densities."""
    total: collections.Counter[str] = collections.Counter()
    work = 0.0
    for name, mask in test.items():
        layer, rates = layers[name], calibration[name].float().mean((0, 2, 3))
        weight = layer.weight.numel() * mask[:, 0].numel() / layer.stride[0] ** 2
        active = tile_activity(mask, layer, 8)
        natural = torch.arange(len(rates))
        dead = rates == 0
        row = {f"channels, {side}x{side}": tile_activity(mask, layer, side).float().mean() for side in _SIDES}
        row |= {
            f"groups of {_GROUP}, 8x8": grouped(active, natural),
            f"groups of {_GROUP} by activity, 8x8": grouped(active, rates.argsort()),
            "channels not dead in calibration": 1 - dead.float().mean(),
            "dead in calibration, active in test": (mask.any(-1).any(-1).any(0) & dead).float().mean(),
            "density": mask.float().mean(),
        }
        work += weight
        total.update({key: float(value) * weight for key, value in row.items()})
    return {key: value / work for key, value in total.items()}


def digits() -> dict[str, float]:
    """The trained net, calibrated on training images and judged on test images."""
    net = nets.from_checkout("digits.net").load_checkpoint()
    train, test = nets.from_checkout("digits.data").load_split()
    seen, layers = spikes(net, nets.encode(test.images[:_IMAGES]))
    return shares(seen, spikes(net, nets.encode(train.images[:_IMAGES]))[0], layers)


def stand_in(side: int) -> dict[str, float]:
    """SpikingJelly's spiking ResNet-18, calibrated on some images and judged on others."""
    workload = nets.stand_in("resnet18", nets.RESNET18, nets.LIF_DENSITY, 4, side)
    net = workload.build()
    seen, layers = spikes(net, workload.inputs[1])
    return shares(seen, spikes(net, workload.inputs[0])[0], layers)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/occupancy.json"))
    options = parser.parse_args()
    rows = {"digits resnet18 @32, trained": digits()}
    rows[f"spiking_resnet18 @160, {nets.activity()}"] = stand_in(160)
    for name, row in rows.items():
        print(name, *(f"  {key}: {value:.3f}" for key, value in row.items()), sep="\n")
    options.out.write_text(json.dumps({"schema": 1, "environment": environment(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
