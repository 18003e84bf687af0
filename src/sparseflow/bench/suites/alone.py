"""Measurements that need an interpreter of their own: what it imports and allocates is the measurement."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import sparseflow
from sparseflow.bench.records import Gate

from .baselines import Call

WHAT = "sparse layers and fused blocks inside their float64 budgets, in the measured process"


def run(*arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What ``python arguments`` prints as JSON in its last line.

    Raises:
        RuntimeError: it ended with another exit code than 0; the message has the last line of its error output.
    """
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=os.environ | dict(environment or {}), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"python {' '.join(arguments)} ended with exit code {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def checked(net: nn.Module, call: Call) -> str:
    """Why an accelerated network's next answer is wrong; empty where it is right."""
    try:
        with torch.no_grad(), sparseflow.verify(net):
            call()
    except sparseflow.MismatchError as error:
        return str(error)
    return ""


def gate(reasons: list[str]) -> Gate:
    """The gate of a point, from what :func:`checked` said in each process."""
    why = tuple(dict.fromkeys(filter(None, reasons)))
    return Gate(not why, WHAT, why)
