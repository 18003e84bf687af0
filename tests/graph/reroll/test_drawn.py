"""Loops whose bodies are drawn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from .loops import Lif, N, Passing, rolled

WIDTH = 4
OPERATIONS = ("fc", "hidden", "passing", "relu", "add", "scale", "back", "norm", "shared", "odd", "previous", "inplace")


class Drawn(nn.Module):
    """A loop whose body is a list of operations on earlier values of the same step, or of the step before."""

    def __init__(self, body, direct, ending):
        super().__init__()
        self.body, self.direct, self.ending = body, direct, ending
        makers = {"hidden": Lif, "passing": Passing, "norm": lambda: nn.BatchNorm1d(WIDTH)}
        self.parts = nn.ModuleList(makers.get(op, lambda: nn.Linear(WIDTH, WIDTH))() for op, _, _ in body)
        self.shared = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        steps = [x] * 3 if self.direct else list(x)
        mems = [None] * len(self.body)
        before = [torch.zeros(N, WIDTH, dtype=x.dtype)] * (len(self.body) + 1)
        outputs = []
        for step in steps:
            values = [step]
            for i, (op, first, second) in enumerate(self.body):
                a, b = values[first % len(values)], values[second % len(values)]
                values.append(self.apply_operation(op, i, a, b, before, mems, second))
            before = values
            outputs.append(values[-1])
        return self.finish(outputs)

    def apply_operation(self, op, i, a, b, before, mems, second):
        if op in ("fc", "norm", "hidden"):
            return self.parts[i](a)
        if op == "passing":
            spike, mems[i] = self.parts[i](a, mems[i])
            return spike
        if op == "back":
            return a + self.parts[i](before[second % len(before)])
        if op == "previous":
            return a - before[second % len(before)]
        if op == "inplace":
            y = self.parts[i](a)
            y += b
            return y
        simple = {
            "relu": lambda: F.relu(a),
            "add": lambda: a + b,
            "scale": lambda: a * 0.5,
            "shared": lambda: self.shared(a),
            "odd": lambda: torch.flip(a, (1,)),
        }
        return simple[op]()

    def finish(self, outputs):
        if self.ending == "stack":
            return torch.stack(outputs)
        if self.ending == "sum":
            return sum(outputs)
        return outputs[-1], outputs[0]


bodies = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=7)


@settings(max_examples=80, deadline=None)
@given(body=bodies, direct=st.booleans(), ending=st.sampled_from(["stack", "sum", "last"]), seed=st.integers(0, 99))
def test_drawn_networks(body, direct, ending, seed):
    torch.manual_seed(seed)
    net = Drawn(body, direct, ending).double().eval()
    rolled(net, torch.rand(*([] if direct else [3]), N, WIDTH, dtype=torch.float64))
