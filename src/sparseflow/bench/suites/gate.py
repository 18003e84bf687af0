"""Whether an accelerated network answers like the dense one: checked before any time is reported.

Three networks see the same inputs: the oracle (the dense network in float64), the dense network in fp32, and the
accelerated one. Rounding may flip a spike whose membrane potential is within rounding of the threshold, in the dense
network as well; one flip then cascades through the layers behind it. A gate is red when

- a sparse layer or fused block, fed with its own input, leaves its float64 error budget (:func:`sparseflow.verify`);
- the *first* flips of an image (its first layer with any, at the first time step) lie farther from the threshold than
  the error budget of that membrane;
- an image whose membranes end inside their budgets has logits outside theirs, or another class;
- far more images end outside the budgets than twice the dense network's own.

A budget is twice the dense network's worst error in that layer and a rounding band: ``(sqrt(n) + 1) u`` times the sum
of the magnitudes of all terms so far, ``u`` being half of float32's epsilon and ``n`` the largest number of terms of
any sum (as in :func:`sparseflow.kernels.reference.error_budget`).
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import sparseflow
from sparseflow.frameworks import neuron_spec

from .baselines import Workload, in_dtype
from .watch import Layers, Seen, magnitudes, neurons, see

_NEURON_ROUNDINGS = 8  # operations between a sum and the comparison with the threshold
_DECADES = range(-8, 2)
_EPS = torch.finfo(torch.float32).eps


@dataclasses.dataclass
class Tally:
    """What was counted of one network against the oracle. Errors are in units of their budgets: at most 1 is right."""

    images: int = 0
    agreeing: int = 0
    left: int = 0
    odd: int = 0
    flips: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    outputs: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    distances: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    first_flip_in_budgets: float = 0.0
    logits_in_budgets: float = 0.0
    largest_logit_error: float = 0.0
    checked_layers: int = 0
    worst_layer_in_budgets: float = 0.0
    failure: str = ""
    watched: str = ""


def first_flips(ours: Layers, theirs: Layers) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of every layer: name, the flips that no other flip can have caused, and the images that had none up to here.

    Layers come in order of execution; a flip acts on the layers behind it, and on later time steps of its own.
    """
    clean: Tensor | None = None
    for name, spikes in theirs.items():
        flips = ours[name] != spikes
        by_step = flips.flatten(2).any(2)
        clean = torch.ones_like(by_step[0]) if clean is None else clean
        first = by_step & (by_step.cumsum(0) == 1) & clean
        clean = clean & ~by_step.any(0)
        yield name, flips & first.reshape(*first.shape, *[1] * (flips.ndim - 2)), clean


@dataclasses.dataclass
class Budget:
    """Largest admissible errors: of membrane potentials ``[T, N, ...]`` by layer, and of the readout ``[N, C]``."""

    potentials: Layers
    readout: Tensor

    def left(self, seen: Seen, exact: Seen) -> Tensor:
        """``[N]``: images with a membrane outside its budget at the end, which is what a flip leaves behind."""
        errors = {name: (seen.ends[name] - end).abs() > self.potentials[name][-1] for name, end in exact.ends.items()}
        return torch.stack([outside.flatten(1).any(1) for outside in errors.values()]).any(0)


def budget_of(workload: Workload, oracle: nn.Module, x: Tensor, dense: Seen, exact: Seen) -> Budget:
    """Of one input: from the dense network's errors in the images without a flip, and the magnitudes of all terms."""
    sums, answer = magnitudes(workload, oracle, x, exact.spikes)
    share = (math.sqrt(_largest_sum(oracle)) + 1) * _EPS / 2
    found, clean = {}, torch.ones(len(answer), dtype=torch.bool)
    for name, _, clean in first_flips(dense.spikes, exact.spikes):
        errors = (dense.potentials[name] - exact.potentials[name]).abs()[:, clean]
        rounding = share * sums[name].cumsum(0) + _NEURON_ROUNDINGS * _EPS * exact.potentials[name].abs()
        found[name] = 2 * _largest(errors) + rounding
    errors = (dense.readout - exact.readout).abs()[clean]
    return Budget(found, 2 * _largest(errors) + share * answer)


def _largest_sum(net: nn.Module) -> int:
    """Terms of one output, over all layers."""
    return max(p[0].numel() for p in net.parameters() if p.ndim > 1)


def _largest(errors: Tensor) -> float:
    return float(errors.max()) if errors.numel() else 0.0


def threshold(module: nn.Module) -> Tensor:
    """Of the neuron, in float64."""
    spec = neuron_spec(module)
    assert spec is not None
    return torch.as_tensor(spec.threshold).double()


def decade(distance: float) -> int:
    """Order of magnitude of ``|v - threshold| / threshold``, within the histogram.

    >>> decade(3e-7), decade(0.0), decade(40.0)
    (-7, -8, 1)
    """
    return min(max(math.floor(math.log10(distance)), _DECADES[0]), _DECADES[-1]) if distance > 0 else _DECADES[0]


