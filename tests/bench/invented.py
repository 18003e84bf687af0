"""Invented results of every kind to test the page with: ``python -m tests.bench.invented results.json``."""

from __future__ import annotations

import itertools
import random
import sys
from typing import Any

from sparseflow.bench.records import Absent, Crossover, Gate, Layer, Metric, Phase, Point, Results, Scope

GREEN = Gate(True, "float64 error budget of every layer")
RED = Gate(False, "float64 error budget of every layer", ("layer3.0.conv1: 3.1 budgets", "2 spikes outside the band"))
HONEST, EAGER = "compiled dense", "eager dense"
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
SHAPES = ("3x3 64@56", "3x3 128@28", "3x3 256@14", "1x1 256@14", "linear 4096x1024")
NETWORKS = {"spiking_resnet18": 0.06, "sew_resnet18": 0.3, "spiking_vgg11": 0.1}
_FAMILY = {"events": "event-driven", "rows": "event-driven", "level 1": "layers", "level 2": "fused blocks"}
_SPEED = {"events": 0.45, "rows": 0.35, "level 1": 0.3, "level 2": 0.16, "blocks 16x1": 0.25, "SpikingJelly": 0.9}


class Inventor:
    """Makes points with some scatter, always the same ones."""

    def __init__(self) -> None:
        self.random = random.Random(7)

    def around(self, value: float) -> tuple[float, float, float]:
        """Three quantiles that enclose about ``value``."""
        middle = value * self.random.uniform(0.93, 1.07)
        return middle * self.random.uniform(0.9, 0.98), middle, middle * self.random.uniform(1.02, 1.2)

    def point(self, suite: str, case: str, kernel: str, config: dict[str, Any], ours: float, dense: float, **more: Any):
        fields: dict[str, Any] = {
            "family": _FAMILY.get(kernel, "other"),
            "scope": Scope.EXACT,
            "rho": None,
            "metric": Metric.LATENCY,
            "value": self.around(ours),
            "baseline": HONEST,
            "baseline_value": self.around(dense),
            "honest": True,
            "gate": GREEN,
        }
        return Point(suite=suite, case=case, kernel=kernel, config=config, **(fields | more))

    def layers(self):
        """Single layers over densities, against both baselines; the event kernels lose where it is dense."""
        for (size, shape), rho, kernel in itertools.product(enumerate(SHAPES), DENSITIES, ("events", "rows")):
            dense = 4.0 / (1 + size)
            ours = dense * (0.08 + rho * (1.6 if kernel == "events" else 2.6) * (1 + 0.3 * size))
            config = {"width": (64, 128, 256, 256, 1024)[size], "batch": 1, "T": 4, "density set": rho}
            drawn: dict[str, Any] = {"rho": rho * self.random.uniform(0.99, 1.01)}
            yield self.point("layers", shape, kernel, config, ours, dense, **drawn)
            if kernel == "events":
                drawn |= {"baseline": EAGER, "honest": False}
                yield self.point("layers", shape, kernel, config, ours, 2.3 * dense, **drawn)

    def models(self):
        """Whole networks."""
        for (name, rho), size, batch in itertools.product(NETWORKS.items(), (64, 160), (1, 8)):
            dense = 0.004 * size * size * batch**0.8
            config = {"width": 64, "resolution": size, "batch": batch, "T": 4, "depth": 11 if "vgg" in name else 18}
            for kernel in ("level 1", "level 2"):
                case, ours = f"{name} @{size}, batch {batch}", dense * (_SPEED[kernel] + 2.2 * rho)
                more = {"rho": rho, "densities": {"layer1.0.conv1": rho}}
                yield self.point("models", case, kernel, config, ours, dense, **more)
                yield self.point(
                    "models", case, kernel, config, ours, 2.6 * dense, **more, baseline=EAGER, honest=False
                )
                more |= {"precision": "bf16"}
                yield self.point("models", case, kernel, config, ours, 0.6 * dense, **more)

    def scaling(self):
        """One network, one parameter at a time."""
        base = {"width": 64, "resolution": 64, "batch": 1, "T": 4, "depth": 18}
        grid = {"width": (16, 32, 64, 128, 256), "resolution": (32, 64, 128, 224), "batch": (1, 2, 4, 8, 16, 32)}
        grid |= {"T": (1, 2, 4, 8, 16), "depth": (18, 34, 50)}
        slope = {"events": {"width": 0.25, "batch": -0.12}, "level 2": {"width": 0.1, "batch": -0.3, "T": 0.2}}
        for (parameter, sizes), kernel in itertools.product(grid.items(), ("events", "level 2")):
            for size in sizes:
                dense = 10 * size / base[parameter]
                gain = 2.4 * (size / base[parameter]) ** slope[kernel].get(parameter, 0.0)
                case = f"resnet, {parameter} {size}"
                config = base | {parameter: size}
                more = {"rho": 0.05 + 0.0001 * size, "densities": {"conv2": 0.05}}
                yield self.point("scaling", case, kernel, config, dense / gain, dense, **more)

    def memory(self):
        for width, kernel in itertools.product((16, 32, 64, 128, 256), ("events", "level 2")):
            dense = 40 + 1.2 * width
            ours = dense * ((0.45 if kernel == "level 2" else 0.7) + 20 / width / 4)
            config = {"width": width, "resolution": 64, "batch": 1, "T": 4, "depth": 18}
            yield self.point("memory", f"resnet, width {width}", kernel, config, ours, dense, metric=Metric.MEMORY)

    def startup(self):
        for name in NETWORKS:
            config = {"width": 64, "resolution": 64}
            yield self.point("startup", name, "level 2", config, 900, 12_000, metric=Metric.STARTUP)
        more = {"metric": Metric.STARTUP, "baseline_value": None, "honest": False, "baseline": "none"}
        yield self.point("startup", "import sparseflow", "level 2", {}, 45, 0, **more)

    def others(self):
        """Peers, the predecessor, pruned weights, an approximation, a published figure and red gates."""
        for size, name in itertools.product((64, 160), ("SpikingJelly", "brainevent", "torch.sparse")):
            config = {"width": 64, "resolution": size, "batch": 1, "T": 4, "depth": 18}
            dense, slow = 0.004 * size * size, {"SpikingJelly": 1.1, "brainevent": 1.9, "torch.sparse": 7.0}[name]
            more = {"scope": Scope.PEER, "family": "peer", "rho": 0.06}
            yield self.point("peers", f"spiking_resnet18 @{size}", name, config, slow * dense, dense, **more)
        config = {"width": 64, "batch": 16}
        more = {"scope": Scope.PEER, "family": "channel groups", "baseline": EAGER, "honest": False}
        yield self.point("predecessor", "layer1.0.conv2", "SparseFlow 2024", config, 1.0, 3.1, **more, rho=0.015)
        more |= {"value": None, "gate": RED}
        yield self.point("predecessor", "layer2.1.conv2", "SparseFlow 2024", config, 1.0, 9.0, **more, rho=0.0)
        for width, kept in itertools.product((256, 512, 1024, 2048, 4096), (0.125, 0.25)):
            more = {"scope": Scope.PRUNED, "family": "block-sparse weights", "rho": 0.05}
            config = {"width": width, "batch": 1, "T": 4, "blocks kept": kept}
            dense = width * width / 2e6
            case = f"linear {width}, {kept:.1%} of blocks"
            yield self.point("block-sparse", case, "blocks 16x1", config, dense * (kept + 12 / width), dense, **more)
        more = {
            "scope": Scope.PRUNED,
            "family": "block-sparse weights",
            "source": "another lab, table 2",
            "device": "gpu",
        }
        yield self.point(
            "block-sparse", "linear 4096", "blocks 16x1", {"width": 4096}, 1.0, 16.5, **more, precision="fp16"
        )
        for steps in (8, 16, 32, 64):
            more = {"scope": Scope.APPROXIMATE, "family": "temporal aggregation", "rho": 0.1}
            config = {"width": 32, "batch": 8, "T": steps, "K": 4}
            yield self.point("temporal", f"convnet, T = {steps}", "TAC-TP", config, 0.4 * steps, 1.1 * steps, **more)
        for size in (64, 160):
            config = {"width": 64, "resolution": size, "batch": 1, "T": 4, "depth": 50}
            more = {"value": None, "gate": RED}
            yield self.point("models", f"spiking_resnet50 @{size}, batch 1", "level 2", config, 1.0, 50.0, **more)


