"""The two headline layers of the public SparseFlow repository (hpcyhr/SparseFlow): its way, and the honest way.

Its headlines were 13x on ResNet's layer1.0.conv2 at 98.5 % sparsity and 72x on layer2.1.conv2 at 100 %, over eager
cuDNN. What was timed was a box filter without weights over the tiles that have a spike, with the prescan that finds
them left out, into an output whose other tiles were never written. The same is done here in PyTorch, over the eager
layer: its ratio is no speedup of a layer, which is why it is tagged as approximate and dishonest. Beside it, on the
same spikes: its tiles with weights, the prescan inside the timer and every output written; and our sparse layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseflow.bench.compare import alternate, quantiles
from sparseflow.bench.records import Gate, Metric, Point, Quantiles, Scope
from sparseflow.dispatch.measure import sweep_caches
from sparseflow.dispatch.spikes import clustered_spikes

from . import Case, Options, Row, layers
from .shapes import SHAPES

SUITE = "predecessor"
HEADLINES = (("layer1.0.conv2", "3x3 64@56", 0.015, 16), ("layer2.1.conv2", "3x3 128@28", 0.0, 8))
BOX, TILES, SPARSE = "its way: box filter, no weights, no prescan", "its tiles, with weights and prescan", "sparse"
_HALO = 1
_INPUTS = 4
_BOX_GATE = Gate(True, "the tiles it writes are those of a box filter; it has no weights, so it is not the layer")


@dataclasses.dataclass
class Tiles:
    """The tiles of an image batch ``[N, C, H, W]`` with sides of ``side`` pixels, as the predecessor cuts it."""

    side: int

    def cut(self, x: Tensor) -> Tensor:
        """``[N, rows, columns, C, side + 2, side + 2]``: every tile with its halo; a view of the padded images."""
        last = [-size % self.side + _HALO for size in x.shape[:1:-1]]
        padded = F.pad(x, (_HALO, last[0], _HALO, last[1]))
        reach = self.side + 2 * _HALO
        return padded.unfold(2, reach, self.side).unfold(3, reach, self.side).permute(0, 2, 3, 1, 4, 5)

    def active(self, x: Tensor) -> Tensor:
        """``[tiles, 3]``: image, row and column of every tile with a spike in it or its halo: the prescan."""
        return self.cut(x).flatten(3).any(3).nonzero()

    def write(self, out: Tensor, active: Tensor, values: Tensor) -> Tensor:
        """``out [N, K, H, W]`` with ``values [tiles, K or 1, side, side]`` in the active tiles."""
        for (image, row, column), value in zip((active * self._scale()).tolist(), values, strict=True):
            target = out[image, :, row : row + self.side, column : column + self.side]
            target.copy_(value[:, : target.shape[-2], : target.shape[-1]].expand_as(target))
        return out

    def _scale(self) -> Tensor:
        return torch.tensor([1, self.side, self.side])


def box_filter(x: Tensor, active: Tensor, tiles: Tiles) -> Tensor:
    """Sums over channels and 3x3 neighbours, in every channel of the active tiles; the others are not written."""
    chosen = tiles.cut(x)[tuple(active.T)].sum(1, keepdim=True)
    sums = F.avg_pool2d(chosen, 3, stride=1, divisor_override=1)
    return tiles.write(torch.empty_like(x), active, sums)


def tiled_layer(x: Tensor, layer: Any, tiles: Tiles) -> Tensor:
    """The convolution (3x3, stride 1, padding 1) on active tiles, the bias elsewhere."""
    active = tiles.active(x)
    out = layer.bias.detach().reshape(1, -1, 1, 1).expand(x.shape[0], -1, *x.shape[2:]).clone()
    if len(active):
        tiles.write(out, active, F.conv2d(tiles.cut(x)[tuple(active.T)], layer.weight, layer.bias))
    return out


def run(options: Options) -> Iterator[Case]:
    """The suite: the two layers."""
    shapes = {shape.name: shape for shape in SHAPES}
    for name, shape, density, side in HEADLINES:
        yield Case(name, functools.partial(measure, name, shapes[shape], density, Tiles(side), options.repeats))


def measure(name: str, shape: Any, density: float, tiles: Tiles, repeats: int) -> Iterator[Row]:
    """Points of one layer."""
    plain, sparse = shape.layer(), layers.swapped(shape.layer(), "sparse")
    inputs = [clustered_spikes(torch.zeros(shape.size), density, seed) for seed in range(_INPUTS)]
    with torch.no_grad():
        gates = {
            BOX: gate_of_box(inputs[0], tiles),
            TILES: layers.gate_of(functools.partial(tiled_layer, layer=plain, tiles=tiles), plain, inputs[:2]),
            SPARSE: layers.gate_of(sparse, plain, inputs[:2]),
        }
        ms = timed(plain, sparse, inputs, tiles, repeats)
    best = layers.over(ms)["best dense fp32"]
    config = {"batch": shape.size[0], "layer": shape.name, "tile": tiles.side, "spikes": "clustered"}
    for kernel, gate in gates.items():
        for baseline, theirs in (("eager", ms["eager"]), ("best dense fp32", best)):
            yield Point(
                suite=SUITE,
                case=name,
                kernel=kernel,
                family="predecessor" if kernel != SPARSE else layers.KERNELS["sparse"],
                scope=Scope.APPROXIMATE if kernel == BOX else Scope.EXACT,
                config=config,
                rho=sum(float(x.mean()) for x in inputs) / len(inputs),
                metric=Metric.LATENCY,
                value=ms[kernel] if gate.green else None,
                baseline=baseline,
                baseline_value=theirs,
                honest=kernel != BOX and baseline == "best dense fp32",
                gate=gate,
            )


def timed(plain: Any, sparse: Any, inputs: list[Tensor], tiles: Tiles, repeats: int) -> dict[str, Quantiles]:
    """20 %, 50 % and 80 % quantiles in ms of the dense variants and the three kernels, in alternation."""
    found = {id(x): tiles.active(x) for x in inputs}
    runs = layers.dense_runs(plain, inputs)
    runs[BOX] = layers.Rotating(lambda x: box_filter(x, found[id(x)], tiles), inputs)
    runs[TILES] = layers.Rotating(lambda x: tiled_layer(x, plain, tiles), inputs)
    runs[SPARSE] = layers.Rotating(sparse, inputs)
    alternate(runs, 2)
    return {name: quantiles(values) for name, values in alternate(runs, repeats, sweep_caches).items()}


def gate_of_box(x: Tensor, tiles: Tiles) -> Gate:
    """Whether the box filter is one, in the tiles it writes."""
    active = tiles.active(x)
    written = tiles.write(torch.zeros_like(x), active, torch.ones(len(active), 1, tiles.side, tiles.side)).bool()
    exact = F.avg_pool2d(x.double().sum(1, keepdim=True), 3, 1, 1, divisor_override=1).expand_as(x)
    wrong = int((box_filter(x, active, tiles).double() != exact)[written].sum())
    return _BOX_GATE if not wrong else dataclasses.replace(_BOX_GATE, green=False, why=(f"{wrong} sums are wrong",))
