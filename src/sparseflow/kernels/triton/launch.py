"""The one way a Triton kernel is launched, and how launches are recorded to be compiled without a GPU."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

Argument = Tensor | int | float | None

_records: contextvars.ContextVar[list[Launch] | None] = contextvars.ContextVar("records", default=None)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: a jit function, its grid, its run-time arguments and its compile-time constants.

    ``fp_fusion`` lets the compiler fuse multiplications with additions. It is always said, since the default differs
    between versions of Triton, and must be off where every operation has to be rounded on its own.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Argument]
    constants: dict[str, Any]
    warps: int
    stages: int
    fp_fusion: bool = True

    def run(self) -> None:
        """Launch on the device of the arguments; nothing is launched for an empty grid."""
        if 0 in self.grid:
            return
        with _surroundings(self.arguments):
            self.kernel[self.grid](
                **self.arguments,
                **self.constants,
                num_warps=self.warps,
                num_stages=self.stages,
                enable_fp_fusion=self.fp_fusion,
            )


def launch(
    kernel: Any, grid: tuple[int, ...], *, warps: int, stages: int, constants: dict[str, Any], **arguments: Argument
) -> None:
    """Run ``kernel``, or add it to the list that :func:`recording` gave."""
    _run_or_record(Launch(kernel, grid, arguments, constants, warps, stages))


def launch_unfused(
    kernel: Any, grid: tuple[int, ...], *, warps: int, stages: int, constants: dict[str, Any], **arguments: Argument
) -> None:
    """As :func:`launch`, with every operation rounded on its own."""
    _run_or_record(Launch(kernel, grid, arguments, constants, warps, stages, fp_fusion=False))


def _run_or_record(launch: Launch) -> None:
    records = _records.get()
    if records is None:
        launch.run()
    else:
        records.append(launch)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of running them; with tensors on ``meta``, of any size and without a GPU.

    >>> with recording() as launches:
    ...     pass
    >>> launches
    []
    """
    records: list[Launch] = []
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)


def is_recording() -> bool:
    """Whether launches are being collected."""
    return _records.get() is not None


def interpreting() -> bool:
    """Whether ``TRITON_INTERPRET=1`` was set when the kernels were loaded: then they run on CPU tensors."""
    return not isinstance(_probe, triton.JITFunction)


@triton.jit
def _probe():
    pass


def runs_on(device: torch.device) -> bool:
    """Whether kernels can be launched (or recorded) for tensors on ``device``."""
    if device.type == "meta":
        return is_recording()
    return device.type == ("cpu" if interpreting() else "cuda")


_interpreter = threading.Lock()


def _surroundings(arguments: dict[str, Argument]) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors.

    Its interpreter replaces parts of ``triton.language`` while it runs a kernel, so that threads have to take turns.
    """
    if interpreting():
        return _interpreter
    tensor = next(argument for argument in arguments.values() if isinstance(argument, Tensor))
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
