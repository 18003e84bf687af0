"""What the sparse path refuses, judged from the module alone, and with which reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from sparseflow.graph import candidates, layer_kind, refuse
from sparseflow.plan import Reason


class OwnForward(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) * 2


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight * 2, bias)


class OwnLinear(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


class OwnInit(nn.Linear):
    """Changes nothing about the forward."""

    def reset_parameters(self):
        nn.init.zeros_(self.weight)


def replaced():
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x
    return layer


def quantised():
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Foreign))
    return layer


class Foreign(torch.Tensor):
    pass


REFUSED = {
    "transposed": (lambda: nn.ConvTranspose2d(2, 2, 3), Reason.TRANSPOSED),
    "circular": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), Reason.PADDING_MODE),
    "reflect": (lambda: nn.Conv1d(2, 2, 3, padding=1, padding_mode="reflect"), Reason.PADDING_MODE),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), Reason.PARAMETRIZED),
    "old weight norm": (lambda: nn.utils.weight_norm(nn.Conv2d(2, 2, 3)), Reason.PARAMETRIZED),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(2, 2, 3)), Reason.PARAMETRIZED),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), Reason.PARAMETRIZED),
    "own forward": (lambda: OwnForward(2, 2, 3), Reason.CUSTOM_FORWARD),
    "own _conv_forward": (lambda: OwnConvForward(2, 2, 3), Reason.CUSTOM_FORWARD),
    "own linear": (lambda: OwnLinear(2, 2), Reason.CUSTOM_FORWARD),
    "forward replaced": (replaced, Reason.CUSTOM_FORWARD),
    "foreign weight": (quantised, Reason.CUSTOM_FORWARD),
    "lazy": (lambda: nn.LazyConv2d(2, 3), Reason.NEVER_RUN),
}
TAKEN = {
    "conv1d": lambda: nn.Conv1d(2, 2, 3),
    "conv2d": lambda: nn.Conv2d(4, 4, 3, 2, "valid", 2, 4, False),
    "conv3d": lambda: nn.Conv3d(2, 2, 3),
    "linear": lambda: nn.Linear(2, 2, bias=False),
    "subclass that keeps forward": lambda: OwnInit(2, 2),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_reason_and_detail(name):
    make, reason = REFUSED[name]
    found, detail = refuse(make())
    assert found is reason
    assert detail


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name):
    assert refuse(TAKEN[name]()) is None


def test_lazy_layer_is_taken_after_its_first_forward():
    layer = nn.LazyConv2d(2, 3)
    layer(torch.rand(1, 2, 4, 4))
    assert refuse(layer) is None


def test_spikingjelly_wrappers():
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    for wrapper in (layer.Conv1d, layer.Conv2d, layer.Conv3d):
        assert refuse(wrapper(2, 2, 3, step_mode="m")) is None
    assert refuse(layer.Linear(2, 2)) is None
    assert refuse(layer.WSConv2d(2, 2, 3))[0] is Reason.PARAMETRIZED
    assert refuse(layer.WSLinear(2, 2))[0] is Reason.PARAMETRIZED
    assert refuse(layer.ConvTranspose2d(2, 2, 3))[0] is Reason.TRANSPOSED


def test_other_modules_are_a_type_error():
    assert layer_kind(nn.BatchNorm2d(2)) is None
    with pytest.raises(TypeError, match="neither a convolution nor a linear layer"):
        refuse(nn.BatchNorm2d(2))


def test_candidates_are_all_layers_once():
    shared = nn.Linear(2, 2)
    net = nn.Sequential(shared, nn.ReLU(), shared, nn.ConvTranspose2d(1, 1, 1), nn.MultiheadAttention(4, 2))
    assert list(candidates(net)) == ["0", "3", "4.out_proj"]
