from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflow.temporal.chunks import chunk_lengths, decayed_sum, repeated


def one_by_one(x, weights):
    chunks = []
    for start in range(0, len(x), len(weights)):
        frames = x[start : start + len(weights)]
        chunks.append(sum(w * f for w, f in zip(weights[len(weights) - len(frames) :], frames, strict=True)))
    return torch.stack(chunks)


@settings(deadline=None)
@given(steps=st.integers(1, 20), size=st.integers(1, 24), rest=st.sampled_from([(), (3,), (2, 3), (0, 3)]))
def test_sums_are_those_of_single_frames(steps, size, rest):
    x = torch.randn(steps, 2, *rest, dtype=torch.float64)
    weights = torch.rand(size, dtype=torch.float64)
    assert decayed_sum(x, weights).shape == (len(chunk_lengths(steps, size)), 2, *rest)
    torch.testing.assert_close(decayed_sum(x, weights), one_by_one(x, weights))


def test_several_filters_at_once():
    x, weights = torch.randn(7, 2, 3), torch.rand(2, 3)
    both = decayed_sum(x, weights)
    for found, filter_ in zip(both, weights, strict=True):
        torch.testing.assert_close(found, one_by_one(x, filter_))


def test_gradients_of_frames_and_weights():
    x = torch.randn(5, 1, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(decayed_sum, (x, weights))


def test_frames_of_any_memory_layout():
    x = torch.randn(6, 2, 3, 4, 5).permute(0, 1, 4, 3, 2)
    weights = torch.rand(4)
    torch.testing.assert_close(decayed_sum(x, weights), decayed_sum(x.contiguous(), weights))


@settings(deadline=None)
@given(steps=st.integers(1, 20), size=st.integers(1, 24))
def test_chunks_are_repeated_for_their_frames(steps, size):
    lengths = chunk_lengths(steps, size)
    assert sum(lengths) == steps
    found = repeated(torch.arange(len(lengths))[:, None], lengths)
    assert found[:, 0].tolist() == [t // size for t in range(steps)]


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0)])
def test_no_frames_are_refused(arguments):
    with pytest.raises(ValueError, match="must be positive"):
        chunk_lengths(*arguments)
