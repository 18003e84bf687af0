"""Honest timing: dense and accelerated in alternation, no figure without a green correctness gate."""

from .compare import compare

__all__ = ["compare"]
