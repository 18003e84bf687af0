"""What a record describes is what the framework's own module computes: spikes, membrane, synaptic current, every bit.

The currents are drawn so that the membrane often lands exactly on the threshold, where ``>=`` and ``>`` part, and so
that it overflows and underflows. Signs of zeros count; of NaNs only that they are.
"""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflow.frameworks import Charge, Reset, ResetTiming, neuron_spec
from sparseflow.kernels.blocks.records import Dynamics, State
from sparseflow.kernels.blocks.reference import run_neuron
from sparseflow.kernels.blocks.spikes import as_tensor, channels_last
from sparseflow.plan import Provenance

snn = pytest.importorskip("snntorch")
neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")

SEEDS = st.integers(0, 2**31 - 1)
STEPS = st.lists(st.integers(1, 20), min_size=1, max_size=3)  # T of successive calls, state carried over
SHAPES = st.sampled_from([(3, 5), (2, 4, 3), (1, 6, 2, 3), (2, 3, 2, 1, 2)])  # [N, C, *size]
CURRENTS = st.sampled_from(["grid", "grid", "normal", "positive", "extreme"])
# Halves, so that a grid of quarters stays on a grid and meets the threshold exactly; and numbers that always round.
DECAYS = st.sampled_from([0.5, 0.25, 0.9, 0.37, 0.0, 1.0, 1.3, -0.2])
THRESHOLDS = st.sampled_from([1.0, 0.5, 0.7, 1, 0.0, -0.5])
RESET = ("subtract", "zero", "none")
EXTREMES = torch.tensor(
    [0.0, -0.0, 1e-45, -1e-39, 1.0, -1.0, 1e30, 3e38, -3e38, float("inf"), -float("inf"), 16777217.0]
)


def currents(kind, shape, generator):
    """Inputs ``[T, N, C, *size]``."""
    if kind == "grid":
        return torch.randint(-8, 13, shape, generator=generator) / 4
    if kind == "extreme":
        picked = torch.randint(0, len(EXTREMES), shape, generator=generator)
        return torch.where(
            torch.rand(shape, generator=generator) < 0.7, currents("grid", shape, generator), EXTREMES[picked]
        )
    x = torch.randn(shape, generator=generator)
    return 2 * x.abs() if kind == "positive" else 1.5 * x


def assert_same(actual, expected):
    """Equality of bits, of NaNs only their places."""
    nan = expected.isnan()
    assert actual.dtype is expected.dtype is torch.float32
    assert torch.equal(actual.isnan(), nan)
    bits = [torch.where(nan, torch.zeros(()), value).view(torch.int32) for value in (actual, expected)]
    assert torch.equal(*bits)


def flat(x):
    return channels_last(x, 1)


def blank(shape, spec, **fields):
    """The state of a neuron that has not run: memory that nothing has written yet."""
    pixels = torch.empty(shape[0], shape[2:].numel() if len(shape) > 2 else 1, shape[1])
    return State(pixels, torch.empty_like(pixels) if len(spec.states) > 1 else None, **fields)


def check(module, x_seqs, run, start=0.0, v_seq=None):
    """``run(x_seq)`` of the framework's module against the reference, over successive sequences."""
    spec = neuron_spec(module)
    shape = x_seqs[0].shape[1:]
    dynamics = Dynamics.of(spec, shape[1])
    assert dynamics is not None
    state = blank(shape, spec, start=start)
    for x_seq in x_seqs:
        with torch.no_grad():
            expected = run(x_seq)
        if v_seq is not None:
            state.v_seq = torch.empty(len(x_seq), *state.v.shape)
        spikes = run_neuron(flat(x_seq.flatten(0, 1)), dynamics, state, len(x_seq))
        state.fresh = False
        assert_same(as_tensor(spikes, tuple(expected.shape), 2), expected)
        for value, name in zip((state.v, state.syn), spec.states, strict=False):
            assert value is not None
            assert_same(value, flat(getattr(module, name)))
        if v_seq is not None:
            assert_same(state.v_seq.flatten(0, 1), flat(module.v_seq.flatten(0, 1)))
    return dynamics


def assert_ties_matter(module, run, start=0.0):
    """On the grid the membrane meets the threshold: the other comparator fires otherwise."""
    x_seq = currents("grid", (12, 4, 6), torch.Generator().manual_seed(1))
    dynamics = check(module, [x_seq], run, start)
    spikes = []
    for comparator in (">=", ">"):
        state = blank((4, 6), neuron_spec(module), start=start)
        other = dataclasses.replace(dynamics, comparator=comparator)
        spikes.append(run_neuron(flat(x_seq.flatten(0, 1)), other, state, 12))
    assert not torch.equal(*spikes)
    assert 0 < spikes[0].mean() < 1