class Judge:
    """Compares networks with the oracle, input by input."""

    def __init__(self, workload: Workload):
        self.workload = workload
        self.dense, self.oracle = workload.build(), in_dtype(workload.build(), torch.float64)
        self.thresholds = {name: threshold(module) for name, module in neurons(self.oracle).items()}
        self.tallies: dict[str, Tally] = collections.defaultdict(Tally)
        self.nonzero: collections.Counter[str] = collections.Counter()

    def compare(self, nets: dict[str, nn.Module], x: Tensor) -> None:
        """Count one input of the dense network and of every other."""
        exact = see(self.workload, self.oracle, x.double(), potentials=True)
        dense = see(self.workload, self.dense, x, potentials=True)
        budget = budget_of(self.workload, self.oracle, x.double(), dense, exact)
        self.nonzero.update({name: int(spikes.sum()) for name, spikes in dense.spikes.items()})
        self._count("dense", dense, dense, exact, budget)
        for name, net in nets.items():
            seen = see(self.workload, net, x)
            spikes = {layer: seen.spikes[layer].reshape(theirs.shape) for layer, theirs in exact.spikes.items()}
            self._count(name, dataclasses.replace(seen, spikes=spikes), dense, exact, budget)

    def _count(self, name: str, seen: Seen, dense: Seen, exact: Seen, budget: Budget) -> None:
        tally, left = self.tallies[name], budget.left(seen, exact)
        same = seen.readout.argmax(1) == dense.readout.argmax(1)
        tally.images += len(left)
        tally.watched = seen.watched
        tally.agreeing += int(same.sum())
        tally.left += int(left.sum())
        tally.odd += int((~same & ~left & ~budget.left(dense, exact)).sum())
        errors = (seen.readout - exact.readout).abs()
        tally.largest_logit_error = max(tally.largest_logit_error, float(errors.max()))
        tally.logits_in_budgets = max(tally.logits_in_budgets, _largest((errors / budget.readout)[~left]))
        self._count_flips(tally, seen, exact, budget)

    def _count_flips(self, tally: Tally, seen: Seen, exact: Seen, budget: Budget) -> None:
        for name, first, _ in first_flips(seen.spikes, exact.spikes):
            flips = seen.spikes[name] != exact.spikes[name]
            distance = (exact.potentials[name] - self.thresholds[name]).abs()
            tally.flips[name] += int(flips.sum())
            tally.outputs[name] += flips.numel()
            tally.distances.update(decade(float(d)) for d in distance[flips] / self.thresholds[name])
            worst = _largest((distance / budget.potentials[name])[first])
            tally.first_flip_in_budgets = max(tally.first_flip_in_budgets, worst)

    def teacher_forced(self, nets: dict[str, nn.Module], x: Tensor) -> None:
        """Check every sparse layer of the networks on its own input against float64."""
        for name, net in nets.items():
            tally = self.tallies[name]
            self.workload.reset(net)
            with sparseflow.verify(net) as watch:
                try:
                    net(x)
                except sparseflow.MismatchError as error:
                    tally.failure = str(error)
            tally.checked_layers += watch.checked
            tally.worst_layer_in_budgets = max(tally.worst_layer_in_budgets, watch.worst)

    @property
    def densities(self) -> dict[str, float]:
        """Firing rate of every neuron layer of the dense network, in order of execution."""
        outputs = self.tallies["dense"].outputs
        return {name: self.nonzero[name] / outputs[name] for name in outputs}


def reasons(ours: Tally, dense: Tally) -> list[str]:
    """Why the gate is red; empty when it is green."""
    allowed = 2 * dense.left + 3 * math.sqrt(2 * dense.left) + 3  # of a Poisson count with twice the mean
    checks = {
        ours.failure: bool(ours.failure),
        f"a first flip {ours.first_flip_in_budgets:.3g} budgets from the threshold": ours.first_flip_in_budgets > 1,
        f"logits {ours.logits_in_budgets:.3g} budgets off without a flip": ours.logits_in_budgets > 1,
        f"another class without a flip in {ours.odd} images": ours.odd > 0,
        f"{ours.left} of {ours.images} images left their budgets, {dense.left} dense": ours.left > allowed,
    }
    return [text for text, red in checks.items() if red]


def judged(workload: Workload, nets: dict[str, nn.Module]) -> Judge:
    """Run every input of the workload through the oracle, the dense network and ``nets``."""
    judge = Judge(workload)
    with torch.no_grad():
        judge.teacher_forced(nets, workload.inputs[0])
        for x in workload.inputs:
            judge.compare(nets, x)
    return judge


def verdict(judge: Judge, name: str) -> dict[str, Any]:
    """The gate of one network as JSON: green or why not, and every figure behind it."""
    tally = judge.tallies[name]
    why = reasons(tally, judge.tallies["dense"]) if name != "dense" else []
    histogram = {f"1e{power}": tally.distances[power] for power in _DECADES}
    return {
        "green": not why,
        "why": why,
        "agreement": tally.agreeing / tally.images,
        **vars(tally),
        "distances": histogram,
    }
