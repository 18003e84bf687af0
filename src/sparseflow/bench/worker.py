"""Times cases with whatever sparseflow is on the path: one side of a comparison of two commits.

Run as a script, not imported: it has to work with a commit that has no benchmark, so it knows nothing but PyTorch and
``sparseflow.accelerate`` and ``register_neuron``. A line of JSON comes in, a line goes out:
``{"do": "load", "case": {...}}`` builds, checks and warms a case up, ``{"do": "time", "calls": n}`` gives its times in
ms. A case is a layer (``kind``, ``arguments``, ``options``, ``size``, ``density``) behind a threshold, or what
``load_checkpoint()`` of a ``module`` gives, with inputs saved at ``path``; ``resets`` is for SpikingJelly's networks.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import sparseflow

_INPUTS, _WARM_UP = 4, 5
_TOLERANCE = 1e-4  # of the largest output: what rounding may do, and no missing or doubled term


class Threshold(nn.Module):
    """A neuron without memory: the layer behind it is fed by spikes."""

    def forward(self, v: Tensor) -> Tensor:
        return (v >= 1.0).to(v.dtype)


class Timed:
    """A network, its inputs, and a check of its answers against those of the dense one."""

    def __init__(self, case: dict[str, Any]):
        self.is_layer = "path" not in case
        dense, self.inputs = _layer(case) if self.is_layer else _network(case)
        self.resets = case.get("resets", False)
        with torch.no_grad():
            expected = [self._answer(dense, x) for x in self.inputs]
            self.net = sparseflow.accelerate(copy.deepcopy(dense), self.inputs[0])
            self.why = self._differences(expected, [self._answer(self.net, x) for x in self.inputs])
            self.times(_WARM_UP)

    def times(self, calls: int) -> list[float]:
        """Milliseconds of each of so many calls; the network is reset before, outside the timer."""
        found = []
        with torch.no_grad():
            for call in range(calls):
                x = self.inputs[call % len(self.inputs)]
                self._reset(self.net)
                start = time.perf_counter_ns()
                self.net(x)
                found.append((time.perf_counter_ns() - start) / 1e6)
        return found

    def _reset(self, net: nn.Module) -> None:
        if self.resets:
            for module in net.modules():
                if hasattr(module, "reset"):
                    module.reset()  # pyright: ignore[reportCallIssue]

    def _answer(self, net: nn.Module, x: Tensor) -> Tensor:
        """Sums of a layer; of a network the logits ``[N, C]``, summed over time."""
        self._reset(net)
        output = net(x)
        output = output[0] if isinstance(output, tuple) else output
        return (output if self.is_layer else output.sum(0)).clone()

    def _differences(self, expected: list[Tensor], found: list[Tensor]) -> str:
        """Why the answers are wrong; empty where they are right."""
        theirs, ours = torch.cat(expected), torch.cat(found)
        if self.is_layer:
            error = float((ours - theirs).abs().max() / theirs.abs().max())
            return "" if error <= _TOLERANCE else f"the outputs differ by {error:.2g} of the largest"
        changed = int((ours.argmax(1) != theirs.argmax(1)).sum())
        return f"another class in {changed} of {len(ours)} images" if changed else ""


def _layer(case: dict[str, Any]) -> tuple[nn.Module, list[Tensor]]:
    sparseflow.register_neuron(Threshold, overwrite=True)
    torch.manual_seed(0)
    layer = getattr(nn, case["kind"])(*case["arguments"], **case["options"])
    inputs = [(torch.rand(case["size"]) < case["density"]).float() for _ in range(_INPUTS)]
    return nn.Sequential(Threshold(), layer).eval(), inputs


def _network(case: dict[str, Any]) -> tuple[nn.Module, list[Tensor]]:
    inputs = torch.load(case["path"], weights_only=True)
    return importlib.import_module(case["module"]).load_checkpoint(), inputs


def main(threads: str) -> None:
    """Answer requests until the input ends."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(threads))
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not an answer
    timed: Timed | None = None
    print(json.dumps({"package": sparseflow.__file__}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                timed = None
                timed = Timed(request["case"])
                answer: dict[str, Any] = {"why": timed.why}
            else:
                assert timed is not None
                answer = {"ms": timed.times(request["calls"])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
