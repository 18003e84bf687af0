"""Layers that see one weighted sum for every K frames: TAC and TAC-TP, to build networks with and to train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparseflow.frameworks import live_spec, steps_over_time
from sparseflow.graph.timeops import neuron_sequence

from .chunks import chunk_lengths, decayed_sum, repeated
from .neurons import Leak, collapsed

_SMALLEST = 1e-4  # what a weight is learned from where the neuron forgets at once; a logarithm needs more than 0


class Aggregated(nn.Module):
    """A layer and a neuron over time, of which the layer sees one frame for every ``group_size``.

    The frames of a chunk are summed with the weights that the neuron's leak gives them, ``beta^(k - 1 - j)``, and the
    layer runs once on the sum. K = 1 is the layer and the neuron as they are. What happens behind the layer is the
    subclass's: :class:`TAC` or :class:`TACTP`.

    Args:
        layer: what makes currents of a frame: a convolution, a linear layer, or several modules of which the chain is
            affine, such as a convolution with its trained batch norm. Its constant part counts once for every frame,
            weighted like the frame: the sum over a chunk of what the layer gives for each frame is computed exactly.
        neuron: SpikingJelly's or snnTorch's, in either step mode, or a registered one of your own. It holds the state.
        group_size: K, frames in a chunk; the last chunk of a sequence may be shorter.
        norm: batch norm of the *chunks'* currents, for training from scratch as published. A batch norm whose
            statistics are those of single frames belongs into ``layer``.
        learn_weights: train the weights of the frames, which start as those of the neuron's leak and stay positive.

    Shapes: ``[T, N, ...]`` to spikes; state outlives the call in the neuron, as it does without aggregation. For a
    neuron that is passed its states (snnTorch with ``init_hidden=False``) pass them behind the input, and get them
    back behind the spikes, over time.

    Raises:
        ValueError: ``group_size`` is not positive.
    """

    def __init__(
        self,
        layer: nn.Module,
        neuron: nn.Module,
        group_size: int,
        *,
        norm: nn.Module | None = None,
        learn_weights: bool = False,
    ):
        super().__init__()
        if group_size < 1:
            raise ValueError(f"group_size must be positive, got {group_size}")
        self.layer, self.norm, self.neuron = layer, norm, neuron
        self.group_size = group_size
        self.hold = 1
        """Steps of the neuron that every frame stands for: more than 1 behind a layer that collapsed time."""
        initial = self._leaks().clamp_min(_SMALLEST).log().detach() if learn_weights else None
        self.log_weights = nn.Parameter(initial) if initial is not None else None

    def extra_repr(self) -> str:
        hold = f", hold={self.hold}" if self.hold > 1 else ""
        return f"group_size={self.group_size}{hold}{', learned weights' if self.log_weights is not None else ''}"

    def forward(self, x_seq: Tensor, *states: Tensor) -> Any:
        """Frames ``[T, N, ...]`` to spikes."""
        raise NotImplementedError

    def weights(self) -> Tensor:
        """``[F, K]``: weights of the frames in the sums that the neuron needs, two where it has a synaptic current."""
        return self._leaks() if self.log_weights is None else self.log_weights.exp()

    def _leaks(self) -> Tensor:
        spec = live_spec(self.neuron)
        if spec is None or not spec.described:
            return torch.ones(1, self.group_size)
        return self._filters(Leak.of(spec).held(self.hold))

    def _filters(self, leak: Leak) -> Tensor:
        return leak.weights(self.group_size)[None]

    def _chunks(self, x_seq: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output for the weighted means of the chunks, ``[F, C, N, ...]``, and the sums of the weights.

        An affine layer of a mean of frames is the mean of what it is for each of them, constant parts included.
        """
        weights = self.weights().to(x_seq.device)
        lengths = chunk_lengths(x_seq.shape[0], self.group_size)
        totals = torch.stack([weights[:, self.group_size - k :].sum(1) for k in lengths], 1)
        sums = decayed_sum(x_seq, weights)
        means = sums / _beside(totals, sums)
        return over_frames(self.layer, means.flatten(0, 1)).unflatten(0, means.shape[:2]), totals

    def _normalised(self, chunks: Tensor) -> Tensor:
        return chunks if self.norm is None else over_frames(self.norm, chunks.flatten(0, 1)).reshape(chunks.shape)

    def _exact(self, x_seq: Tensor, states: tuple[Tensor, ...]) -> Any:
        currents = over_frames(self.layer, x_seq)
        return run_neuron(self.neuron, self._normalised(currents[None])[0], states)


