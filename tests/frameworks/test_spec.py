"""Records: what they say of a module, which constants they hold, and when a plan made from one no longer holds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparseflow.frameworks import (
    Charge,
    NeuronSpec,
    Reset,
    ResetTiming,
    fingerprint,
    neuron_spec,
    register_neuron,
    steps_over_time,
    stores_sequence,
    unregister_neuron,
)
from sparseflow.kernels.blocks.records import Dynamics, State
from sparseflow.kernels.blocks.reference import run_neuron, step

T, N, C = 6, 5, 8


def compare(module, x_seq, spikes, start=0.0):
    """The reference on the module's record against ``spikes [T, N, C]`` and the module's memory."""
    spec = neuron_spec(module)
    dynamics = Dynamics.of(spec, C)
    assert dynamics is not None
    state = State(torch.empty(N, 1, C), torch.empty(N, 1, C) if dynamics.synaptic else None, start=start)
    expected = run_neuron(x_seq.reshape(T * N, 1, C), dynamics, state, T).reshape(T, N, C)
    assert 0 < expected.mean() < 1
    assert torch.equal(spikes, expected)
    memory = [value.reshape(N, C) for value in (state.v, state.syn) if value is not None]
    assert len(memory) == len(spec.states)
    for name, value in zip(spec.states, memory, strict=True):
        assert torch.equal(getattr(module, name), value), name


@pytest.mark.parametrize("v_reset", [None, 0.0, -0.3])
@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("name", ["IFNode", "LIFNode", "ParametricLIFNode"])
@torch.no_grad()
def test_spikingjelly(name, decay_input, v_reset):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    options = {"decay_input": decay_input} if name != "IFNode" else {}
    node = getattr(neuron, name)(v_reset=v_reset, v_threshold=0.7, step_mode="m", **options)
    x_seq = torch.randn(T, N, C) * 2
    compare(node, x_seq, node(x_seq), v_reset or 0.0)
    assert neuron_spec(node).learnable == (("decay",) if name == "ParametricLIFNode" else ())


@pytest.mark.parametrize("mechanism", ["subtract", "zero", "none"])
@pytest.mark.parametrize("beta", [0.9, torch.linspace(0.1, 1.2, C)])
@pytest.mark.parametrize("name", ["Leaky", "Synaptic"])
@torch.no_grad()
def test_snntorch(name, beta, mechanism):
    snn = pytest.importorskip("snntorch")
    options = {"alpha": 0.3} if name == "Synaptic" else {}
    lif = getattr(snn, name)(beta=beta, threshold=0.8, reset_mechanism=mechanism, learn_threshold=True, **options)
    x_seq = torch.randn(T, N, C)
    compare(lif, x_seq, torch.stack([lif(x)[0] for x in x_seq]))
    spec = neuron_spec(lif)
    assert spec.learnable == ("threshold",)
    assert spec.per_channel == (("decay",) if isinstance(beta, torch.Tensor) else ())


@pytest.mark.parametrize("sizes", [{"R": 5, "C": 2}, {"R": 5.1, "C": 5e-1, "time_step": 0.1}, {"beta": 0.8}])
@torch.no_grad()
def test_lapicque(sizes):
    """R, C and the time step may be whole numbers, whose products and quotients are not those of float32."""
    snn = pytest.importorskip("snntorch")
    lapicque = snn.Lapicque(threshold=0.3, learn_beta=False, **sizes)
    x_seq = torch.randn(T, N, C) * 3
    compare(lapicque, x_seq, torch.stack([lapicque(x)[0] for x in x_seq]))
    dynamics = Dynamics.of(neuron_spec(lapicque), C)
    product = float(lapicque.R) * float(lapicque.C)
    assert dynamics.input_gains == pytest.approx((float(lapicque.R), 1 / product, float(lapicque.time_step)))
    assert dynamics.decay == pytest.approx(1 - float(lapicque.time_step) / product)


# ---- Dynamics.of ---------------------------------------------------------------------------------------------------


def test_constants_of_kernels():
    rows = torch.linspace(0.0, 1.0, C)
    spec = NeuronSpec(charge=Charge.SYNAPTIC, decay=rows.view(C, 1, 1), synapse_decay=torch.tensor([0.5]), threshold=2)
    dynamics = Dynamics.of(spec, C)
    assert torch.equal(dynamics.decay, rows)
    assert (dynamics.synapse_decay, dynamics.threshold, dynamics.synaptic) == (0.5, 2.0, True)
    assert Dynamics.of(spec, C + 1) is None
    assert Dynamics.of(NeuronSpec(), C) is None


@pytest.mark.parametrize("decay", [torch.rand(C, dtype=torch.float64), torch.rand(C, 2), torch.rand(1, C)])
def test_constants_that_no_kernel_reads(decay):
    assert Dynamics.of(NeuronSpec(charge=Charge.DECAY, decay=decay), C) is None


def test_a_float32_scalar_is_the_same_number_in_python():
    for value in torch.rand(1000):
        x = torch.randn(3)
        number = Dynamics.of(NeuronSpec(charge=Charge.DECAY, decay=value), C).decay
        assert torch.equal(x * number, x * value)
        assert torch.equal(x / number, x / value)
        assert torch.equal(x > number, x > value)


@pytest.mark.parametrize("reset", Reset)
@pytest.mark.parametrize("timing", ResetTiming)
def test_one_step_by_hand(reset, timing):
    """A membrane above the threshold is charged, fires, and is reset when the record says."""
    spec = NeuronSpec(charge=Charge.DECAY, decay=0.5, threshold=1.0, comparator=">", reset=reset, reset_timing=timing)
    v, x = torch.tensor([2.0]), torch.tensor([1.5])
    spike, after, _ = step(Dynamics.of(spec, 1), v, torch.zeros(1), x)
    late = {Reset.SOFT: 2.5 - 1.0, Reset.HARD: 1.5, Reset.NONE: 2.5}[reset]  # what the last spike leaves of 0.5 * v + x
    now = {Reset.SOFT: 2.5 - 1.0, Reset.HARD: 0.0, Reset.NONE: 2.5}[reset]
    assert spike.item() == 1.0
    # Without delay the reset that was due already is not repeated.
    assert after.item() == (now if timing is ResetTiming.SAME_STEP else late)


# ---- what a plan goes by -------------------------------------------------------------------------------------------


class Own(nn.Module):
    pass


def spikingjelly(name, **options):
    return getattr(pytest.importorskip("spikingjelly.activation_based.neuron"), name)(**options)


def snntorch(name, **options):
    return getattr(pytest.importorskip("snntorch"), name)(**options)


def leaky():
    return snntorch("Leaky", beta=0.5, learn_beta=True)


def smooth(node):
    node.surrogate_function = copy.deepcopy(node.surrogate_function)  # the default is one object for all neurons
    node.surrogate_function.spiking = False


def another_surrogate(node):
    node.surrogate_function = pytest.importorskip("spikingjelly.activation_based.surrogate").PoissonPass()


@torch.no_grad()
def write(tensor):
    tensor.mul_(1.0)


def assigned(name, value):
    def change(module):
        setattr(module, name, value)

    return change


LIF_CHANGES = {
    "v_threshold": assigned("v_threshold", 0.5),
    "v_reset": assigned("v_reset", None),
    "tensor threshold": assigned("v_threshold", torch.ones(3)),
    "tau": assigned("tau", 3.0),
    "decay_input": assigned("decay_input", False),
    "step_mode": assigned("step_mode", "m"),
    "store_v_seq": assigned("store_v_seq", True),
    "precision": assigned("_neuron_precision", (torch.float16, "fp32", "fp32")),
    "spiking": smooth,
    "surrogate": another_surrogate,
    "no surrogate": assigned("surrogate_function", None),
    "forward": assigned("forward", lambda x: x),
    "class": assigned("__class__", Own),
}
LEAKY_CHANGES = {
    "beta written": lambda module: write(module.beta),
    "beta replaced": lambda module: assigned("beta", nn.Parameter(module.beta.detach().clone()))(module),
    "beta moved": lambda module: assigned("data", module.beta.detach().clone())(module.beta),
    "cast": lambda module: module.double(),
    "threshold written": lambda module: write(module.threshold),
    "threshold replaced": assigned("threshold", torch.tensor(1.0)),
    "grade": lambda module: write(module.graded_spikes_factor),
    "mechanism": assigned("reset_mechanism", "zero"),
    "function": lambda module: assigned("state_function", module._base_zero)(module),
    "delay": assigned("reset_delay", False),
    "inhibition": assigned("inhibition", True),
    "quantised": assigned("state_quant", torch.round),
    "quantised by a module": assigned("state_quant", nn.Identity()),
    "init_hidden": assigned("init_hidden", True),
    "output": assigned("output", True),
    "surrogate": assigned("spike_grad", torch.relu),
    "loaded": lambda module: module.load_state_dict(module.state_dict()),
    "forward": assigned("forward", lambda x: x),
}


@pytest.mark.parametrize(
    ("make", "change"),
    [
        *((lambda: spikingjelly("LIFNode"), change) for change in LIF_CHANGES.values()),
        *((leaky, change) for change in LEAKY_CHANGES.values()),
        (lambda: spikingjelly("ParametricLIFNode"), lambda module: write(module.w)),
        (lambda: snntorch("Synaptic", alpha=0.5, beta=0.5), lambda module: write(module.alpha)),
        *(
            (lambda: snntorch("Lapicque", R=2.0, C=1.0), lambda module, name=name: write(getattr(module, name)))
            for name in ("R", "C")
        ),
    ],
)
def test_a_change_of_the_neuron_shows(make, change):
    module = make()
    before = fingerprint(module)
    assert before == fingerprint(module)
    assert hash(before) == hash(fingerprint(module))
    change(module)
    assert before != fingerprint(module)
    assert fingerprint(module) == fingerprint(module)


@pytest.mark.parametrize("make", [leaky, lambda: spikingjelly("ParametricLIFNode", step_mode="m")])
def test_running_and_resetting_are_no_change(make):
    module = make()
    before = fingerprint(module)
    for size in (2, 3):
        module(torch.ones(2, size))
        module.train(size == 2)
        assert before == fingerprint(module)
    getattr(module, "reset_mem" if hasattr(module, "reset_mem") else "reset")()
    assert before == fingerprint(module)
    assert before != fingerprint(make())
    assert before != fingerprint(copy.deepcopy(module))


def test_tensors_that_count_no_writes():
    with torch.inference_mode():
        module = leaky()
    before = fingerprint(module)
    assert before == fingerprint(module)
    module.threshold = torch.tensor(1.0)
    assert before != fingerprint(module)


def test_registered_neurons():
    decay = torch.rand(C)
    register_neuron(Own, NeuronSpec(charge=Charge.DECAY, decay=decay, states=("v",)))
    try:
        before = fingerprint(Own())
        assert before == fingerprint(Own())
        assert neuron_spec(Own()).described
        patched = Own()
        patched.forward = lambda x: x
        assert not neuron_spec(patched).described
        assert before != fingerprint(patched)
        write(decay)
        assert before != fingerprint(Own())
        before = fingerprint(Own())
        register_neuron(Own, overwrite=True)
        assert before != fingerprint(Own())
    finally:
        unregister_neuron(Own)
    assert fingerprint(Own()) != before


def test_sequences():
    assert steps_over_time(spikingjelly("LIFNode", step_mode="m"))
    assert not steps_over_time(spikingjelly("LIFNode"))
    assert steps_over_time(spikingjelly("PSN", T=4))
    assert not steps_over_time(snntorch("Leaky", beta=0.5))
    assert steps_over_time(snntorch("LeakyParallel", input_size=2, hidden_size=2))
    assert steps_over_time(snntorch("StateLeaky", beta=0.5, channels=2))
    assert not steps_over_time(nn.ReLU())
    assert stores_sequence(spikingjelly("LIFNode", store_v_seq=True))
    assert not stores_sequence(spikingjelly("LIFNode"))
    assert not stores_sequence(snntorch("Leaky", beta=0.5))
    assert not stores_sequence(nn.ReLU())
