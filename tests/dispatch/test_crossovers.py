"""What a crossover is stored under, and what it depends on."""

from __future__ import annotations

import pytest
import torch

from sparseflow.dispatch import crossovers, progress
from sparseflow.dispatch.crossovers import CrossoverSource, RuntimeConfig, conditions, crossover_keys

from .fake import LINEAR, FakeEvent, FakeKernel, curve


class OnGpu:
    """As much of a CUDA tensor as a key looks at."""

    is_cuda = True
    device = torch.device("cuda", 0)
    dtype = torch.float32
    shape = torch.Size((5, 16))

    @staticmethod
    def is_contiguous():
        return True


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(crossovers, "_gpu", lambda device: "Some GPU|9.0")
    return OnGpu()


WEIGHT = torch.zeros(4, 16)


def test_a_gpu_has_two_crossovers_named_by_device_and_precision(gpu, monkeypatch):
    kernel = FakeKernel()
    eager, graph = crossover_keys(kernel, gpu, WEIGHT, LINEAR)
    assert eager.removesuffix("/eager") == graph.removesuffix("/graph")
    assert "Some GPU|9.0" in eager
    monkeypatch.setattr(crossovers, "tf32_matmul", lambda: "other")
    assert crossover_keys(kernel, gpu, WEIGHT, LINEAR)[0] != eager


def test_threads_count_on_the_cpu_only(gpu):
    x = torch.zeros(5, 16)
    eager, graph = crossover_keys(FakeKernel(), x, WEIGHT, LINEAR)
    assert eager == graph
    assert f"t{torch.get_num_threads()}" in eager
    assert conditions(x) == torch.get_num_threads()
    assert crossover_keys(FakeEvent(), x, WEIGHT, LINEAR)[0] != eager


def test_the_switches_of_pytorch_are_read(gpu):
    assert conditions(gpu) == (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)


def test_a_kernel_that_needs_too_much_memory_is_not_used(monkeypatch, caplog):
    def fail(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(crossovers, "measure", fail)
    monkeypatch.setattr(crossovers.shared_cache, "get", lambda key: None)
    arguments = torch.zeros(5, 16), WEIGHT, None, LINEAR
    assert CrossoverSource("conv1", RuntimeConfig()).of((FakeKernel(),), *arguments) == ()
    assert "conv1: no memory left" in caplog.text


class Demanding(FakeKernel):
    """Asks for more than the GPU has: ``refused`` of its variants do not run."""

    def __init__(self, refused):
        super().__init__()
        self.refused = refused

    def compute(self, x, scan, packed, bias, variant):
        if variant in self.refused:
            raise RuntimeError("out of resource: shared memory")
        return super().compute(x, scan, packed, bias, variant)


@pytest.mark.parametrize(("refused", "variant"), [("", {"a", "b"}), ("a", {"b"}), ("ab", None)])
def test_what_does_not_run_on_this_gpu_is_left_out(monkeypatch, caplog, refused, variant):
    monkeypatch.setattr(crossovers.shared_cache, "get", lambda key: None)
    monkeypatch.setattr(crossovers.shared_cache, "put", lambda crossover: None)
    arguments = torch.zeros(5, 16), WEIGHT, None, LINEAR
    found = CrossoverSource("conv1", RuntimeConfig()).of((Demanding(refused),), *arguments)
    if variant is None:
        assert found == ()
        assert "conv1: the tile kernel cannot be used here: RuntimeError: out of resource" in caplog.text
    else:
        assert found[0][1].eager.variant in variant


def test_kernels_of_one_layer_share_its_budget_and_count_once(monkeypatch):
    shares = []

    def record(key, kernel, x, weight, bias, call, budget):
        shares.append(budget.layer_ms)
        return curve(key, kernel, at_zero=0.5, at_one=2.0)

    monkeypatch.setattr(crossovers, "measure", record)
    monkeypatch.setattr(crossovers.shared_cache, "get", lambda key: None)
    monkeypatch.setattr(crossovers.shared_cache, "put", lambda crossover: None)
    config = RuntimeConfig()
    source = CrossoverSource("layer", config)
    with progress.measuring(5, config.budget):
        found = source.of((FakeKernel(), FakeEvent()), torch.zeros(5, 16), WEIGHT, None, LINEAR)
        assert progress._active.get().done == 1
    assert [measured.eager.axis for _, measured in found] == ["occupancy", "density"]
    assert shares == [config.budget.layer_ms / 2] * 2
