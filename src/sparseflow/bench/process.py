"""One case in a process of its own, forked from one that has imported PyTorch and the frameworks.

A case must not find what the one before left: the allocator's and the compiler's state, packed weights, warm threads.
A crash costs one case. Importing PyTorch and SpikingJelly takes seconds, so that the fork is of a server that has done
it and nothing else (no parallel region has run there, which OpenMP would not survive); where there is no ``fork``, the
process is a new one. Whatever a case prints goes to a log file, since a progress bar is on the terminal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import select
import signal
import sys
import threading
import traceback
import warnings
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from .records import Absent
from .suites import Options, Row, load

_PRELOADED = [
    "sparseflow.bench.suites.layers",
    "spikingjelly.activation_based.model.spiking_resnet",
    "snntorch",
    "sklearn.datasets",
]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The rows of a case; ``failed`` is whether it ended in an error other than a missing framework."""

    rows: list[Row]
    failed: bool = False


def measure(suite: str, case: str, options: Options, log: Path) -> Outcome:
    """Run a case in its own process and wait for it; an interrupt ends the process and what it has started."""
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, suite, case, options, str(log)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        error = f"its process ended with exit code {process.exitcode}; see {log}"
        return Outcome([Absent(f"{suite}: {case}", error)], failed=True)
    finally:
        _end(process)


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)  # names that cannot be imported are left out
    return context


def _end(process: BaseProcess) -> None:
    """Kill the process's group, in which a compiler may still be running, and wait."""
    if process.is_alive() and process.pid and hasattr(os, "killpg"):
        process.join(1.0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.is_alive():
        process.terminate()
    process.join()


def _child(sender: Connection, suite: str, case: str, options: Options, log: str) -> None:
    if hasattr(os, "setsid"):
        os.setsid()
        threading.Thread(target=_end_with_reader, args=(sender.fileno(),), daemon=True).start()
    with open(log, "a", buffering=1) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        print(f"== {suite}: {case}", file=sys.stderr, flush=True)
        sender.send(measure_here(suite, case, options))


def _end_with_reader(pipe: int) -> None:
    """Kill this process's group once nobody reads its pipe: a case that outlives its run would disturb the next one."""
    watch = select.poll()
    watch.register(pipe, 0)  # errors only, of which a reader that is gone is one
    watch.poll()
    os.killpg(0, signal.SIGKILL)


def measure_here(suite: str, case: str, options: Options) -> Outcome:
    """The same in this process, whose threads and generator it sets."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    warnings.simplefilter("ignore")
    try:
        found = next(found for found in load(suite).run(options) if found.name == case)
        return Outcome(list(found.measure()))
    except ImportError as error:
        return Outcome([Absent(f"{suite}: {case}", f"{type(error).__name__}: {error}")])
    except Exception as error:
        traceback.print_exc()
        return Outcome([Absent(f"{suite}: {case}", f"{type(error).__name__}: {error}")], failed=True)
