"""Time a model dense and accelerated, A B A B, after checking that both give the same answer."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparseflow.api import disabled
from sparseflow.frameworks import restore_state, snapshot_state
from sparseflow.graph.isolation import isolated
from sparseflow.lowering import as_arguments
from sparseflow.observe import gpus_of, verify, wait_for
from sparseflow.report import BenchResult

_GATE = "every layer inside its error budget against float64, and the outputs of the whole model agree"


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """20 %, 50 % and 80 % quantiles.

    >>> quantiles([1.0, 2.0, 3.0, 4.0, 5.0])
    (1.8, 3.0, 4.2)
    """
    low, *_, high = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 2
    return (round(low, 6), statistics.median(times), round(high, 6))


def alternate(
    runs: Mapping[str, Callable[[], object]], repeats: int, setup: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Wall times in ms of each run, taken in turn so that a drift of the machine hits all alike.

    Every round goes in another order, since a run finds the caches and the allocator as the one before left them.
    ``setup`` runs before each of them, outside the timer.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            setup()
            start = time.perf_counter_ns()
            runs[name]()
            times[name].append((time.perf_counter_ns() - start) / 1e6)
    return times


def compare(model: nn.Module, example: Any, *, repeats: int = 20, tolerance: float = 1e-2) -> BenchResult:
    """Time one forward call of an accelerated model, dense and accelerated.

    The gate: every sparse layer inside its float64 error budget (:func:`sparseflow.verify`), and the model's outputs
    within ``tolerance`` of the dense ones, relative to their largest value: a spike at the threshold may flip.

    Args:
        model: an accelerated model; its neuron state is put back before every call and at the end.
        example: input of its forward, as for :func:`sparseflow.accelerate`.
        repeats: alternations.
        tolerance: admissible relative difference of the whole model's outputs.
    """
    args, kwargs = as_arguments(example)
    devices = gpus_of(model)

    def run() -> Any:
        output = model(*args, **kwargs)
        wait_for(devices)
        return output

    def run_dense() -> Any:
        with disabled(model):
            return run()

    with isolated(model):
        snapshot = snapshot_state(model)

        def rewind() -> None:
            restore_state(model, snapshot)

        outputs = []
        for once in (run, run_dense):
            rewind()
            outputs.append(once())
        rewind()
        with verify(model) as watch:
            run()
        times = alternate({"dense": run_dense, "sparse": run}, repeats, rewind)
    error, scale = _difference(*outputs)
    matches = watch.worst <= 1.0 and error <= tolerance * scale
    return BenchResult(quantiles(times["dense"]), quantiles(times["sparse"]), error, matches, _GATE, repeats)


def _difference(ours: Any, theirs: Any) -> tuple[float, float]:
    """Largest absolute difference of two output structures, and the largest magnitude of the second."""
    pairs = list(zip(_tensors(ours), _tensors(theirs), strict=True))
    error = max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)
    scale = max((float(b.abs().max()) for _, b in pairs if b.numel()), default=0.0)
    return error, scale


def _tensors(output: Any) -> list[Tensor]:
    return [leaf.double() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
