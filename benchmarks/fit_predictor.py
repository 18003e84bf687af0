"""Fit the latency predictor of :mod:`sparseflow.study` to the committed results, and say how far off it is.

    python -m benchmarks.fit_predictor            fit, write src/sparseflow/study/predictor.json, print the errors
    python -m benchmarks.fit_predictor --check    exit 1 if the file is not what the results say
    python -m benchmarks.fit_predictor --trace    first run the measured networks, for shapes and densities

In ``benchmarks/results``, ``layers.json`` has the sweep of layer shapes, ``models.json``, ``networks.json`` (sizes) and
``fused.json`` the networks. The layers of a network and their densities are not in these: ``--trace`` runs every
network on its inputs and writes ``net_calls.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from sparseflow.bench.suites.baselines import Workload
from sparseflow.bench.suites.shapes import SHAPES
from sparseflow.modules.fused.block import MAX_INPUT_DENSITY
from sparseflow.study.predictor import (
    FILE,
    LayerModels,
    Point,
    Predictor,
    accelerated_net_terms,
    dense_net_terms,
    dense_terms,
    fitted,
    sparse_terms,
)
from sparseflow.study.records import LayerShape
from sparseflow.study.shapes import LayerCall, NetCall, trace

RESULTS = pathlib.Path(__file__).parent / "results"
LAYERS, MODELS, SIZES, FUSED, CALLS = (f"{n}.json" for n in ("layers", "models", "networks", "fused", "net_calls"))
_EAGER, _FUSED = "eager", "level 2"
_SUITES = ("models", "scaling")
Calls = dict[str, tuple[NetCall, dict[str, float]]]


def _load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


# ---- layers


def layer_calls() -> dict[str, LayerCall]:
    """The swept layers by name, traced without data."""
    with torch.device("meta"):
        return {shape.name: trace(shape.layer(), torch.empty(shape.size)).layers[0] for shape in SHAPES}


def layer_points(record: dict[str, Any]) -> tuple[list[Point], list[Point]]:
    """Eager and sparse times of the sweep; a case is a shape."""
    calls, dense, sparse = layer_calls(), [], []
    for point in record["points"]:
        if (point["suite"], point["kernel"], point["baseline"]) == ("layers", "sparse", _EAGER) and point["value"]:
            call = calls[point["case"]]
            dense.append(Point(point["case"], dense_terms(call), point["baseline_value"][1]))
            sparse.append(Point(point["case"], sparse_terms(call, point["rho"]), point["value"][1]))
    return dense, sparse


# ---- networks


def measured_networks() -> Iterator[tuple[str, float, float]]:
    """Case, eager and fused time in ms, both medians; of a network that was measured twice the later ones."""
    found = {row["case"]: (row["ms"][_EAGER][1], row["ms"][_FUSED][1]) for row in _load(FUSED)["rows"] if row["green"]}
    for point in (*_load(SIZES)["points"], *_load(MODELS)["points"]):
        if point["suite"] in _SUITES and (point["kernel"], point["baseline"]) == (_FUSED, _EAGER) and point["value"]:
            found[point["case"]] = point["baseline_value"][1], point["value"][1]
    for case, times in found.items():
        yield case, *times


def net_points(calls: Calls, models: LayerModels) -> tuple[list[Point], list[Point]]:
    """Eager and accelerated times of the networks; a case is a network at one size."""
    dense, accelerated = [], []
    for case, eager_ms, fused_ms in measured_networks():
        net, densities = calls[case]
        dense.append(Point(case, dense_net_terms(net, models), eager_ms))
        accelerated.append(Point(case, accelerated_net_terms(net, densities, models), fused_ms))
    return dense, accelerated


def architecture(case: str) -> str:
    """What a network is, whatever its size and activity.

    >>> architecture("spiking_resnet18 at 30% @64, batch 1")
    'spiking_resnet18'
    """
    return case.split(",")[0].split(" @")[0].split(" at ")[0]


def read_calls() -> Calls:
    """What ``--trace`` wrote."""
    return {case: _call_of(record) for case, record in _load(CALLS)["networks"].items()}


def _call_of(record: dict[str, Any]) -> tuple[NetCall, dict[str, float]]:
    layers = (LayerCall(**layer | {"shape": _shape_of(layer["shape"])}) for layer in record["layers"])
    return NetCall(tuple(layers), record["neuron_steps"]), record["densities"]


def _shape_of(record: dict[str, Any]) -> LayerShape:
    return LayerShape(**{name: tuple(value) if isinstance(value, list) else value for name, value in record.items()})


# ---- tracing


def trace_networks() -> dict[str, Any]:
    """Layers of every measured network in its first input, and their densities over all its inputs."""
    from sparseflow.bench.suites import models, scaling

    makers: dict[str, Callable[[], Workload]] = dict([*models.everything(), *scaling.everything()])
    cases = dict.fromkeys(case for case, _, _ in measured_networks())
    return {"networks": {case: _traced(makers[case]()) for case in cases}}


def _traced(workload: Workload) -> dict[str, Any]:
    net = workload.build()
    workload.reset(net)
    call = trace(net, workload.inputs[0])
    densities = _densities(net, workload)
    if not all(_is_spikes(x) for x in workload.inputs):
        del densities[call.names[0]]  # which reads the input of the model, and runs dense
    return dataclasses.asdict(call) | {"densities": densities}


def _is_spikes(x: torch.Tensor) -> bool:
    """Whether ``accelerate`` packs an input of the model."""
    return bool(((x == 0) | (x == 1)).all()) and float(x.mean()) < MAX_INPUT_DENSITY


def _densities(net: nn.Module, workload: Workload) -> dict[str, float]:
    """Share of inputs that are not zero, by layer, over all inputs of a workload."""
    seen: dict[str, list[int]] = {}

    def count(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            totals = seen.setdefault(name, [0, 0])
            totals[0] += int(args[0].count_nonzero())
            totals[1] += args[0].numel()

        return hook

    layers = ((name, module) for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear))
    handles = [module.register_forward_pre_hook(count(name)) for name, module in layers]
    with torch.no_grad():
        for x in workload.inputs:
            workload.reset(net)
            net(x)
    for handle in handles:
        handle.remove()
    return {name: round(nonzero / total, 5) for name, (nonzero, total) in seen.items()}


# ---- all of it


def fit_predictor() -> Predictor:
    """The predictor of the committed results."""
    record = _load(LAYERS)
    layers = LayerModels(*map(fitted, layer_points(record)))
    nets = (fitted(points, architecture) for points in net_points(read_calls(), layers))
    environment = record["environment"]
    machine = {name: environment[name] for name in ("cpu", "cores", "threads", "engine", "torch", "system")}
    sources = tuple(map(_source, (LAYERS, MODELS, SIZES, FUSED, CALLS)))
    return Predictor(machine, sources, *layers, *nets)


def _source(name: str) -> dict[str, str]:
    data = (RESULTS / name).read_bytes()
    commit = json.loads(data).get("environment", {}).get("commit", "")
    return {"file": f"benchmarks/results/{name}", "commit": commit, "sha256": hashlib.sha256(data).hexdigest()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--trace", action="store_true")
    options = parser.parse_args()
    if options.trace:
        (RESULTS / CALLS).write_text(json.dumps(trace_networks(), indent=1) + "\n")
    found = fit_predictor()
    if options.check:
        sys.exit(
            0 if found == Predictor.load() else f"{FILE} is not what the results say: {__spec__.name} fits it again"
        )
    found.save()
    for name in ("dense_layer", "sparse_layer", "dense_net", "accelerated_net"):
        model = getattr(found, name)
        print(
            f"{name}: {model.error}\n   " + "\n   ".join(f"{term}: {cost:g} ms" for term, cost in model.costs.items())
        )


if __name__ == "__main__":
    main()