# ---- SpikingJelly --------------------------------------------------------------------------------------------------

SURROGATES = [
    surrogate.Sigmoid(),
    surrogate.ATan(alpha=3.0),
    surrogate.PiecewiseQuadratic(),
    surrogate.PiecewiseExp(),
    surrogate.SoftSign(),
    surrogate.SuperSpike(),
    surrogate.Erf(),
    surrogate.NonzeroSignLogAbs(),
    surrogate.PiecewiseLeakyReLU(),
    surrogate.SquarewaveFourierSeries(),
    surrogate.S2NN(),
    surrogate.QPseudoSpike(),
    surrogate.LeakyKReLU(),
    surrogate.FakeNumericalGradient(),
    surrogate.LogTailedReLU(),
    surrogate.DeterministicPass(),
    surrogate.Rect(),
]


@st.composite
def spikingjelly_nodes(draw):
    kind = draw(st.sampled_from(["IFNode", "LIFNode", "LIFNode", "ParametricLIFNode"]))
    options = {
        "v_threshold": draw(st.sampled_from([1.0, 0.5, 0.7, -0.5])),
        "v_reset": draw(st.sampled_from([None, 0.0, -0.25, 0.3])),
        "surrogate_function": draw(st.sampled_from(SURROGATES)),
        "detach_reset": draw(st.booleans()),
        "step_mode": draw(st.sampled_from("sm")),
        "store_v_seq": draw(st.booleans()),
    }
    if kind != "IFNode":
        options["decay_input"] = draw(st.booleans())
        options["tau" if kind == "LIFNode" else "init_tau"] = draw(st.sampled_from([2.0, 4.0, 1.1, 3.7]))
    return getattr(neuron, kind)(**options)


def spikingjelly_runner(node):
    return node if node.step_mode == "m" else lambda x_seq: torch.stack([node(x) for x in x_seq])