def _layers() -> list[Layer]:
    fused, dense = "one kernel with its neuron, on packed spikes", "dense measured faster at the observed density"
    rows = [
        Layer(name, "conv1", "Conv2d", None, None, "dense", 1.9, None, "input is not a spike tensor")
        for name in NETWORKS
    ]
    for (name, rho), block, conv in itertools.product(NETWORKS.items(), range(1, 5), (1, 2)):
        density = rho * (1.3 - 0.2 * block)
        sparse = 0.9 * (0.1 + 3 * density)
        why = (fused, "fused") if sparse < 0.9 else (dense, "dense")
        label = f"layer{block}.0.conv{conv}"
        rows.append(Layer(name, label, "Conv2d", density, min(1, 6 * density), why[1], 0.9, sparse, why[0]))
    return rows


def _phases() -> list[Phase]:
    shares = {"pack": 0.3, "prescan": 0.2, "compute": 3.1, "neuron": 0.9, "rest": 1.4}
    scales = {("spiking_resnet18 @64, batch 1", "level 2"): 1.0, ("spiking_resnet18 @64, batch 1", "level 1"): 3.4}
    scales |= {("sew_resnet18 @64, batch 1", "level 2"): 2.7}
    return [Phase(*who, phase, scale * ms) for who, scale in scales.items() for phase, ms in shares.items()]


def results() -> Results:
    """Hundreds of invented points of all suites, and something in every section."""
    inventor = Inventor()
    makers = ("layers", "models", "scaling", "memory", "startup", "others")
    points = [point for maker in makers for point in getattr(inventor, maker)()]
    crossovers = [
        Crossover(shape, kernel, measured, None if shape == SHAPES[-1] else 0.9 * measured)
        for (size, shape), (kernel, measured) in itertools.product(
            enumerate(SHAPES), {"events": 0.5, "rows": 0.3}.items()
        )
        for measured in [measured / (1 + 0.3 * size)]
    ]
    environment = {
        "sparseflow": "0.0",
        "commit": "invented",
        "cpu": "none: every figure on this page is invented, to try the page out",
        "threads": 2,
        "torch": "0.0",
    }
    absent = [Absent("norse", "ERROR: No matching distribution found for norse")]
    return Results(environment, 7, points, _layers(), _phases(), crossovers, absent)


if __name__ == "__main__":
    results().save(sys.argv[1])
