"""Computing what a record describes gives the framework's spikes and membrane, bit for bit."""

from __future__ import annotations

import pytest
import torch

from sparseflow.frameworks import Charge, Reset, ResetTiming, neuron_spec

T, N, C = 6, 5, 8


def charged(spec, v, x):
    r = spec.reset_value if spec.reset is Reset.HARD else 0.0
    d = spec.decay
    match spec.charge:
        case Charge.INTEGRATE:
            return v + x
        case Charge.LEAK_INPUT:
            return v + (x - (v - r)) / d
        case Charge.LEAK:
            return v - (v - r) / d + x
        case Charge.LEAK_INPUT_RATE:
            return v + (x - (v - r)) * d
        case Charge.LEAK_RATE:
            return v - (v - r) * d + x
        case Charge.DECAY:
            return d * v + x
    raise AssertionError(spec.charge)


def fires(spec, v):
    return (v >= spec.threshold if spec.comparator == ">=" else v > spec.threshold).to(v.dtype)


def simulate(spec, x_seq):
    """Spikes [T, N, C] and last membrane of the neuron a record describes."""
    v = torch.full_like(x_seq[0], spec.reset_value)
    spikes = []
    for x in x_seq:
        if spec.reset_timing is ResetTiming.NEXT_STEP:
            late = fires(spec, v)
            if spec.reset is Reset.HARD:
                v = (1 - late) * v
            v = charged(spec, v, x)
            if spec.reset is Reset.SOFT:
                v = v - late * spec.threshold
            spikes.append(fires(spec, v))
            continue
        v = charged(spec, v, x)
        s = fires(spec, v)
        v = s * spec.reset_value + (1 - s) * v if spec.reset is Reset.HARD else v - s * spec.threshold
        spikes.append(s)
    return torch.stack(spikes), v


def compare(spec, x_seq, spikes, membrane):
    assert spec.described
    expected, v = simulate(spec, x_seq)
    assert 0 < expected.mean() < 1
    assert torch.equal(spikes, expected)
    assert torch.equal(membrane, v)


@pytest.mark.parametrize("v_reset", [None, 0.0, -0.3])
@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("name", ["IFNode", "LIFNode", "ParametricLIFNode"])
@torch.no_grad()
def test_spikingjelly(name, decay_input, v_reset):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    options = {"decay_input": decay_input} if name != "IFNode" else {}
    node = getattr(neuron, name)(v_reset=v_reset, v_threshold=0.7, step_mode="m", **options)
    x_seq = torch.randn(T, N, C) * 2
    spikes = node(x_seq)
    compare(neuron_spec(node), x_seq, spikes, node.v)
    assert neuron_spec(node).learnable == (("decay",) if name == "ParametricLIFNode" else ())


@pytest.mark.parametrize("mechanism", ["subtract", "zero", "none"])
@pytest.mark.parametrize("beta", [0.9, torch.linspace(0.1, 1.2, C)])
@torch.no_grad()
def test_snntorch_leaky(mechanism, beta):
    snn = pytest.importorskip("snntorch")
    lif = snn.Leaky(beta=beta, threshold=0.8, reset_mechanism=mechanism, learn_threshold=True)
    spec = neuron_spec(lif)
    x_seq = torch.randn(T, N, C)
    mem, spikes = lif.reset_mem(), []
    for x in x_seq:
        spk, mem = lif(x, mem)
        spikes.append(spk)
    compare(spec, x_seq, torch.stack(spikes), mem)
    assert spec.learnable == ("threshold",)
    assert spec.per_channel == (("decay",) if isinstance(beta, torch.Tensor) else ())