def sequences(kind, shape, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    return [currents(kind, (t, *shape), generator) for t in steps]


@settings(max_examples=400, deadline=None)
@given(node=spikingjelly_nodes(), kind=CURRENTS, shape=SHAPES, steps=STEPS, seed=SEEDS)
def test_spikingjelly(node, kind, shape, steps, seed):
    start = node.v_reset or 0.0
    stored = True if node.store_v_seq and node.step_mode == "m" else None
    check(node, sequences(kind, shape, steps, seed), spikingjelly_runner(node), start, stored)


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("v_reset", [None, 0.0, -0.25])
@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("name", ["IFNode", "LIFNode", "ParametricLIFNode"])
def test_spikingjelly_at_the_threshold(name, decay_input, v_reset, step_mode):
    options = {} if name == "IFNode" else {"decay_input": decay_input}
    node = getattr(neuron, name)(v_reset=v_reset, step_mode=step_mode, **options)
    assert_ties_matter(node, spikingjelly_runner(node), v_reset or 0.0)


@settings(max_examples=60, deadline=None)
@given(decay_input=st.booleans(), v_reset=st.sampled_from([None, 0.0, 0.3]), kind=CURRENTS, shape=SHAPES, seed=SEEDS)
def test_parametric_lif_of_a_channel(decay_input, v_reset, kind, shape, seed):
    node = neuron.ParametricLIFNode(decay_input=decay_input, v_reset=v_reset, step_mode="m")
    node.w = torch.nn.Parameter(torch.randn(shape[1], *[1] * (len(shape) - 2)))
    check(node, sequences(kind, shape, [4, 3], seed), node, v_reset or 0.0)


# ---- snnTorch ------------------------------------------------------------------------------------------------------


def constant(draw, values, shape):
    """A Python number, tensors of no and of one dimension, one number a channel; of several types."""
    kind = draw(st.sampled_from(["number", "number", "scalar", "double", "one", "channel", "half"]))
    value = draw(values)
    if kind == "number":
        return value
    if kind == "channel":
        rows = [draw(values) for _ in range(shape[1])]
        return torch.tensor(rows, dtype=torch.float32).reshape(shape[1], *[1] * (len(shape) - 2))
    dtype = {"double": torch.float64, "half": torch.float16}.get(kind, torch.float32)
    return torch.tensor([value] if kind == "one" else value, dtype=dtype)


def trained(value):
    """Whether a constant can be a parameter."""
    return isinstance(value, float) or (isinstance(value, torch.Tensor) and value.is_floating_point())


@st.composite
def snntorch_neurons(draw, shape):
    kind = draw(st.sampled_from(["Leaky", "Synaptic", "Lapicque"]))
    threshold = constant(draw, THRESHOLDS, shape)
    init_hidden = draw(st.booleans())
    options = {
        "threshold": threshold,
        "learn_threshold": trained(threshold) and draw(st.booleans()),
        "reset_mechanism": draw(st.sampled_from(RESET)),
        "init_hidden": init_hidden,
        "output": draw(st.booleans()),
        "surrogate_disable": draw(st.booleans()),
    }
    if kind == "Lapicque":
        size = st.sampled_from([1, 2, 5, 5.1, 0.5, 3.3])
        chosen = draw(st.sampled_from([("R", "C"), ("beta",), ("beta", "R"), ("beta", "C")]))
        sizes = {name: draw(st.sampled_from([0.5, 0.9, 0.37])) if name == "beta" else draw(size) for name in chosen}
        return snn.Lapicque(**sizes, time_step=draw(st.sampled_from([1, 0.5, 0.1, 1e-3])), **options)
    options["reset_delay"] = draw(st.booleans())
    options["beta"] = constant(draw, DECAYS, shape)
    options["learn_beta"] = trained(options["beta"]) and draw(st.booleans())
    if kind == "Synaptic":
        options["alpha"] = constant(draw, DECAYS, shape)
    return getattr(snn, kind)(**options)


def snntorch_runner(module):
    """Its forward over a sequence, its state in the module or handed from call to call."""
    held = ()

    def run(x_seq):
        nonlocal held
        spikes = []
        for x in x_seq:
            result = module(x) if module.init_hidden else module(x, *held)
            spikes.append(result[0] if isinstance(result, tuple) else result)
            held = result[1:] if isinstance(result, tuple) else ()
        return torch.stack(spikes)

    return run


@settings(max_examples=600, deadline=None)
@given(data=st.data(), kind=CURRENTS, shape=SHAPES, steps=STEPS, seed=SEEDS)
def test_snntorch(data, kind, shape, steps, seed):
    module = data.draw(snntorch_neurons(shape))
    check(module, sequences(kind, shape, steps, seed), snntorch_runner(module))


SNNTORCH = [
    *((name, mechanism, delay) for name in ("Leaky", "Synaptic") for mechanism in RESET for delay in (True, False)),
    *(("Lapicque", mechanism, True) for mechanism in RESET),
]


def snntorch_neuron(name, mechanism="subtract", delay=True, **options):
    """With halves as constants, so that sums on a grid are exact."""
    decays = {"Leaky": {"beta": 0.5}, "Synaptic": {"alpha": 0.5, "beta": 0.25}, "Lapicque": {"R": 1, "C": 2}}[name]
    delays = {} if name == "Lapicque" else {"reset_delay": delay}
    return getattr(snn, name)(reset_mechanism=mechanism, **decays, **delays, **options)


@pytest.mark.parametrize(("name", "mechanism", "delay"), SNNTORCH)
def test_snntorch_at_the_threshold(name, mechanism, delay):
    module = snntorch_neuron(name, mechanism, delay)
    spec = neuron_spec(module)
    assert spec.charge is {"Leaky": Charge.DECAY, "Synaptic": Charge.SYNAPTIC, "Lapicque": Charge.DECAY_GAIN}[name]
    assert spec.reset is {"subtract": Reset.SOFT, "zero": Reset.HARD, "none": Reset.NONE}[mechanism]
    assert spec.reset_timing is (ResetTiming.NEXT_STEP if delay else ResetTiming.BOTH)
    assert spec.states == (("mem", "syn") if name == "Synaptic" else ("mem",))
    assert_ties_matter(module, snntorch_runner(module))


@pytest.mark.parametrize(("name", "mechanism", "delay"), SNNTORCH)
def test_a_copy_is_described_by_its_own_memory(name, mechanism, delay):
    module = snntorch_neuron(name, mechanism, delay, surrogate_disable=True)  # its surrogates cannot be pickled
    module(torch.ones(2, 3))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        twin.reset_mem()
        assert_ties_matter(twin, snntorch_runner(twin))
    assert not neuron_spec(copy.copy(module)).described  # its forward works on the memory of the first


@pytest.mark.parametrize("name", ["Leaky", "Synaptic", "Lapicque"])
def test_a_reset_mechanism_named_later_does_not_act(name):
    """snnTorch computes the membrane as it was told when it was made; ``load_state_dict`` and assignment come late."""
    assigned, loaded = (snntorch_neuron(name, "subtract") for _ in range(2))
    assigned.reset_mechanism = "zero"
    loaded.load_state_dict(snntorch_neuron(name, "none").state_dict())
    for module in (assigned, loaded):
        assert neuron_spec(module).reset is Reset.SOFT
        assert_ties_matter(module, snntorch_runner(module))


# ---- what stays opaque ---------------------------------------------------------------------------------------------


class OwnSurrogate(surrogate.SurrogateFunctionBase):
    @staticmethod
    def spiking_function(x):
        return (x > 0).to(x)


def changed(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


OPAQUE_SPIKINGJELLY = {
    "precision": lambda make: changed(make(), _neuron_precision=(torch.float16, "fp32", "fp32")),
    "random spikes": lambda make: make(surrogate_function=surrogate.PoissonPass()),
    "counts": lambda make: make(surrogate_function=surrogate.MultiLevelSpikeCount(4)),
    "own surrogate": lambda make: make(surrogate_function=OwnSurrogate()),
    "function": lambda make: make(surrogate_function=lambda x: (x > 0).to(x)),
    "tensor threshold": lambda make: changed(make(), v_threshold=torch.ones(3)),
    "endless threshold": lambda make: changed(make(), v_threshold=float("inf")),
    "tensor reset": lambda make: changed(make(), v_reset=torch.zeros(3)),
    "own method": lambda make: changed(make(), multi_step_forward=lambda x: x),
}


@pytest.mark.parametrize("name", ["IFNode", "LIFNode", "ParametricLIFNode"])
@pytest.mark.parametrize("case", OPAQUE_SPIKINGJELLY)
def test_opaque_in_spikingjelly(case, name):
    make = getattr(neuron, name)
    assert neuron_spec(make()).described
    spec = neuron_spec(OPAQUE_SPIKINGJELLY[case](make))
    assert not spec.described
    assert spec.states == ("v",)
    assert (spec.emits is Provenance.INTEGER) == (case == "counts")


def test_opaque_types_in_spikingjelly():
    assert not neuron_spec(neuron.ParametricLIFNode().half()).described
    assert not neuron_spec(changed(neuron.LIFNode(), tau=torch.tensor(2.0))).described
    assert not neuron_spec(neuron.SimpleLIFNode(2.0, True)).described


OPAQUE_SNNTORCH = {
    "quantised": {"state_quant": torch.round},
    "graded": {"graded_spikes_factor": 0.5},
    "learnable grade": {"learn_graded_spikes_factor": True},
    "double grade": {"graded_spikes_factor": torch.ones(1, dtype=torch.float64)},
    "own surrogate": {"spike_grad": lambda x: (x >= 0).float()},
    "double beta": {"beta": torch.full((3,), 0.5, dtype=torch.float64)},
    "double threshold": {"threshold": torch.full((1,), 0.5, dtype=torch.float64)},
}


@pytest.mark.filterwarnings("ignore:Inhibition")
@pytest.mark.parametrize("case", [*OPAQUE_SNNTORCH, "inhibition", "own method", "two mechanisms"])
def test_opaque_in_snntorch(case):
    options = {"beta": 0.5} | OPAQUE_SNNTORCH.get(case, {"inhibition": case == "inhibition"})
    module = snn.Leaky(reset_delay=case != "two mechanisms", **options)
    if case == "own method":
        module.fire = lambda mem: mem
    if case == "two mechanisms":
        module.reset_mechanism = "zero"
    assert neuron_spec(snn.Leaky(beta=0.5)).described
    spec = neuron_spec(module)
    assert not spec.described
    assert spec.states == ("mem",)
    assert (spec.emits is Provenance.SPARSE) == ("grade" in case and case != "double grade")


@pytest.mark.parametrize("make", [lambda: snn.Alpha(0.9, 0.8), lambda: snn.RLeaky(0.5, all_to_all=False)])
def test_other_snntorch_neurons_are_opaque(make):
    spec = neuron_spec(make())
    assert not spec.described
    assert spec.states[0] == "mem"


@pytest.mark.parametrize("name", ["fast_sigmoid", "straight_through_estimator", "triangular", "sigmoid", "SFS", "SSO"])
def test_surrogates_of_snntorch_fire_above_the_threshold(name):
    spike_grad = getattr(pytest.importorskip("snntorch.surrogate"), name)()
    assert_ties_matter(module := snn.Leaky(beta=0.5, spike_grad=spike_grad), snntorch_runner(module))
