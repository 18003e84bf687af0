"""Chunks of frames: how a sequence is cut, and the weighted sums that stand for its chunks."""

from __future__ import annotations

import torch
from torch import Tensor


def chunk_lengths(steps: int, group_size: int) -> tuple[int, ...]:
    """Lengths of the chunks of ``steps`` frames: ``group_size`` each, the last one what is left.

    Raises:
        ValueError: either number is not positive.

    >>> chunk_lengths(10, 4)
    (4, 4, 2)
    """
    if steps < 1 or group_size < 1:
        raise ValueError(f"steps and group_size must be positive, got {steps} and {group_size}")
    full, rest = divmod(steps, group_size)
    return (group_size,) * full + ((rest,) if rest else ())


def decayed_sum(x_seq: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of consecutive frames, ``A_c = sum_j w_j x_(cK + j)``; K is the number of weights.

    A last chunk of k < K frames takes the last k weights: those of a decayed sum say how long ago a frame was, counted
    from the end of its chunk. Gradients flow to both arguments.

    Args:
        x_seq: frames ``[T, N, ...]``.
        weights: ``[K]``, or ``[F, K]`` for F sums of every chunk.

    Returns:
        ``[ceil(T / K), N, ...]``, or ``[F, ceil(T / K), N, ...]``.

    Source: Temporal Aggregated Convolution, https://arxiv.org/abs/2603.13810, with ``w_j = beta^(K - 1 - j)``.

    >>> decayed_sum(torch.tensor([1.0, 1.0, 1.0])[:, None], torch.tensor([0.5, 1.0])).tolist()
    [[1.5], [1.0]]
    """
    filters = weights if weights.dim() == 2 else weights[None]
    size = filters.shape[1]
    whole = x_seq.shape[0] - x_seq.shape[0] % size
    sums = []
    if whole:
        sums.append(_sums(x_seq[:whole].unflatten(0, (-1, size)), filters))
    if whole < x_seq.shape[0]:
        rest = x_seq[whole:]
        sums.append(_sums(rest[None], filters[:, size - rest.shape[0] :]))
    found = sums[0] if len(sums) == 1 else torch.cat(sums, 1)
    return found if weights.dim() == 2 else found[0]


def _sums(chunks: Tensor, filters: Tensor) -> Tensor:
    """``[F, C, ...]`` of ``[C, k, ...]`` and ``[F, k]``: one matrix product, which reads every frame once."""
    flat = chunks.flatten(2) if chunks.dim() > 2 else chunks[:, :, None]
    sums = torch.matmul(filters.to(flat.dtype), flat)
    return sums.transpose(0, 1).reshape(filters.shape[0], chunks.shape[0], *chunks.shape[2:])


def repeated(chunks: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """``[C, N, ...]`` to ``[T, N, ...]``: every chunk as often as it has frames.

    >>> repeated(torch.tensor([1.0, 2.0]), (2, 1)).tolist()
    [1.0, 1.0, 2.0]
    """
    if len(set(lengths)) == 1:
        return chunks[:, None].expand(-1, lengths[0], *chunks.shape[1:]).flatten(0, 1)
    return chunks.repeat_interleave(torch.tensor(lengths, device=chunks.device), 0, output_size=sum(lengths))
