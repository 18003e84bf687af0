"""What a neuron does between two spikes, as a linear filter, and several of its time steps taken as one."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from sparseflow.errors import SparseflowError
from sparseflow.frameworks import fire, live_spec, read_state, stores_sequence, write_state
from sparseflow.neuron import Charge, NeuronSpec, Reset, ResetTiming

Value = float | Tensor


class UnknownNeuronError(SparseflowError):
    """The update rule of a neuron is not known, so that several steps of it cannot be taken as one."""


@dataclasses.dataclass(frozen=True)
class Leak:
    """A neuron below its threshold: ``v <- rest + decay (v - rest) + gain x``, all dimensionless but ``rest``.

    With ``synapse`` (a decay) the input goes through a synaptic current, ``i <- synapse i + x``, and the membrane is
    ``v <- decay v + i``. A decay may be a tensor with one element for every channel.

    >>> Leak(0.5).weights(3).tolist()
    [0.25, 0.5, 1.0]
    """

    decay: Value
    gain: Value = 1.0
    rest: float = 0.0
    synapse: Value | None = None

    @classmethod
    def of(cls, spec: NeuronSpec) -> Leak:
        """The filter of a described neuron.

        Raises:
            UnknownNeuronError: ``spec`` has no update rule.
        """
        soft_or_late = spec.reset is not Reset.HARD or spec.reset_timing is not ResetTiming.SAME_STEP
        rest, d = 0.0 if soft_or_late else spec.reset_value, spec.decay
        g1, g2, g3 = spec.input_gains
        match spec.charge:
            case Charge.INTEGRATE:
                return cls(1.0, 1.0, rest)
            case Charge.LEAK_INPUT:
                return cls(1 - 1 / d, 1 / d, rest)
            case Charge.LEAK:
                return cls(1 - 1 / d, 1.0, rest)
            case Charge.LEAK_INPUT_RATE:
                return cls(1 - d, d, rest)
            case Charge.LEAK_RATE:
                return cls(1 - d, 1.0, rest)
            case Charge.DECAY:
                return cls(d, 1.0, rest)
            case Charge.DECAY_GAIN:
                return cls(d, g1 * g2 * g3, rest)
            case Charge.SYNAPTIC:
                return cls(d, 1.0, rest, spec.synapse_decay)
        raise UnknownNeuronError("the update rule of the neuron is not known")

    def weights(self, steps: int) -> Tensor:
        """``[steps]``: what is left in the membrane, behind the last step, of an input of 1 at each step.

        Without the ``gain``. A decay per channel counts by its mean: frames are summed before their channels exist.
        """
        if self.synapse is None:
            return powers(self.decay, steps).flip(0)
        # An input m steps ago came through the synapse in m + 1 ways: d^m + d^(m-1) a + ... + a^m.
        d, a = powers(self.decay, steps), powers(self.synapse, steps)
        ways = [(d[: m + 1].flip(0) * a[: m + 1]).sum() for m in range(steps)]
        return torch.stack(ways[::-1])

    def synapse_weights(self, steps: int) -> Tensor:
        """As :meth:`weights`, of what is left in the synaptic current."""
        assert self.synapse is not None
        return powers(self.synapse, steps).flip(0)

    def held(self, steps: int) -> Leak:
        """The filter whose one step is ``steps`` steps of this one with an input that stays the same meanwhile.

        Raises:
            UnknownNeuronError: the neuron has a synaptic current, which would be another filter for every input.
        """
        if steps == 1:
            return self
        if self.synapse is not None:
            raise UnknownNeuronError("a neuron with a synaptic current cannot hold its input")
        return Leak(self.decay**steps, self.gain * sum(self.decay**i for i in range(steps)), self.rest)


def powers(base: Value, count: int) -> Tensor:
    """``[1, base, base^2, ...]``, ``count`` of them; of the mean where ``base`` has an element for every channel.

    >>> powers(0.5, 3).tolist()
    [1.0, 0.5, 0.25]
    """
    mean = base.mean() if isinstance(base, Tensor) else torch.tensor(base, dtype=torch.float32)
    return mean ** torch.arange(count, device=mean.device)


def collapsed(
    neuron: nn.Module, drive: Tensor, lengths: tuple[int, ...], states: tuple[Tensor, ...] = (), hold: int = 1
) -> tuple[Tensor, ...]:
    """One step of ``neuron`` for every chunk: ``U <- beta^k U + I_c``, fire, reset.

    Below the threshold this is where the neuron's k own steps would have left its membrane. It can fire once a chunk.
    A reset that snnTorch applies at the next step decays with the chunk's remaining steps; where it sets the membrane
    to zero behind the charge (Lapicque, Synaptic), the chunk's input counts as constant for it.

    Args:
        neuron: one with a known update rule; its surrogate gives the gradient, its attributes hold the state.
        drive: decayed sums of the input, ``[C, N, ...]``; for a neuron with a synaptic current ``[2, C, N, ...]``, the
            second of which goes into that current (:meth:`Leak.synapse_weights`).
        lengths: frames of every chunk.
        states: where the caller holds the state, as snnTorch passes it: the membrane last.
        hold: time steps that every frame stands for.

    Returns:
        Spikes ``[C, N, ...]``, and behind them every state at the end of each chunk where ``states`` were passed.

    Raises:
        UnknownNeuronError: see :class:`Leak`.
    """
    spec = live_spec(neuron)
    if spec is None or not spec.described:
        raise UnknownNeuronError(f"the update rule of {type(neuron).__name__} in this configuration is not known")
    step = _Step(neuron, spec, Leak.of(spec).held(hold))
    inputs = drive.unbind(0) if step.leak.synapse is not None else (drive,)
    v, syn = step.start(states, inputs[0][0])
    spikes, membranes, currents = [], [], []
    for chunk, frames in enumerate(lengths):
        s, v, syn = step(v, syn, tuple(x[chunk] for x in inputs), frames)
        spikes.append(s)
        membranes.append(v)
        currents.append(syn)
    if states:
        held = (torch.stack(currents), torch.stack(membranes)) if len(spec.states) == 2 else (torch.stack(membranes),)
        return torch.stack(spikes), *held
    step.keep(v, syn, membranes)
    return (torch.stack(spikes),)


class _Step:
    """Several time steps of one neuron as one."""

    def __init__(self, neuron: nn.Module, spec: NeuronSpec, leak: Leak):
        self.neuron, self.spec, self.leak = neuron, spec, leak
        self.late = spec.reset_timing is not ResetTiming.SAME_STEP
        self.hard = spec.reset is Reset.HARD

    def start(self, states: tuple[Tensor, ...], like: Tensor) -> tuple[Tensor, Tensor]:
        """Membrane and synaptic current that the first chunk starts from, of the shape of one frame's currents."""
        held = (states[-1], *states[:-1]) if states else [read_state(self.neuron, name) for name in self.spec.states]
        rest = self.spec.reset_value if self.hard else 0.0
        found = [self._as_tensor(value, rest if i == 0 else 0.0, like) for i, value in enumerate(held)]
        return (found[0], found[1]) if len(found) == 2 else (found[0], torch.zeros((), device=like.device))

    def _as_tensor(self, value: object, start: float, like: Tensor) -> Tensor:
        if isinstance(value, Tensor) and value.shape == like.shape:
            return value
        return torch.full_like(like, value if isinstance(value, float) else start)

    def keep(self, v: Tensor, syn: Tensor, membranes: list[Tensor]) -> None:
        """Leave the state in the neuron's attributes."""
        for name, value in zip(self.spec.states, (v, syn), strict=False):
            write_state(self.neuron, name, value)
        if stores_sequence(self.neuron):
            self.neuron.v_seq = torch.stack(membranes)

    def __call__(self, v: Tensor, syn: Tensor, x: tuple[Tensor, ...], frames: int) -> tuple[Tensor, Tensor, Tensor]:
        late = fire(self.neuron, self.spec, v).detach() if self.late else None
        if late is not None and self.hard and self.spec.charge is Charge.DECAY:
            v = (1 - late) * v
        h, syn = self._charged(v, syn, x, frames)
        if late is not None:
            h = self._reset_late(h, late, x[0], frames)
        s = fire(self.neuron, self.spec, h)
        return s, self._reset(h, s, late), syn

    def _charged(self, v: Tensor, syn: Tensor, x: tuple[Tensor, ...], frames: int) -> tuple[Tensor, Tensor]:
        leak = self.leak
        h = leak.rest + (v - leak.rest) * leak.decay**frames + x[0] * leak.gain
        if leak.synapse is None:
            return h, syn
        # c_k = d^(k-1) a + d^(k-2) a^2 + ... + a^k is what the synaptic current of before puts into the membrane.
        paths = sum(leak.decay ** (frames - i) * leak.synapse**i for i in range(1, frames + 1))
        return h + paths * syn, leak.synapse**frames * syn + x[1]

    def _reset_late(self, h: Tensor, late: Tensor, x: Tensor, frames: int) -> Tensor:
        """The reset that the spike of the chunk before is due at this chunk's first step."""
        if self.spec.reset is Reset.SOFT:
            return h - late * self.spec.threshold * self.leak.decay ** (frames - 1)
        if not self.hard or self.spec.charge is Charge.DECAY:
            return h
        weights = self.leak.weights(frames)
        later = 1 - weights[0] / weights.sum()
        return (1 - late) * h + late * later * self.leak.gain * x

    def _reset(self, h: Tensor, s: Tensor, late: Tensor | None) -> Tensor:
        spec = self.spec
        if spec.reset is Reset.NONE or spec.reset_timing is ResetTiming.NEXT_STEP:
            return h
        due = s.detach() if late is not None or getattr(self.neuron, "detach_reset", False) else s
        due = due if late is None else due - late
        if spec.reset is Reset.SOFT:
            return h - due * spec.threshold
        return (1 - due) * h + due * spec.reset_value if late is None else h - due * h
