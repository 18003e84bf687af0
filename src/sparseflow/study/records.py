"""What a study leaves behind: one :class:`Net` for every trained network, which all its parts write and read.

Spikes are counts per image and time step, densities and accuracies are shares in 0..1, times are milliseconds with
their 20 %, 50 % and 80 % quantile, cycles are clock cycles per image. ``None`` means not measured.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

SCHEMA = 1
Quantiles = tuple[float, float, float]


class Surrogate(enum.StrEnum):
    """Gradient of the step function, by the name that the literature gives it (x = U - threshold)."""

    FAST_SIGMOID = "fast sigmoid"  # 1 / (1 + k |x|)^2
    ARCTAN = "arctan"  # (a / 2) / (1 + (pi a x / 2)^2)
    SPIKE_RATE_ESCAPE = "spike rate escape"  # k exp(-b |x - 1|)
    STOCHASTIC = "stochastic spike operator"
    SIGMOID = "sigmoid"  # k e^(-k x) / (1 + e^(-k x))^2


class Neuron(enum.StrEnum):
    """Neuron model."""

    LIF = "LIF"
    LAPICQUE = "Lapicque"
    IF = "IF"
    PLIF = "PLIF"


class Matched(enum.StrEnum):
    """What neurons of different models have in common when they are compared.

    At the same ``beta`` snnTorch's Lapicque decays by ``1 + ln(beta)``, another filter; at the same time constant both
    decay by ``beta`` per step.
    """

    BETA = "beta"
    TIME_CONSTANT = "time constant"


class Status(enum.StrEnum):
    """How a training ended."""

    COMPLETE = "complete"
    PRUNED = "pruned"  # stopped: worse than the median of the others at the same epoch
    FAILED = "failed"


@dataclasses.dataclass(frozen=True, order=True)
class Choice:
    """What is chosen before training. ``slope`` is the surrogate's steepness, ``None`` for its published value."""

    dataset: str
    framework: str  # "snntorch" or "spikingjelly"
    neuron: Neuron
    surrogate: Surrogate
    beta: float
    threshold: float
    slope: float | None
    matched: Matched
    seed: int

    @property
    def name(self) -> str:
        """Short, unique, and the same in every run.

        >>> Choice("digits", "snntorch", Neuron.LIF, Surrogate.ARCTAN, 0.9, 1.0, None, Matched.BETA, 0).name
        'digits/snntorch/LIF/arctan/beta 0.9/threshold 1.0/slope default/equal beta/seed 0'
        """
        slope = "default" if self.slope is None else self.slope
        parts = (self.dataset, self.framework, self.neuron, self.surrogate, f"beta {self.beta}")
        parts += (f"threshold {self.threshold}", f"slope {slope}", f"equal {self.matched}", f"seed {self.seed}")
        return "/".join(parts)


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """A convolution or linear layer as a cost model sees it; a linear layer has 1x1 maps and a 1x1 kernel."""

    name: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1
    in_size: tuple[int, int] = (1, 1)
    out_size: tuple[int, int] = (1, 1)

    @property
    def linear(self) -> bool:
        """Whether it is a linear layer."""
        return self.in_size == self.out_size == self.kernel == (1, 1)

    @property
    def inputs(self) -> int:
        """Values per image and step that come in."""
        return self.in_channels * self.in_size[0] * self.in_size[1]

    @property
    def outputs(self) -> int:
        """Values per image and step that go out.

        >>> LayerShape("fc", 128, 10).outputs
        10
        """
        return self.out_channels * self.out_size[0] * self.out_size[1]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a trained network over a whole test set."""

    shape: LayerShape
    spikes: float  # that come in, mean per image and step
    density: float  # share of its inputs that are not zero
    cycles: float | None = None  # per image, of the event-driven accelerator
    predicted_ms: float | None = None  # accelerated, of one call


@dataclasses.dataclass(frozen=True)
class Net:
    """One trained network: what was chosen, how good it is, how often it fires and what it costs.

    ``latency`` and ``predicted`` are per call by path: ``"dense"`` and ``"accelerated"`` (predicted: the same, and
    hardware by name). ``dense`` says which dense path this was: the strongest of those that were timed.
    """

    choice: Choice
    status: Status
    accuracy: float | None = None
    epochs: int = 0
    steps: int = 0  # T
    batch: int = 1  # of a timed call
    spikes: float | None = None  # fired in the whole network, mean per image
    layers: tuple[Layer, ...] = ()
    latency: dict[str, Quantiles] = dataclasses.field(default_factory=dict)
    predicted: dict[str, float] = dataclasses.field(default_factory=dict)
    cycles: float | None = None
    error: str = ""
    dense: str = ""


@dataclasses.dataclass(frozen=True)
class Study:
    """A whole study: where it ran, and its networks."""

    environment: dict[str, Any]
    nets: tuple[Net, ...]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    schema: int = SCHEMA
