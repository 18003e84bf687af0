"""The networks of a study: two convolutions with a neuron behind each, and a linear layer, in either framework.

conv 3x3 - max-pooling - neuron - conv 3x3 - max-pooling - neuron - linear, as in snnTorch's sixth tutorial, but for the
output: the class is the one whose current, averaged over time, is largest, so that there are gradients from the
beginning. There is no batch norm, as in the published networks: an event-driven accelerator has none. Weights start
normally distributed with variance 2 / fan-in (He et al., ICCV 2015), and biases at zero.

Both frameworks reset by subtraction, and no gradient flows through the reset. SpikingJelly subtracts right after the
spike and fires at ``U >= threshold``; snnTorch subtracts one step later and fires at ``U > threshold``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseflow.errors import SparseflowError

from .records import Choice, Matched, Neuron, Surrogate

WIDTH = 16
FRAMEWORKS = ("snntorch", "spikingjelly")
PUBLISHED_SLOPES = {
    Surrogate.FAST_SIGMOID: 25.0,
    Surrogate.ARCTAN: 2.0,
    Surrogate.SPIKE_RATE_ESCAPE: 25.0,
    Surrogate.SIGMOID: 25.0,
}
"""k where ``Choice.slope`` is ``None``, and of arctan a. Of the spike rate escape b is 1; the stochastic spike operator
has no slope, but mean 0 and variance 0.2."""
_OF_SPIKINGJELLY = (Surrogate.ARCTAN, Surrogate.SIGMOID)


class ChoiceError(SparseflowError):
    """There is no such network: the framework lacks the neuron or the surrogate, or a value makes no sense."""


def unsupported(choice: Choice) -> str | None:
    """Why there is no such network; ``None`` where there is one.

    >>> unsupported(Choice("digits", "spikingjelly", Neuron.LAPICQUE, Surrogate.ARCTAN, 0.9, 1, None, Matched.BETA, 0))
    'SpikingJelly has no Lapicque neuron; use snntorch'
    """
    return _framework_lacks(choice) or _senseless(choice)


def _framework_lacks(choice: Choice) -> str | None:
    if choice.framework not in FRAMEWORKS:
        return f"unknown framework {choice.framework!r}; there are {', '.join(FRAMEWORKS)}"
    if choice.framework == "snntorch":
        return None
    if choice.neuron is Neuron.LAPICQUE:
        return "SpikingJelly has no Lapicque neuron; use snntorch"
    if choice.surrogate not in _OF_SPIKINGJELLY:
        return f"SpikingJelly has no surrogate with the formula of the {choice.surrogate}; use snntorch"
    return None


def _senseless(choice: Choice) -> str | None:
    if choice.neuron is not Neuron.IF and not 0 < choice.beta < 1:
        return f"beta of a {choice.neuron} neuron must be between 0 and 1, got {choice.beta}"
    if choice.threshold <= 0:
        return f"the threshold must be positive, got {choice.threshold}"
    if choice.slope is not None and choice.surrogate not in PUBLISHED_SLOPES:
        return f"the {choice.surrogate} has no slope, got {choice.slope}"
    if choice.slope is not None and choice.slope <= 0:
        return f"the slope must be positive, got {choice.slope}"
    return None


def build(choice: Choice, shape: tuple[int, int, int], classes: int, width: int = WIDTH) -> nn.Module:
    """A network at random weights, drawn from the global generator.

    Args:
        choice: framework, neuron and surrogate.
        shape: channels, height and width of one time step; height and width at least 4.
        classes: outputs.
        width: channels of the first convolution; the second has twice as many.

    Returns:
        A module from spikes ``[T, N, C, H, W]`` to currents ``[T, N, classes]``. See :func:`reset`.

    Raises:
        ChoiceError: :func:`unsupported`.

    >>> choice = Choice("digits", "snntorch", Neuron.LIF, Surrogate.ARCTAN, 0.9, 1.0, None, Matched.BETA, 0)
    >>> build(choice, (1, 16, 16), 10)(torch.ones(4, 2, 1, 16, 16)).shape
    torch.Size([4, 2, 10])
    """
    if why := unsupported(choice):
        raise ChoiceError(why)
    make = _spikingjelly_network if choice.framework == "spikingjelly" else _SnnTorchNetwork
    network = make(choice, shape, classes, width)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
    return network


def reset(network: nn.Module) -> None:
    """Put the neurons to rest, as is due before every call. Those of snnTorch do it themselves."""
    if not loops(network):
        from spikingjelly.activation_based import functional

        functional.reset_net(network)


def run(network: nn.Module, spikes: Tensor) -> Tensor:
    """Currents ``[T, N, classes]`` of a call from rest, each layer once over all steps."""
    if isinstance(network, _SnnTorchNetwork):
        return network.over_time(spikes)
    reset(network)
    return network(spikes)


def loops(network: nn.Module) -> bool:
    """Whether its forward goes step by step."""
    return isinstance(network, _SnnTorchNetwork)


def _features(shape: tuple[int, int, int], width: int) -> int:
    return 2 * width * (shape[1] // 4) * (shape[2] // 4)


# ---- snnTorch


class _SnnTorchNetwork(nn.Module):
    """As in the tutorial, the loop over T in the forward; every call starts from rest."""

    def __init__(self, choice: Choice, shape: tuple[int, int, int], classes: int, width: int):
        super().__init__()
        neuron = _snntorch_neuron(choice)
        self.conv1, self.neuron1 = nn.Conv2d(shape[0], width, 3, padding=1), neuron()
        self.conv2, self.neuron2 = nn.Conv2d(width, 2 * width, 3, padding=1), neuron()
        self.fc = nn.Linear(_features(shape, width), classes)

    def forward(self, x: Tensor) -> Tensor:
        mem1, mem2 = self.neuron1.reset_mem(), self.neuron2.reset_mem()
        currents = []
        for step in x:
            spk1, mem1 = self.neuron1(F.max_pool2d(self.conv1(step), 2), mem1)
            spk2, mem2 = self.neuron2(F.max_pool2d(self.conv2(spk1), 2), mem2)
            currents.append(self.fc(spk2.flatten(1)))
        return torch.stack(currents)

    def over_time(self, x: Tensor) -> Tensor:
        """The same, layer by layer: every convolution once over all steps."""
        x = _spikes(self.neuron1, F.max_pool2d(self.conv1(x.flatten(0, 1)), 2).unflatten(0, x.shape[:2]))
        x = _spikes(self.neuron2, F.max_pool2d(self.conv2(x.flatten(0, 1)), 2).unflatten(0, x.shape[:2]))
        return self.fc(x.flatten(2))


def _spikes(neuron: Any, currents: Tensor) -> Tensor:
    membrane, spikes = neuron.reset_mem(), []
    for current in currents:
        spike, membrane = neuron(current, membrane)
        spikes.append(spike)
    return torch.stack(spikes)


def _snntorch_neuron(choice: Choice) -> Callable[[], Any]:
    """Makes the neurons of a network."""
    import snntorch

    options = {"threshold": choice.threshold, "spike_grad": _snntorch_surrogate(choice)}
    if choice.neuron is Neuron.LAPICQUE:
        return lambda: snntorch.Lapicque(**_lapicque(choice), **options)
    beta = 1.0 if choice.neuron is Neuron.IF else choice.beta
    return lambda: snntorch.Leaky(beta=beta, learn_beta=choice.neuron is Neuron.PLIF, **options)


def _lapicque(choice: Choice) -> dict[str, float]:
    """The circuit, for time steps of length 1 and R = 1: U decays by 1 - 1 / (R C) per step, and the input by 1 / C.

    snnTorch derives C = -1 / ln(beta) from ``beta``, so that U decays by 1 + ln(beta). C = 1 / (1 - beta) makes it
    decay by beta, as that of the LIF neuron does.
    """
    if choice.matched is Matched.BETA:
        return {"beta": choice.beta}
    return {"R": 1.0, "C": 1 / (1 - choice.beta)}


def _snntorch_surrogate(choice: Choice) -> Any:
    from snntorch import surrogate

    slope: Any = PUBLISHED_SLOPES.get(choice.surrogate) if choice.slope is None else choice.slope
    if choice.surrogate is Surrogate.STOCHASTIC:
        return surrogate.SSO(mean=0, variance=0.2)
    if choice.surrogate is Surrogate.ARCTAN:
        return surrogate.atan(alpha=slope)
    if choice.surrogate is Surrogate.SPIKE_RATE_ESCAPE:
        return surrogate.spike_rate_escape(beta=1, slope=slope)
    if choice.surrogate is Surrogate.FAST_SIGMOID:
        return surrogate.fast_sigmoid(slope=slope)

    # surrogate.sigmoid computes inf / inf at k x < -88, which a strongly inhibited neuron soon has.
    def sigmoid(x: Tensor, gradient: Tensor, _spikes: Tensor) -> Tensor:
        return gradient * slope * torch.sigmoid(slope * x) * torch.sigmoid(-slope * x)

    return surrogate.custom_surrogate(sigmoid)


# ---- SpikingJelly


def _spikingjelly_network(choice: Choice, shape: tuple[int, int, int], classes: int, width: int) -> nn.Module:
    """In multi-step mode: ``[T, N, ...]`` throughout."""
    from spikingjelly.activation_based import functional, layer

    network = nn.Sequential(
        OrderedDict(
            conv1=layer.Conv2d(shape[0], width, 3, padding=1),
            pool1=layer.MaxPool2d(2),
            neuron1=_spikingjelly_neuron(choice),
            conv2=layer.Conv2d(width, 2 * width, 3, padding=1),
            pool2=layer.MaxPool2d(2),
            neuron2=_spikingjelly_neuron(choice),
            flatten=layer.Flatten(),
            fc=layer.Linear(_features(shape, width), classes),
        )
    )
    functional.set_step_mode(network, "m")
    return network


def _spikingjelly_neuron(choice: Choice) -> nn.Module:
    from spikingjelly.activation_based import neuron, surrogate

    slope = PUBLISHED_SLOPES[choice.surrogate] if choice.slope is None else choice.slope
    gradient = surrogate.ATan if choice.surrogate is Surrogate.ARCTAN else surrogate.Sigmoid
    options: dict[str, Any] = {"v_threshold": choice.threshold, "v_reset": None, "detach_reset": True}
    options["surrogate_function"] = gradient(alpha=slope)
    if choice.neuron is Neuron.IF:
        return neuron.IFNode(**options)
    tau = 1 / (1 - choice.beta)
    if choice.neuron is Neuron.PLIF:
        return neuron.ParametricLIFNode(init_tau=tau, decay_input=False, **options)
    return neuron.LIFNode(tau=tau, decay_input=False, **options)
