"""What a run of a network shows of its layers and neurons."""

from __future__ import annotations

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import sparseflow
from sparseflow.bench.suites.loops import recurrent_net
from sparseflow.study.records import LayerShape
from sparseflow.study.shapes import LayerCall, shapes_of, trace


def multi_step() -> nn.Module:
    """``[T, N, 2, 8, 8]`` to ``[T, N, 10]``."""
    net = nn.Sequential(
        layer.Conv2d(2, 4, 3, stride=2, padding=1),
        neuron.LIFNode(),
        layer.Flatten(),
        layer.Linear(4 * 4 * 4, 10),
        neuron.IFNode(),
    )
    functional.set_step_mode(net, "m")
    return net.eval()


class Loop(nn.Module):
    """Images ``[N, 8]``, seen five times."""

    def __init__(self):
        super().__init__()
        self.fc, self.lif = nn.Linear(8, 3), snn.Leaky(beta=0.9)

    def forward(self, x):
        membrane = self.lif.init_leaky()
        for _ in range(5):
            spikes, membrane = self.lif(self.fc(x), membrane)
        return spikes


def test_multi_step_network_has_time_in_its_rows():
    call = trace(multi_step(), torch.zeros(4, 3, 2, 8, 8))
    conv = LayerShape("0", 2, 4, (3, 3), (2, 2), (1, 1), in_size=(8, 8), out_size=(4, 4))
    assert call.layers == (LayerCall(conv, 12), LayerCall(LayerShape("3", 64, 10), 12))
    assert [each.outputs for each in call.layers] == [12 * 64, 12 * 10]
    assert call.neuron_steps == 2 * 4


def test_loop_over_time_calls_a_layer_at_each_step():
    call = trace(Loop(), torch.zeros(6, 8))
    assert call.layers == (LayerCall(LayerShape("fc", 8, 3), rows=6, calls=5),)
    assert (call.layers[0].outputs, call.neuron_steps) == (5 * 6 * 3, 5)


def test_a_recurrent_layer_runs_at_each_step_when_fused():
    net = recurrent_net(8, 1)
    (forward, recurrent, readout) = trace(net, torch.zeros(5, 2, 8)).layers
    assert (forward.calls, recurrent.calls, readout.calls) == (5, 5, 5)
    assert (forward.fused_calls, recurrent.fused_calls, readout.fused_calls) == (1, 5, 1)


def test_model_is_as_before():
    net, calls = multi_step(), []
    x = (torch.rand(4, 3, 2, 8, 8) < 0.5).float()
    functional.reset_net(net)
    net(x)
    before = net[1].v.clone()
    net.register_forward_hook(lambda *_: calls.append(1))
    trace(net, x)
    assert net[1].v.equal(before)
    assert calls == []
    assert len(net._forward_hooks) == 1
    assert not net[0]._forward_hooks


def test_accelerated_network_shows_its_layers():
    net, x = multi_step(), torch.zeros(4, 3, 2, 8, 8)
    plain = trace(net, x)
    functional.reset_net(net)
    assert trace(sparseflow.accelerate(net, x, backend="torch", mode="sparse"), x) == plain


def test_layer_with_two_input_sizes_is_there_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3)

        def forward(self, x):
            return self.conv(self.conv(input=x))

    call = trace(Twice(), torch.zeros(2, 1, 9, 9))
    assert [layer.shape.out_size for layer in call.layers] == [(7, 7), (5, 5)]
    assert call.names == ("conv",)


@pytest.mark.parametrize(
    ("conv", "size", "expected"),
    [
        (nn.Conv1d(2, 3, 5, padding=2), (1, 2, 16), LayerShape("", 2, 3, (1, 5), (1, 1), (0, 2), 1, (1, 16), (1, 16))),
        (
            nn.Conv3d(2, 3, (1, 3, 3), padding=(0, 1, 1)),
            (1, 2, 4, 6, 6),
            LayerShape("", 2, 3, (3, 3), (1, 1), (1, 1), 1, (24, 6), (24, 6)),
        ),
        (
            nn.Conv2d(4, 4, 4, padding="same", groups=2),
            (1, 4, 8, 8),
            LayerShape("", 4, 4, (4, 4), (1, 1), (2, 2), 2, (8, 8), (8, 8)),
        ),
        (nn.Conv2d(1, 1, 2, padding="valid"), (1, 8, 8), LayerShape("", 1, 1, (2, 2), in_size=(8, 8), out_size=(7, 7))),
    ],
)
def test_convolutions_of_every_kind(conv, size, expected):
    (call,) = trace(conv, torch.zeros(size)).layers
    assert call == LayerCall(expected, rows=1)


def test_multiply_adds_are_those_of_the_definition():
    call = LayerCall(LayerShape("c", 4, 6, (3, 3), groups=2, in_size=(5, 5), out_size=(3, 3)), rows=7, calls=2)
    assert call.weights == nn.Conv2d(4, 6, 3, groups=2).weight.numel()
    assert call.macs == 7 * 9 * 6 * 2 * 9
    assert call.total_rows == 14


def test_rows_of_a_linear_layer_are_all_leading_indices():
    (call,) = trace(nn.Linear(8, 2), torch.zeros(4, 3, 5, 8)).layers
    assert call.rows == 60


def test_shapes_alone():
    assert [shape.name for shape in shapes_of(multi_step(), torch.zeros(4, 3, 2, 8, 8))] == ["0", "3"]


@pytest.mark.parametrize("model", [nn.ReLU(), nn.ConvTranspose2d(1, 1, 2)])
def test_nothing_to_predict(model):
    with pytest.raises(ValueError, match="no convolution or linear layer of this"):
        trace(model, torch.zeros(1, 1, 4, 4))