class TAC(Aggregated):
    """Temporal aggregated convolution: the neuron takes one step for every chunk, ``ceil(T / K)`` of them for T frames.

    ``U <- beta^k U + sum_j beta^(k - 1 - j) I_j``, fire, reset: below the threshold the membrane is where k steps would
    have left it, and the neuron fires at most once a chunk. For rate-coded input, where the order of frames says
    nothing. Lossy. Arguments, states and errors: :class:`Aggregated`.

    Raises:
        UnknownNeuronError: in a call, if the neuron's update rule is not known and ``group_size`` is above 1.

    Source: https://arxiv.org/abs/2603.13810.

    >>> from spikingjelly.activation_based import neuron
    >>> TAC(nn.Conv2d(1, 4, 3), neuron.LIFNode(step_mode="m"), 8)(torch.rand(16, 2, 1, 5, 5)).shape
    torch.Size([2, 2, 4, 3, 3])
    """

    def _filters(self, leak: Leak) -> Tensor:
        membrane = leak.weights(self.group_size)
        return (
            membrane[None] if leak.synapse is None else torch.stack([membrane, leak.synapse_weights(self.group_size)])
        )

    def forward(self, x_seq: Tensor, *states: Tensor) -> Any:
        """Frames ``[T, N, ...]`` to spikes ``[ceil(T / group_size), N, ...]``."""
        if self.group_size == 1 and self.hold == 1:
            return self._exact(x_seq, states)
        chunks, totals = self._chunks(x_seq)
        drive = self._normalised(chunks * _beside(totals, chunks))
        lengths = chunk_lengths(x_seq.shape[0], self.group_size)
        spikes, *rest = collapsed(self.neuron, drive if len(drive) > 1 else drive[0], lengths, states, self.hold)
        return (spikes, *rest) if states else spikes


class TACTP(Aggregated):
    """TAC that preserves time: the layer runs once for every chunk, and the neuron takes all its T steps.

    Every one of the chunk's k steps gets the same current. Published is the decayed sum ``I_c`` itself at each step,
    which networks have to be trained for: it drives the neuron by up to K times what it was trained with. With
    ``normalise`` each step gets the weighted mean of the frames' currents, for networks that were trained without
    aggregation. For event data, where the order of frames matters. Lossy. Other arguments, states and errors:
    :class:`Aggregated`.

    Source: https://arxiv.org/abs/2603.13810.

    >>> import snntorch
    >>> TACTP(nn.Linear(6, 4), snntorch.Leaky(0.9, init_hidden=True), 2, normalise=True)(torch.rand(5, 2, 6)).shape
    torch.Size([5, 2, 4])
    """

    def __init__(
        self,
        layer: nn.Module,
        neuron: nn.Module,
        group_size: int,
        *,
        norm: nn.Module | None = None,
        normalise: bool = False,
        learn_weights: bool = False,
    ):
        super().__init__(layer, neuron, group_size, norm=norm, learn_weights=learn_weights)
        self.normalise = normalise

    def extra_repr(self) -> str:
        return super().extra_repr() + (", normalise=True" if self.normalise else "")

    def forward(self, x_seq: Tensor, *states: Tensor) -> Any:
        """Frames ``[T, N, ...]`` to spikes ``[T, N, ...]``."""
        if self.group_size == 1:
            return self._exact(x_seq, states)
        chunks, totals = self._chunks(x_seq)
        drive = self._normalised(chunks if self.normalise else chunks * _beside(totals, chunks))
        lengths = chunk_lengths(x_seq.shape[0], self.group_size)
        return run_neuron(self.neuron, repeated(drive[0], lengths), states)


def over_frames(module: nn.Module, x_seq: Tensor) -> Tensor:
    """``module`` on every frame of ``[T, N, ...]`` at once, whether it takes sequences or single frames.

    >>> over_frames(nn.Linear(3, 2), torch.zeros(4, 5, 3)).shape
    torch.Size([4, 5, 2])
    """
    if any(steps_over_time(part) for part in module.modules()):
        return module(x_seq)
    return module(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])


def run_neuron(neuron: nn.Module, x_seq: Tensor, states: tuple[Tensor, ...] = ()) -> Any:
    """``neuron`` over currents ``[T, N, ...]``, in whichever way it is called."""
    return neuron(x_seq) if steps_over_time(neuron) else neuron_sequence(neuron, x_seq, *states)


def _beside(totals: Tensor, chunks: Tensor) -> Tensor:
    """``[F, C]`` to broadcast with ``[F, C, N, ...]``."""
    return totals.view(*totals.shape, *[1] * (chunks.dim() - 2))
