"""A latency predictor for CPUs: times as sums of physical quantities, each with a cost fitted to our own measurements.

Two models of layers, dense (as the user wrote the layer) and sparse (one swapped layer), come from the sweep of layer
shapes over densities. Two models of whole networks, dense (the user's own model, eager) and accelerated (fused blocks),
come from the measured networks. Costs are not negative, and minimise the squares of relative errors (Lawson, Hanson:
*Solving Least Squares Problems*, 1974, chapter 23). Every model carries its error on what was held out of its fit:
whole shapes, whole networks.

The costs in ``predictor.json`` belong to the machine that the file names. ``python -m benchmarks.fit_predictor`` makes
it from the committed results; predicting needs neither scipy nor the results.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .records import LayerShape, Net, Status, Study
from .shapes import LayerCall, NetCall

FILE = Path(__file__).with_name("predictor.json")
SCHEMA = 1
PATHS = ("dense", "accelerated")
_WORD = 64  # input channels that the engine looks at together
LOOP = "eager, loop over time"  # the dense path in which a layer is called once per step
Terms = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Error:
    """Relative error ``|predicted - measured| / measured`` on what was held out: the median and the 90 % quantile.

    ``cases`` is how many shapes or networks were left out, one at a time, and ``points`` how many times were compared.
    ``architecture_median`` is the median where all networks of an architecture were left out together.
    """

    median: float
    p90: float
    cases: int
    points: int
    architecture_median: float | None = None

    def __str__(self) -> str:
        text = (
            f"median {self.median:.0%}, 90 % below {self.p90:.0%} ({self.points} times of {self.cases} held-out cases)"
        )
        if self.architecture_median is None:
            return text
        return f"{text}, median {self.architecture_median:.0%} on an architecture not seen"


@dataclasses.dataclass(frozen=True)
class Model:
    """A time as a sum of terms: ``costs`` are ms a unit of the term.

    >>> Model({"call": 0.5, "multiply-adds": 1e-6}, Error(0.1, 0.2, 3, 9)).ms({"call": 1, "multiply-adds": 1e6})
    1.5
    """

    costs: Terms
    error: Error

    def ms(self, terms: Mapping[str, float]) -> float:
        """Milliseconds for these terms; one that was never fitted costs nothing."""
        return sum(self.costs.get(name, 0.0) * amount for name, amount in terms.items())


class Point(NamedTuple):
    """A measured time with its terms; points of one ``case`` are held out together."""

    case: str
    terms: Terms
    ms: float


# ---- terms of layers


def dense_terms(call: LayerCall) -> Terms:
    """Of one call of a dense layer. Matrix products (not of a matrix and one vector) reorder their weights first.

    >>> dense_terms(LayerCall(LayerShape("fc", 128, 10), rows=4))["multiply-adds"]
    5120
    """
    shape = call.shape
    product = call.rows * math.prod(shape.out_size) > 1
    return {
        "call": 1,
        "convolution call": float(not shape.linear),
        "multiply-adds": call.macs,
        "weights": call.weights,
        "weights reordered": float(product) * call.weights,
        "values": call.rows * (shape.inputs + shape.outputs),
    }


def sparse_terms(call: LayerCall, density: float) -> Terms:
    """Of one call of a sparse layer at a density in 0..1, spikes taken as independent.

    Weights are read where any position of the batch has a spike. ``windows`` are looked up for every output position,
    tap and word of input channels; a depthwise layer has a kernel without them.
    """
    shape = call.shape
    return {
        "call": 1,
        "inputs": call.rows * shape.inputs,
        "outputs": call.rows * shape.outputs,
        **_work(call, density),
    }


def _work(call: LayerCall, density: float) -> Terms:
    """What spikes ask for: the same in a layer of its own and in a fused block, which converts no layouts."""
    shape = call.shape
    return {
        "additions": density * call.macs,
        "weights read": call.weights * (1.0 - (1.0 - density) ** (call.rows * math.prod(shape.in_size))),
        "windows": call.rows * math.prod(shape.out_size) * math.prod(shape.kernel) * _words(shape),
    }


def _words(shape: LayerShape) -> int:
    if 1 < shape.groups == shape.in_channels:
        return 0
    return shape.groups * -(-shape.in_channels // shape.groups // _WORD)


# ---- terms of networks


class LayerModels(NamedTuple):
    """The models of single layers, on which those of networks build."""

    dense: Model
    sparse: Model


def eager_terms(call: LayerCall, models: LayerModels) -> Terms:
    """Of a layer in the user's own network. ``layer outputs`` go through norms, pools and neurons, in many passes."""
    return {"layers": call.calls * models.dense.ms(dense_terms(call)), "layer outputs": call.outputs}


