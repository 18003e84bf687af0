"""Which modules count as neurons, encoders, containers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from sparseflow.frameworks import (
    NeuronSpec,
    emitted,
    is_container,
    is_time_leaf,
    is_unknown_neuron,
    neuron_spec,
    register_neuron,
    state_tensors,
    unregister_neuron,
)
from sparseflow.plan import Provenance


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.v = torch.zeros(2)


class Derived(Own):
    pass


@pytest.fixture
def registered():
    register_neuron(Own, NeuronSpec(emits=Provenance.INTEGER, states=("v",)))
    yield
    unregister_neuron(Own)


@pytest.mark.usefixtures("registered")
def test_registration_matches_the_exact_class():
    assert emitted(Own()) is Provenance.INTEGER
    assert neuron_spec(Derived()) is None
    assert is_time_leaf(Own())
    assert list(state_tensors(Own())) == ["v"]
    with pytest.raises(ValueError, match="overwrite=True"):
        register_neuron(Own)
    register_neuron(Own, overwrite=True)
    assert emitted(Own()) is Provenance.BINARY


def test_misuse_says_what_to_do():
    with pytest.raises(TypeError, match="the neuron's class"):
        register_neuron(Own())
    with pytest.raises(TypeError, match="must be a NeuronSpec, got str"):
        register_neuron(Own, "lif")
    with pytest.raises(ValueError, match="not registered"):
        unregister_neuron(Derived)
    with pytest.raises(ValueError, match="comparator"):
        NeuronSpec(comparator=">>")
    with pytest.raises(ValueError, match="DENSE"):
        NeuronSpec(emits=Provenance.DENSE)


def test_torch_modules_are_not_neurons():
    assert emitted(nn.ReLU()) is None
    assert not is_time_leaf(nn.Linear(1, 1))
    assert is_container(nn.Sequential())


def test_neither_framework_is_imported():
    code = (
        "import sys, torch, sparseflow.frameworks as f, sparseflow.graph\n"
        "f.neuron_spec(torch.nn.ReLU()); f.is_time_leaf(torch.nn.ReLU()); f.is_container(torch.nn.ReLU())\n"
        "print([n for n in ('spikingjelly', 'snntorch') if n in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


class TestSpikingJelly:
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")
    MULTI = {"step_mode": "m"}

    # Every class that fires and can be built from these arguments; [T, N, C] = [4, 8, 16].
    NODES = {
        "ActivationAwareIFNode": MULTI,
        "CUBALIFNode": {},
        "ComplementaryLIFNode": MULTI,
        "DSRIFNode": MULTI,
        "DSRLIFNode": MULTI,
        "EIFNode": MULTI,
        "GatedLIFNode": {"T": 4, **MULTI},
        "HalfThresholdIFNode": MULTI,
        "IFNode": MULTI,
        "ILCIFNode": {"act_dim": 4, "dec_pop_dim": 4},
        "ILCLIFNode": {"act_dim": 4, "dec_pop_dim": 4},
        "ILCCUBALIFNode": {"act_dim": 4, "dec_pop_dim": 4},
        "ILIFNode": MULTI,
        "IzhikevichNode": MULTI,
        "KLIFNode": MULTI,
        "LIFNode": MULTI,
        "MPBNLIFNode": {"out_features": 16, **MULTI},
        "MaskedPSN": {"k": 2, "T": 4, **MULTI},
        "OTTTLIFNode": {},
        "PSN": {"T": 4},
        "ParametricLIFNode": MULTI,
        "QIFNode": MULTI,
        "RAFNode": MULTI,
        "SLTTLIFNode": {},
        "STBIFNode": {"q_threshold": 1.0, "level": 8, "sym": True, **MULTI},
        "SimpleIFNode": MULTI,
        "SimpleLIFNode": {"tau": 2.0, "decay_input": True, **MULTI},
        "SlidingPSN": {"k": 2, **MULTI},
        "TernaryIFNode": MULTI,
        "TernaryLIFNode": MULTI,
    }

    @pytest.mark.parametrize("name", NODES)
    def test_every_neuron_emits_what_its_record_says(self, name):
        node = getattr(self.neuron, name)(**self.NODES[name]).eval()
        x = torch.randn(4, 8, 16) * 3
        with torch.no_grad():
            spikes = node(x if getattr(node, "step_mode", "m") == "m" else x[0])
        assert spikes.any()
        values = set(spikes.unique().tolist())
        claim = emitted(node)
        assert claim is not None
        assert (claim is Provenance.BINARY) == (values <= {0.0, 1.0})
        assert claim is not Provenance.INTEGER or values <= {float(n) for n in range(16)}
        assert is_time_leaf(node)
        assert all(hasattr(node, state) for state in neuron_spec(node).states)

    def test_subclasses_and_analog_neurons_are_not_sources(self):
        class OwnLIF(self.neuron.LIFNode):
            pass

        liaf = self.neuron.LIAFNode(act=torch.relu, threshold_related=False)
        for module in (OwnLIF(), liaf, self.neuron.NonSpikingLIFNode(), self.neuron.NonSpikingIFNode()):
            assert emitted(module) is None, type(module)
        assert is_unknown_neuron(OwnLIF())
        assert not is_unknown_neuron(self.neuron.LIFNode())

    def test_smooth_surrogates_do_not_fire(self):
        node = self.neuron.IFNode(surrogate_function=self.surrogate.ATan(spiking=False))
        assert emitted(node) is None
        node.surrogate_function.set_spiking_mode(True)
        assert emitted(node) is Provenance.BINARY

    def test_containers_and_leaves(self):
        inside = nn.Conv2d(1, 1, 1)
        for container in (self.layer.SeqToANNContainer(inside), self.layer.MultiStepContainer(inside)):
            assert is_container(container)
            assert not is_time_leaf(container)
        assert is_time_leaf(self.layer.Conv2d(1, 1, 1))
        assert is_time_leaf(self.layer.Dropout())
        assert emitted(self.layer.Dropout()) is None


class TestSnnTorch:
    snn = pytest.importorskip("snntorch")

    def test_emissions(self):
        assert emitted(self.snn.Leaky(beta=0.9)) is Provenance.BINARY
        assert emitted(self.snn.Leaky(beta=0.9, graded_spikes_factor=0.5)) is Provenance.SPARSE
        assert emitted(self.snn.Leaky(beta=0.9, learn_graded_spikes_factor=True)) is Provenance.SPARSE
        assert emitted(self.snn.SLSTM(2, 2)) is Provenance.BINARY

    def test_a_quantised_neuron_still_fires(self):
        quantised = self.snn.Leaky(beta=0.9, state_quant=lambda mem: mem.round())
        assert not neuron_spec(quantised).described
        assert neuron_spec(quantised).emits is Provenance.BINARY

    def test_subclass_is_unknown(self):
        class OwnLeaky(self.snn.Leaky):
            pass

        assert emitted(OwnLeaky(beta=0.5)) is None
        assert is_unknown_neuron(OwnLeaky(beta=0.5))
        assert is_time_leaf(OwnLeaky(beta=0.5))

    def test_sequence_neurons_fire_only_with_output(self):
        assert emitted(self.snn.StateLeaky(beta=0.9, channels=2, output=False)) is None
        assert emitted(self.snn.StateLeaky(beta=0.9, channels=2, output=True)) is Provenance.BINARY
