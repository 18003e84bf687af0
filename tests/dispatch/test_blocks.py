"""Crossovers of fused blocks, and the buffers that a fused plan uses again."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparseflow.dispatch import blocks
from sparseflow.dispatch.blocks import block_crossover, block_key
from sparseflow.dispatch.cache import CrossoverCache
from sparseflow.dispatch.crossovers import RuntimeConfig
from sparseflow.dispatch.measure import DENSITIES, Times
from sparseflow.kernels.blocks.buffers import BufferPool
from sparseflow.kernels.blocks.spikes import pack
from sparseflow.kernels.geometry import ConvGeometry
from sparseflow.plan import Crossover

GEOMETRY = ConvGeometry.from_call((4, 8, 1, 6, 6), (16, 8, 1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1), 1)
LIKE = pack(torch.zeros(4, 8, 6, 6), 1)
KEY = "block|fake"


class FakeBlock:
    """Takes as many milliseconds as it says: 1 dense, and on events by density and variant."""

    def __init__(self, **slopes):
        self.slopes, self.calls = slopes, []

    def __call__(self, x, variant):
        density = int(x.nonzero) / x.numel
        self.calls.append((variant, round(density, 3)))
        return 1.0 if variant is None else 0.1 + self.slopes[variant] * density


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache of its own, and a clock that believes what a run says; ``quiet`` may be set to false."""
    kept = CrossoverCache(tmp_path)
    kept.quiet = True
    monkeypatch.setattr(blocks, "shared_cache", kept)
    monkeypatch.setattr(
        blocks, "fastest", lambda runs, budget_ms: Times({name: run() for name, run in runs.items()}, kept.quiet)
    )
    return kept


def known(variant="a", **changes):
    return dataclasses.replace(Crossover(KEY, 0.25, 1.0, 0.0, 0.0, (0.0, 1.0), (0.1, 3.7), variant), **changes)


def find(run, variants=("a", "b"), config=RuntimeConfig()):  # noqa: B008
    return block_crossover("conv1", KEY, variants, LIKE, run, config)


def test_a_forced_block_measures_nothing(cache):
    run = FakeBlock(a=1.0)
    found = find(run, config=RuntimeConfig(mode="sparse"))
    assert (found.density, found.variant) == (1.0, "a")
    assert not run.calls
    assert cache.get(KEY) is None


def test_what_a_calibration_knows_is_not_measured(cache):
    run = FakeBlock(a=1.0)
    assert find(run, config=RuntimeConfig(known={KEY: known("b")})) == known("b")
    assert not run.calls


def test_what_the_cache_knows_is_not_measured(cache):
    cache.put(known("b"))
    run = FakeBlock(a=1.0)
    assert find(run) == known("b")
    assert not run.calls


def test_a_variant_that_is_gone_is_measured_anew(cache):
    cache.put(known("old"))
    assert find(FakeBlock(a=1.0, b=2.0)).variant == "a"
    assert cache.get(KEY).variant == "a"


def test_the_fastest_variant_and_where_it_crosses_dense(cache):
    run = FakeBlock(a=9.0, b=3.0)
    found = find(run)
    assert found.variant == "b"
    assert found.density == pytest.approx(0.3, abs=0.02)
    assert found.dense_ms == 1.0
    assert found.sparse_ms_at(0.1) == pytest.approx(0.4, abs=0.02)
    assert find(FakeBlock()) == found  # from the cache


def test_one_variant_has_nobody_to_compete_with(cache):
    run = FakeBlock(a=3.0)
    assert find(run, ("a",)).variant == "a"
    assert len({density for variant, density in run.calls if variant == "a"}) <= len(DENSITIES)


def test_dense_that_always_wins_and_always_loses(cache):
    assert find(FakeBlock(a=1e4), ("a",)).density < 0.01
    assert block_crossover("conv2", "block|other", ("a",), LIKE, FakeBlock(a=0.1), RuntimeConfig()).density == 1.0


def test_hopeless_densities_are_not_measured_to_the_end(cache):
    run = FakeBlock(a=1e3)
    find(run, ("a",))
    assert max(density for variant, density in run.calls if variant == "a") < max(DENSITIES)


def test_figures_of_a_busy_machine_are_used_but_not_kept(cache):
    cache.quiet = False
    assert find(FakeBlock(a=3.0, b=9.0)).variant == "a"
    assert cache.get(KEY) is None


def test_a_key_tells_apart_what_takes_other_times():
    keys = {
        block_key("cpu", GEOMETRY, 4, "lif/hard", "none"),
        block_key("triton", GEOMETRY, 4, "lif/hard", "none"),
        block_key("cpu", dataclasses.replace(GEOMETRY, batch=8), 4, "lif/hard", "none"),
        block_key("cpu", dataclasses.replace(GEOMETRY, stride=(1, 2, 2)), 4, "lif/hard", "none"),
        block_key("cpu", GEOMETRY, 2, "lif/hard", "none"),
        block_key("cpu", GEOMETRY, 4, "if/soft", "none"),
        block_key("cpu", GEOMETRY, 4, "lif/hard", "dense"),
    }
    assert len(keys) == 7
    assert all(" " not in key for key in keys)


def test_a_key_tells_the_number_of_threads(monkeypatch):
    one = block_key("cpu", GEOMETRY, 4, "lif/hard", "none")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 17)
    assert block_key("cpu", GEOMETRY, 4, "lif/hard", "none") != one


# ---- buffers


def test_a_buffer_comes_back_by_shape_and_type():
    pool = BufferPool()
    floats, integers = pool.take((2, 3), torch.float32), pool.take((2, 3), torch.int64)
    assert (floats.shape, floats.dtype, integers.dtype) == ((2, 3), torch.float32, torch.int64)
    pool.give(floats)
    pool.give(integers)
    assert pool.take((3, 2), torch.float32) is not floats
    assert pool.take((2, 3), torch.int64) is integers
    assert pool.take((2, 3), torch.float32) is floats
    assert pool.take((2, 3), torch.float32) is not floats


def test_all_parts_of_packed_spikes_come_back():
    pool = BufferPool()
    spikes = pack(torch.ones(2, 70, 4) * 2, 1)
    pool.give_spikes(spikes)
    for part in (spikes.bits, spikes.counts, spikes.row_counts, spikes.nonzero):
        assert pool.take(tuple(part.shape), part.dtype) is part


def test_spikes_without_counts():
    pool = BufferPool()
    pool.give_spikes(dataclasses.replace(pack(torch.ones(2, 70, 4), 1), row_counts=None))
    assert sum(map(len, pool._free.values())) == 2


def test_spikes_that_somebody_keeps_do_not_come_back():
    pool = BufferPool()
    pool.give_spikes(dataclasses.replace(pack(torch.ones(2, 70, 4), 1), kept=True))
    assert not pool._free


def test_a_pool_takes_tensors_on_its_device():
    assert BufferPool("meta").take((2,), torch.uint8).device.type == "meta"
