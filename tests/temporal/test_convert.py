"""Networks aggregated whole: what is found, what is refused, and what is decided from data."""

from __future__ import annotations

import copy

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import sparseflow
from sparseflow.graph.stepping import reset
from sparseflow.temporal import TAC, TACTP, Mode
from sparseflow.temporal.convert import scores

STEPS = 8


def lif():
    return neuron.LIFNode(tau=2.0, step_mode="m")


class Convolutional(nn.Module):
    """SpikingJelly in multi-step mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            layer.Conv2d(1, 4, 3, padding=1, bias=False, step_mode="m"),
            layer.BatchNorm2d(4, step_mode="m"),
            lif(),
            layer.AvgPool2d(2, step_mode="m"),
            layer.Conv2d(4, 6, 3, step_mode="m"),
            lif(),
            layer.Flatten(step_mode="m"),
        )
        self.head = layer.Linear(24, 3, step_mode="m")
        self.body[0].weight.data.abs_()
        self.body[4].weight.data.abs_().mul_(4)

    def forward(self, x):
        return self.head(self.body(x)).mean(0)


class Loop(nn.Module):
    """snnTorch, with its states passed and its loop over time."""

    def __init__(self, pool=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.pool = nn.Conv2d(1, 4, 3), nn.MaxPool2d(2) if pool else nn.Identity()
        self.first, self.second = snn.Leaky(0.8), snn.Leaky(0.7, init_hidden=True)
        self.fc = nn.Linear(36 if pool else 144, 3)
        self.conv.weight.data.abs_()
        self.fc.weight.data.abs_().mul_(2)

    def forward(self, x):
        mem = self.first.init_leaky()
        out = []
        for step in range(x.shape[0]):
            spikes, mem = self.first(self.pool(self.conv(x[step])), mem)
            out.append(self.second(self.fc(spikes.flatten(1))))
        return torch.stack(out)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.c1, self.c2 = (layer.Conv2d(1, 1, 3, padding=1, step_mode="m") for _ in range(2))
        self.n1, self.n2 = lif(), lif()

    def forward(self, x):
        spikes = self.n1(self.c1(x))
        return self.n2(self.c2(spikes) + x).mean(0)


def rate_coded(samples=4, steps=STEPS, side=8):
    rates = torch.rand(samples, 1, side, side, generator=torch.Generator().manual_seed(5))
    return (torch.rand(steps, *rates.shape, generator=torch.Generator().manual_seed(6)) < rates).float()


def moving(samples=4, steps=STEPS, side=8):
    x = torch.zeros(steps, samples, 1, side, side)
    for t in range(steps):
        x[t, :, :, :, [t % side, (t + 1) % side]] = 1
    return x


def blocks(model):
    return [m for m in model.modules() if isinstance(m, (TAC, TACTP))]


def agreement(model):
    """A validation by which the exact network is always right."""
    x = rate_coded(16)
    reset(model)
    labels = scores(model(x)).argmax(-1)
    return x, labels


NETS = {"conv": Convolutional, "loop": Loop}


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
@pytest.mark.parametrize("mode", ["collapse", "preserve"])
def test_groups_of_one_are_the_network(make, mode):
    model, x = make().eval(), rate_coded()
    ours = sparseflow.aggregate(model, x, mode=mode, group_size=1)
    with torch.no_grad():
        for _ in range(2):
            reset(model), reset(ours)
            torch.testing.assert_close(ours(x), model(x))
    assert len(blocks(ours)) == 2


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_preserved_networks_keep_their_outputs_shape_and_run_layers_less(make):
    model, x = make().eval(), rate_coded()
    reset(model)
    expected = model(x)
    ours = sparseflow.aggregate(model, x, mode="preserve", group_size=4)
    frames = []
    for block in blocks(ours):
        block.layer.register_forward_pre_hook(lambda _, args: frames.append(args[0].shape))
    assert ours(x).shape == expected.shape
    assert [block.group_size for block in blocks(ours)] == [4, 4]
    assert all(shape.numel() // x.shape[1] for shape in frames)
    assert all(shape[0] in (2, 2 * 4) for shape in frames)  # [C, N, ...] or [C * N, ...] of two chunks
    assert [row.mode for row in ours.report.layers] == [Mode.PRESERVE] * 2


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_a_collapsed_network_collapses_once_and_later_layers_leak_for_all_steps(make):
    model, x = make().eval(), rate_coded()
    ours = sparseflow.aggregate(model, x, mode="collapse", group_size=4)
    assert [(block.group_size, block.hold) for block in blocks(ours)] == [(4, 1), (1, 4)]
    reset(model)
    out, expected = ours(x), model(x)
    assert out.shape == (expected.shape if make is Convolutional else (2, *expected.shape[1:]))
    assert [row.mode for row in ours.report.layers] == [Mode.COLLAPSE] * 2


def test_another_number_of_frames_than_in_the_example():
    model = Convolutional().eval()
    ours = sparseflow.aggregate(model, rate_coded(), mode="collapse", group_size=4)
    for steps in (3, 12):
        functional.reset_net(ours)
        assert ours(rate_coded(steps=steps)).shape == (4, 3)


def test_the_model_is_left_alone_and_its_copy_trains():
    model, x = Convolutional().train(), rate_coded()
    before = copy.deepcopy(model.state_dict())
    ours = sparseflow.aggregate(model, x, mode="preserve", group_size=2)
    assert ours.training
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    ours(x).square().sum().backward()
    optimizer.step()
    assert all(p.grad is not None for p in ours.parameters())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in model.parameters())


def test_what_is_added_before_the_neuron_stays_exact():
    ours = sparseflow.aggregate(Residual().eval(), rate_coded(), mode="preserve", group_size=2)
    first, second = ours.report.layers
    assert (first.name, first.mode) == ("c1", Mode.PRESERVE)
    assert (second.neuron, second.mode) == ("n2", Mode.EXACT)
    assert "joins its input with something else" in second.note


def test_a_collapse_around_which_a_shortcut_leads_is_refused():
    ours = sparseflow.aggregate(Residual().eval(), rate_coded(), mode="collapse", group_size=2)
    assert blocks(ours) == []
    assert ours.report.mode is Mode.EXACT
    assert "fewer" in ours.report.layers[0].note


def test_single_outputs_of_a_loop_cannot_be_collapsed():
    class Last(Loop):
        def forward(self, x):
            return super().forward(x)[-1]

    x = rate_coded()
    assert sparseflow.aggregate(Last().eval(), x, mode="collapse", group_size=4).report.mode is Mode.EXACT
    assert sparseflow.aggregate(Last().eval(), x, mode="preserve", group_size=4).report.mode is Mode.PRESERVE


def test_pooling_that_is_not_affine_is_said():
    ours = sparseflow.aggregate(Loop(pool=True).eval(), rate_coded(), mode="preserve", group_size=2)
    assert "maximum" in ours.report.layers[0].note
    assert ours.report.layers[1].note == ""


def test_a_layer_that_sees_one_image_is_computed_once_already():
    class Direct(Loop):
        def forward(self, image):
            return super().forward(image.expand(STEPS, *image.shape))

    ours = sparseflow.aggregate(Direct().eval(), rate_coded()[0], mode="preserve", group_size=2)
    notes = {row.name or row.neuron: row for row in ours.report.layers}
    assert notes["fc"].mode is Mode.PRESERVE
    assert len(blocks(ours)) >= 1


class TestAuto:
    def test_rate_coded_input_is_collapsed(self):
        model = Convolutional().eval()
        ours = sparseflow.aggregate(model, rate_coded(16), group_size=4)
        assert ours.report.mode is Mode.COLLAPSE
        assert ours.report.time_share < 0.1

    def test_what_moves_is_preserved(self):
        ours = sparseflow.aggregate(Convolutional().eval(), moving(16), group_size=4)
        assert ours.report.mode is Mode.PRESERVE
        assert ours.report.time_share > 0.5

    def test_order_that_the_classes_need_is_preserved(self):
        """Each frame is drawn for itself, and yet the label depends on which came first."""

        def needs_order(model):
            return 0.5 if type(model).__name__ == "_Shuffled" else 1.0

        ours = sparseflow.aggregate(Convolutional().eval(), rate_coded(16), group_size=4, validate=needs_order)
        assert ours.report.order_drop == 0.5
        assert ours.report.mode is Mode.PRESERVE

    def test_every_layer_gets_the_largest_size_that_is_accurate_enough(self):
        def limited(model):
            sizes = [block.group_size for block in blocks(model)]
            return 1.0 if all(size <= limit for size, limit in zip(sizes, (4, 2), strict=False)) else 0.9

        x = rate_coded(16)
        ours = sparseflow.aggregate(Convolutional().eval(), x, mode="preserve", group_size="auto", validate=limited)
        assert [block.group_size for block in blocks(ours)] == [4, 2]
        assert [row.accuracy for row in ours.report.layers] == [1.0, 1.0]

    def test_nothing_is_accurate_enough(self):
        def never(model):
            return 0.5 if blocks(model) else 1.0

        ours = sparseflow.aggregate(Convolutional().eval(), rate_coded(16), validate=never, max_drop=0.1)
        assert blocks(ours) == []
        assert ours.report.mode is Mode.EXACT
        assert ours.report.accuracy == (1.0, 1.0)
        assert all("50.0%" in row.note for row in ours.report.layers)

    def test_accuracy_from_batches(self):
        model = Convolutional().eval()
        x = rate_coded(16)
        with torch.no_grad():
            labels = model(x).argmax(-1)
        ours = sparseflow.aggregate(model, x, group_size=2, validate=[(x, labels), (x[:, :4], labels[:4])], max_drop=1)
        before, after = ours.report.accuracy
        assert before == 1.0
        assert after == ours.report.layers[0].accuracy

    def test_an_iterator_of_batches_serves_every_trial(self):
        model, x = Convolutional().eval(), rate_coded(16)
        with torch.no_grad():
            labels = model(x).argmax(-1)
        ours = sparseflow.aggregate(model, x, group_size=2, validate=iter([(x, labels)]), max_drop=1)
        assert ours.report.accuracy[0] == 1.0
        assert len(blocks(ours)) == 2

    def test_no_samples(self):
        with pytest.raises(ValueError, match="no samples"):
            sparseflow.aggregate(Convolutional().eval(), rate_coded(16), group_size=2, validate=[])


def test_the_report_counts_spikes_and_times():
    model, x = Convolutional().eval(), rate_coded()
    report = sparseflow.aggregate(model, x, mode="preserve", group_size=2).report
    fired = []
    model.body[2].register_forward_hook(lambda *call: fired.append(float(call[2].sum())))
    functional.reset_net(model)
    model(x)
    first = report.layers[0]
    assert first.spikes[0] == fired[0] > 0
    assert first.drift == first.spikes[1] / first.spikes[0]
    assert min(*first.ms, *report.ms) > 0
    text = str(report)
    assert "preserve (lossy)" in text
    assert "body.0" in text
    assert f"{first.drift:.2f}x" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "other"}, "mode must be"),
        ({"group_size": 0}, "positive number"),
        ({"group_size": "auto"}, "needs validate"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        sparseflow.aggregate(Convolutional().eval(), rate_coded(), **arguments)
