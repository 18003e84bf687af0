"""A worker process from the runner's side: requests, replies, time limits, and what is left of one that died."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from sparseflow.errors import SparseflowError

_LAST_WORDS = 400  # characters of a dead worker's standard error output


class PeerError(SparseflowError):
    """A worker reported an error, died, or did not answer in time."""


class Worker:
    """One process that speaks the protocol of ``programs/wire.py``. Ends with its ``with`` block.

    >>> import sys
    >>> echo = "import sys\\nfor line in sys.stdin: print('{\\"got\\": 1}', flush=True)"
    >>> with Worker([sys.executable, "-c", echo]) as worker:
    ...     worker.request("prepare", limit_s=60)
    {'got': 1}
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self._replies: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(line)
        self._replies.put(None)

    def request(self, op: str, *, limit_s: float, **fields: Any) -> dict[str, Any]:
        """The reply to one request.

        Raises:
            PeerError: the worker says so, ends, or takes longer than ``limit_s``; then it is killed.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **fields}) + "\n")
            self._process.stdin.flush()
            line = self._replies.get(timeout=limit_s)
        except OSError:
            line = None
        except queue.Empty:
            self._process.kill()
            raise PeerError(f"{op} took more than {limit_s:g} s") from None
        if line is None:
            raise PeerError(f"the worker ended with status {self._process.wait()} during {op}: {self._last_words()}")
        reply = json.loads(line)
        if "error" in reply:
            raise PeerError(f"{op}: {reply['error']}")
        return reply

    def _last_words(self) -> str:
        self._errors.seek(0)
        return " ".join(self._errors.read().decode(errors="replace").split())[-_LAST_WORDS:]

    def close(self) -> None:
        """End the process, which has nothing to save."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):  # a request may still lie in the buffer
                if pipe is not None:
                    pipe.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
