"""The propagation table: what it says of an operation's result must be true of the values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparseflow.graph.provenance import Label, op_name
from sparseflow.graph.recorder import LabelMode, Recorder
from sparseflow.plan import Provenance

BINARY, INTEGER, SPARSE, DENSE = Provenance.BINARY, Provenance.INTEGER, Provenance.SPARSE, Provenance.DENSE


def spikes(seed, *shape):
    return torch.bernoulli(torch.full(shape, 0.3), generator=torch.Generator().manual_seed(seed))


def labelled(func, *operands):
    """Result of ``func`` on operands ``(tensor, provenance)``, and the label it got."""
    recorder = Recorder(nn.Identity())
    for index, (tensor, provenance) in enumerate(operands):
        recorder._labels[tensor] = Label(provenance, (f"x{index}",))
    with LabelMode(recorder):
        result = func(*(tensor for tensor, _ in operands))
    return result, recorder.label_of(result)


def written(x, y):
    out = torch.zeros(2, *x.shape)
    out[0] = x
    out[1] = y
    return out


def in_place(x, y):
    out = x.clone()
    out += y
    return out


# What the table says of two {0, 1} operands [N, C, H, W].
OPERATIONS = {
    "add": (lambda x, y: x + y, INTEGER),
    "add method": (lambda x, y: x.add(y), INTEGER),
    "add scaled": (lambda x, y: torch.add(x, y, alpha=2.5), SPARSE),
    "add in place": (in_place, INTEGER),
    "add one": (lambda x, y: x + 1, DENSE),
    "python sum": (lambda x, y: sum([x, y]), INTEGER),
    "sub": (lambda x, y: x - y, INTEGER),
    "one minus": (lambda x, y: 1 - x, DENSE),
    "and not": (lambda x, y: (1 - x) * y, SPARSE),
    "mul": (lambda x, y: x * y, BINARY),
    "scale": (lambda x, y: 0.5 * x, SPARSE),
    "scale in place": (lambda x, y: x.clone().mul_(0.5), SPARSE),
    "div": (lambda x, y: x / 3, SPARSE),
    "and": (lambda x, y: x.bool() & y.bool(), BINARY),
    "or": (lambda x, y: torch.logical_or(x, y), BINARY),
    "sum over channels": (lambda x, y: x.sum(1), INTEGER),
    "mean": (lambda x, y: x.mean((2, 3)), SPARSE),
    "max pool": (lambda x, y: F.max_pool2d(x, 2), BINARY),
    "avg pool": (lambda x, y: F.avg_pool2d(x, 2), SPARSE),
    "adaptive avg pool": (lambda x, y: F.adaptive_avg_pool2d(x, 1), SPARSE),
    "relu": (lambda x, y: F.relu(x), BINARY),
    "tanh": (lambda x, y: torch.tanh(x), SPARSE),
    "sigmoid": (lambda x, y: torch.sigmoid(x), DENSE),
    "softmax": (lambda x, y: x.softmax(1), DENSE),
    "flatten": (lambda x, y: x.flatten(1), BINARY),
    "view of view": (lambda x, y: x.view(x.shape[0], -1).unsqueeze(0).transpose(0, 1), BINARY),
    "cat": (lambda x, y: torch.cat([x, y], 1), BINARY),
    "stack": (lambda x, y: torch.stack([x, y]), BINARY),
    "chunk": (lambda x, y: x.chunk(2, 1)[1], BINARY),
    "index": (lambda x, y: x[:, ::2, 1:], BINARY),
    "index by tensor": (lambda x, y: x[:, torch.tensor([1, 0])], BINARY),
    "expand": (lambda x, y: x.unsqueeze(0).expand(3, *x.shape), BINARY),
    "repeat": (lambda x, y: x.repeat(2, 1, 1, 1), BINARY),
    "permute property": (lambda x, y: x.mT, BINARY),
    "upsample nearest": (lambda x, y: F.interpolate(x, scale_factor=2), BINARY),
    "upsample bilinear": (lambda x, y: F.interpolate(x, scale_factor=2, mode="bilinear"), SPARSE),
    "pad zero": (lambda x, y: F.pad(x, (1, 1)), BINARY),
    "pad one": (lambda x, y: F.pad(x, (1, 1), value=1.0), DENSE),
    "dropout eval": (lambda x, y: F.dropout(x, 0.5, training=False), BINARY),
    "dropout train": (lambda x, y: F.dropout(x, 0.5, training=True), SPARSE),
    "written into zeros": (written, BINARY),
    "where zero": (lambda x, y: torch.where(y > 0, x, 0.0), BINARY),
    "where one": (lambda x, y: torch.where(y > 0, x, 1.0), DENSE),
    "masked fill": (lambda x, y: x.masked_fill(y > 0, 0.0), BINARY),
    "clamp": (lambda x, y: x.clamp(0, 0.5), SPARSE),
    "clamp away from zero": (lambda x, y: x.clamp(min=0.1), DENSE),
    "clamp max": (lambda x, y: x.clamp_max(0.5), SPARSE),
    "matmul": (lambda x, y: x @ y.mT, DENSE),
    "einsum": (lambda x, y: torch.einsum("nchw,ncvw->nchv", x, y), DENSE),
    "convolution": (lambda x, y: F.conv2d(x, torch.ones(1, x.shape[1], 1, 1)), DENSE),
    "batch norm": (lambda x, y: F.batch_norm(x, torch.zeros(x.shape[1]), torch.ones(x.shape[1])), DENSE),
    "detach": (lambda x, y: x.detach(), BINARY),
    "to": (lambda x, y: x.to(torch.float64), BINARY),
    "max of two": (lambda x, y: torch.maximum(x, y), BINARY),
    "cumsum": (lambda x, y: x.cumsum(0), INTEGER),
    "rate code": (lambda x, y: torch.bernoulli(x * 0.2), BINARY),
}
shapes = st.tuples(st.integers(1, 3), st.integers(2, 4), st.integers(2, 5), st.integers(2, 5))


@pytest.mark.parametrize("name", OPERATIONS)
def test_label_of_an_operation_on_spikes(name):
    func, expected = OPERATIONS[name]
    _, label = labelled(func, (spikes(1, 2, 4, 4, 4), BINARY), (spikes(2, 2, 4, 4, 4), BINARY))
    assert label.provenance is expected


@pytest.mark.parametrize("name", OPERATIONS)
@settings(max_examples=10, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**16))
def test_label_is_true_of_the_values(name, shape, seed):
    func, _ = OPERATIONS[name]
    result, label = labelled(func, (spikes(seed, *shape), BINARY), (spikes(seed + 1, *shape), BINARY))
    if label.provenance is BINARY:
        assert set(result.double().unique().tolist()) <= {0.0, 1.0}
    elif label.provenance is INTEGER:
        assert torch.equal(result, result.round())
    elif label.provenance is SPARSE:
        silent = torch.zeros(shape)
        assert not labelled(func, (silent, BINARY), (silent, BINARY))[0].any(), "no zeros are preserved"


@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_is_known_of_a_result_of_dense_operands(name):
    func, _ = OPERATIONS[name]
    operand = spikes(1, 2, 4, 4, 4)
    _, label = labelled(func, (operand, DENSE), (operand.clone(), DENSE))
    assert label.provenance in ((BINARY,) if name == "rate code" else (DENSE,))


@settings(max_examples=30, deadline=None)
@given(left=st.sampled_from(Provenance), right=st.sampled_from(Provenance))
def test_joins_are_no_better_than_the_worst_operand(left, right):
    x, y = spikes(1, 2, 4, 4, 4), spikes(2, 2, 4, 4, 4)
    for name in ("add", "cat", "stack", "written into zeros", "max of two"):
        _, label = labelled(OPERATIONS[name][0], (x, left), (y, right))
        assert label.provenance is min(left, right, OPERATIONS[name][1]), name
    _, product = labelled(OPERATIONS["mul"][0], (x, left), (y, right))
    assert product.provenance >= min(max(left, right), SPARSE), "one sparse factor is enough"


def test_sources_name_what_was_joined():
    operands = [(spikes(i, 2, 4, 4, 4), BINARY) for i in range(5)]
    _, label = labelled(lambda *xs: torch.cat(xs).flatten(1), *operands[:2])
    assert label.describe() == "cat(x0, x1)"
    _, label = labelled(lambda *xs: sum(xs), *operands)
    assert label.describe() == "add(x0, x1, x2, and 2 more)"


@pytest.mark.parametrize(
    ("func", "name"),
    [
        (torch.Tensor.__radd__, "add"),
        (torch.Tensor.__imul__, "mul"),
        (torch.Tensor.relu_, "relu"),
        (torch.Tensor.__getitem__, "getitem"),
        (torch.Tensor.__rsub__, "rsub"),
        (torch.Tensor.data.__get__, "data"),
        (F.max_pool2d, "max_pool2d"),
    ],
)
def test_one_name_for_every_spelling(func, name):
    assert op_name(func) == name
