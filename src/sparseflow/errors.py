"""Exceptions and warnings that sparseflow raises. All derive from :class:`SparseflowError` or a standard warning."""

from __future__ import annotations


class SparseflowError(Exception):
    """Base class of every error sparseflow raises on purpose."""


class UnsupportedModelError(SparseflowError):
    """The model cannot be accelerated at all, and ``strict=True`` asked to be told."""


class BackendUnavailableError(SparseflowError):
    """The backend named by ``backend=`` cannot run on this machine. ``"auto"`` never raises it."""


class MismatchError(SparseflowError):
    """A sparse result left the error budget of its dense counterpart (see :func:`sparseflow.verify`)."""


class CalibrationError(SparseflowError):
    """A calibration file cannot be used: wrong schema, wrong machine, or unreadable."""


class NothingAcceleratedWarning(UserWarning):
    """``accelerate`` found no layer it could make faster; the report says why for each of them."""