def fused_terms(call: LayerCall, density: float, models: LayerModels) -> Terms:
    """Of a layer in an accelerated network, which takes all time steps in one call unless it is recurrent.

    At density 1 its input is no spikes, and it runs dense.
    """
    times = call.fused_calls
    one = LayerCall(call.shape, call.total_rows // times)
    around = {"layer calls": float(times), "layer outputs": call.outputs}
    if density >= 1.0:
        return {"dense layers": times * models.dense.ms(dense_terms(one))} | around
    return {"spikes": times * models.sparse.ms(_work(one, density))} | around


def dense_net_terms(net: NetCall, models: LayerModels) -> Terms:
    """Of a call of the user's own network: its layers, and the steps of its neurons."""
    return _sum({"neuron steps": net.neuron_steps}, *(eager_terms(call, models) for call in net.layers))


def accelerated_net_terms(net: NetCall, densities: Mapping[str, float], models: LayerModels) -> Terms:
    """Of a call of an accelerated network; layers that ``densities`` leaves out have no spikes as input."""
    shares = (densities.get(call.shape.name, 1.0) for call in net.layers)
    fused = (fused_terms(call, share, models) for call, share in zip(net.layers, shares, strict=True))
    return _sum({"call": 1.0}, *fused)


def _sum(*parts: Terms) -> Terms:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


# ---- fitting


def fit(points: Sequence[Point]) -> Terms:
    """Costs in ms a unit, not negative, that minimise the squared relative errors of ``points``. Needs scipy.

    >>> fit([Point("a", {"call": 1, "work": 2}, 5.0), Point("b", {"call": 1, "work": 4}, 9.0)])
    {'call': 1.0, 'work': 2.0}
    """
    from scipy.optimize import nnls

    names = list(dict.fromkeys(name for point in points for name in point.terms))
    rows = [[point.terms.get(name, 0.0) / point.ms for name in names] for point in points]
    relative = torch.tensor(rows, dtype=torch.float64)
    sizes = relative.abs().amax(0).clamp(min=1e-30)
    costs, _ = nnls((relative / sizes).numpy(), torch.ones(len(points), dtype=torch.float64).numpy())
    return {name: _rounded(cost / size) for name, cost, size in zip(names, costs, sizes.tolist(), strict=True)}


def _rounded(value: float) -> float:
    """Six significant digits: what two machines' linear algebra agrees on."""
    return float(f"{value:.6g}")


def held_out(points: Sequence[Point]) -> list[float]:
    """Predictions for ``points`` in ms, each by a model that was fitted without the point's case.

    Raises:
        ValueError: there are fewer than two cases.
    """
    cases = {point.case for point in points}
    if len(cases) < 2:
        raise ValueError(f"holding out needs two cases or more, got {len(cases)}")
    fitted = {case: fit([point for point in points if point.case != case]) for case in sorted(cases)}
    return [Model(fitted[point.case], _UNKNOWN).ms(point.terms) for point in points]


_UNKNOWN = Error(math.nan, math.nan, 0, 0)


def error_of(predicted: Iterable[float], points: Sequence[Point]) -> Error:
    """Relative errors of predictions for ``points``.

    >>> print(error_of([1.1, 2.0], [Point("a", {}, 1.0), Point("b", {}, 2.0)]))
    median 5%, 90 % below 9% (2 times of 2 held-out cases)
    """
    found = [abs(ms - point.ms) / point.ms for ms, point in zip(predicted, points, strict=True)]
    shares = torch.tensor([0.5, 0.9], dtype=torch.float64)
    median, p90 = torch.tensor(found, dtype=torch.float64).quantile(shares).tolist()
    return Error(round(median, 4), round(p90, 4), len({point.case for point in points}), len(points))


def fitted(points: Sequence[Point], architecture: Callable[[str], str] | None = None) -> Model:
    """A model fitted to all points, with its error on held-out cases, and on the architectures of cases by name."""
    error = error_of(held_out(points), points)
    if architecture is not None:
        kinds = [point._replace(case=architecture(point.case)) for point in points]
        error = dataclasses.replace(error, architecture_median=error_of(held_out(kinds), kinds).median)
    return Model(fit(points), error)


# ---- the fitted predictor


@dataclasses.dataclass(frozen=True)
class Predictor:
    """The four models, the machine they belong to, and the files they were fitted to (path, commit and SHA-256)."""

    machine: dict[str, Any]
    sources: tuple[dict[str, str], ...]
    dense_layer: Model
    sparse_layer: Model
    dense_net: Model
    accelerated_net: Model

    @property
    def layers(self) -> LayerModels:
        """The models of single layers."""
        return LayerModels(self.dense_layer, self.sparse_layer)

    def save(self, path: Path = FILE) -> None:
        """Write the file."""
        path.write_text(json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path = FILE) -> Predictor:
        """Read a file of this schema. Raises :class:`ValueError` for another one."""
        record = json.loads(path.read_text())
        if record.pop("schema") != SCHEMA:
            raise ValueError(f"{path} has another schema; this version reads {SCHEMA}")
        models = {name: _model(value) for name, value in record.items() if "costs" in value}
        return cls(record["machine"], tuple(record["sources"]), **models)


def _model(record: dict[str, Any]) -> Model:
    return Model(record["costs"], Error(**record["error"]))


@functools.cache
def shipped() -> Predictor:
    """The predictor that comes with the package."""
    return Predictor.load()


# ---- networks of a study


def call_of(shapes: Iterable[LayerShape], *, steps: int, batch: int = 1, calls: int = 1) -> NetCall:
    """A network with these layers and a neuron behind every output, called on ``batch`` images.

    ``calls`` is how often a layer runs: once on all ``steps``, or once a step in a user's own loop over time.

    Raises:
        ValueError: ``calls`` does not divide the steps.

    >>> net = call_of([LayerShape("fc", 128, 10)], steps=25, batch=2, calls=25)
    >>> net.layers[0].rows, net.layers[0].outputs, net.neuron_steps
    (2, 500, 25)
    """
    if steps % calls:
        raise ValueError(f"{steps} steps in {calls} calls: every call has to take as many")
    layers = tuple(LayerCall(shape, batch * steps // calls, calls) for shape in shapes)
    return NetCall(layers, steps * len(layers))


def points_of(study: Study) -> dict[str, list[Point]]:
    """Measured latencies of a study's networks with their terms, by path; a case is a choice with all its seeds."""
    models = shipped().layers
    found: dict[str, list[Point]] = {path: [] for path in PATHS}
    for net in study.nets:
        if net.status is Status.COMPLETE and net.layers:
            case = dataclasses.replace(net.choice, seed=0).name
            for path, terms in _terms_of(net, models).items():
                if path in net.latency:
                    found[path].append(Point(case, terms, net.latency[path][1]))
    return found


def _terms_of(net: Net, models: LayerModels) -> dict[str, Terms]:
    calls = net.steps if net.dense == LOOP else 1
    call = call_of([each.shape for each in net.layers], steps=net.steps, batch=net.batch, calls=calls)
    densities = {each.shape.name: each.density for each in net.layers[1:]}
    return {
        "dense": dense_net_terms(call, models),
        "accelerated": accelerated_net_terms(call, densities, models),
    }


def prediction_error(study: Study) -> dict[str, Error]:
    """Error of what was predicted for a study's networks before (``Net.predicted``), by path."""
    found: dict[str, Error] = {}
    for path in PATHS:
        nets = [net for net in study.nets if path in net.predicted and path in net.latency]
        if nets:
            points = [Point(net.choice.name, {}, net.latency[path][1]) for net in nets]
            found[path] = error_of((net.predicted[path] for net in nets), points)
    return found


def held_out_error(study: Study) -> dict[str, Error]:
    """Error of a calibration of the models of networks to a study's own measurements, by path.

    One choice at a time is held out, with all its seeds, and predicted by costs fitted to the others. A path with fewer
    than two measured choices is left out.
    """
    points = points_of(study)
    enough = {path: found for path, found in points.items() if len({point.case for point in found}) > 1}
    return {path: error_of(held_out(found), found) for path, found in enough.items()}
