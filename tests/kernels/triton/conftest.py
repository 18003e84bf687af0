"""What the compiler makes of the kernels, once for all tests that look at it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def report() -> dict:
    """A covering subset of all kernels and variants for sm_90, and the start of it for the other targets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sparseflow.kernels.triton.compile", "--json", "--cover", "sm_90"]
    command += [part for target in ("sm_80", "sm_100", "gfx942") for part in ("--sample", target)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)
