"""Rows of single layers and of the predecessor's: gates, honest tags, crossovers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparseflow.bench.records import Crossover, Gate, Point, Scope
from sparseflow.bench.suites import Options, layers, predecessor
from sparseflow.bench.suites.shapes import DENSITIES, SHAPES, Shape

from .small import one_thread

__all__ = ["one_thread"]
SMALL = Shape("small", (2, 16, 8, 8), "Conv2d", (16, 16, 3), (("padding", 1),))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_shapes_build_layers_that_take_their_input(shape):
    with torch.device("meta"):
        layer = shape.layer()
        assert layer(torch.empty(shape.size)).shape[0] == shape.size[0]


def test_every_shape_is_a_case_and_quick_ones_are_among_them():
    names = [case.name for case in layers.run(Options())]
    assert names == [shape.name for shape in SHAPES]
    assert len(names) == 20
    assert {case.name for case in layers.run(Options(quick=True))} < set(names)


@pytest.fixture(scope="module")
def rows():
    return list(layers.sweep(SMALL, (0.01, 1.0), repeats=2))


class TestSweep:
    def test_points_of_every_density_kernel_and_baseline(self, rows):
        found = [row for row in rows if isinstance(row, Point)]
        assert len({(p.config["density set"], p.kernel, p.baseline) for p in found}) == len(found) == 2 * 2 * 3
        assert {p.baseline for p in found if p.honest} == {"best dense fp32"}
        assert all(p.gate.green and p.speedup > 0 for p in found)

    def test_crossover_beside_the_one_in_use(self, rows):
        (crossover,) = [row for row in rows if isinstance(row, Crossover)]
        assert 0.0 <= crossover.measured <= 1.0
        assert 0.0 <= crossover.used <= 1.0

    def test_a_wrong_layer_has_no_figure(self, monkeypatch):
        monkeypatch.setattr(layers, "excess", lambda *_: 3.0)
        rows = list(layers.sweep(SMALL, (0.01,), repeats=2))
        points = [row for row in rows if isinstance(row, Point)]
        assert {(p.value, p.baseline_value, p.honest, p.gate.why) for p in points} == {
            (None, None, False, ("3 budgets from float64",))
        }
        assert next(row for row in rows if isinstance(row, Crossover)).measured is None


class TestCrossover:
    def at(self, density, ms):
        fields = ("layers", "case", "sparse", "family", Scope.EXACT, {"density set": density}, density, "latency")
        return Point(*fields, (ms, ms, ms), "best dense fp32", (2.0, 2.0, 2.0), True, Gate(True, ""))

    def test_is_interpolated_between_the_densities(self):
        assert layers.measured_crossover([self.at(0.1, 1.0), self.at(0.3, 3.0)]) == pytest.approx(0.2)

    def test_is_an_end_where_there_is_none(self):
        assert layers.measured_crossover([self.at(0.1, 3.0), self.at(1.0, 4.0)]) == 0.0
        assert layers.measured_crossover([self.at(0.1, 1.0), self.at(1.0, 1.5)]) == 1.0


class TestPredecessor:
    def spikes(self, density, shape=(2, 3, 20, 28)):
        return (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density).float()

    @pytest.mark.parametrize("density", [0.0, 0.001, 0.2])
    @pytest.mark.parametrize("side", [4, 8, 16])
    def test_tiles_with_weights_are_the_layer(self, density, side):
        layer = torch.nn.Conv2d(3, 5, 3, padding=1)
        x = self.spikes(density)
        with torch.no_grad():
            ours = predecessor.tiled_layer(x, layer, predecessor.Tiles(side))
            assert torch.allclose(ours, layer(x), atol=1e-6)

    def test_box_filter_in_active_tiles_and_nothing_elsewhere(self):
        tiles, x = predecessor.Tiles(8), torch.zeros(1, 2, 16, 16)
        x[0, 1, 3, 3] = 1.0
        active = tiles.active(x)
        assert active.tolist() == [[0, 0, 0]]
        out = predecessor.box_filter(x, active, tiles)
        exact = F.conv2d(x, torch.ones(2, 2, 3, 3), padding=1)
        assert torch.equal(out[..., :8, :8], exact[..., :8, :8])
        assert bool(out[..., 8:, 8:].isnan().all())  # the tests fill uninitialised memory with NaN

    def test_a_spike_in_the_halo_makes_the_neighbour_active(self):
        x = torch.zeros(1, 1, 16, 16)
        x[0, 0, 8, 3] = 1.0
        assert predecessor.Tiles(8).active(x).tolist() == [[0, 0, 0], [0, 1, 0]]

    def test_its_way_is_tagged(self):
        shape = Shape("small", (2, 16, 16, 16), "Conv2d", (16, 16, 3), (("padding", 1),))
        points = list(predecessor.measure("small", shape, 0.02, predecessor.Tiles(8), repeats=2))
        assert {p.kernel for p in points} == {predecessor.BOX, predecessor.TILES, predecessor.SPARSE}
        assert all(p.gate.green for p in points)
        for p in points:
            assert p.honest == (p.kernel != predecessor.BOX and p.baseline == "best dense fp32")
            assert (p.scope is Scope.APPROXIMATE) == (p.kernel == predecessor.BOX)

    def test_a_box_filter_that_is_none_is_red(self, monkeypatch):
        right = predecessor.box_filter
        monkeypatch.setattr(predecessor, "box_filter", lambda *args: right(*args) + 1)
        gate = predecessor.gate_of_box(self.spikes(0.01), predecessor.Tiles(8))
        assert not gate.green

    def test_quick_keeps_both_layers(self):
        assert [case.name for case in predecessor.run(Options(quick=True))] == ["layer1.0.conv2", "layer2.1.conv2"]


def test_densities_of_the_sweep_end_at_one():
    assert list(DENSITIES) == sorted(DENSITIES)
    assert DENSITIES[-1] == 1.0
