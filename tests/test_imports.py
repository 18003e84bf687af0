"""Importing sparseflow is light and touches no framework, compiler or GPU library."""

from __future__ import annotations

import subprocess
import sys

_PROBE = """
import sys
import sparseflow
heavy = ("triton", "spikingjelly", "snntorch", "plotly", "jinja2", "rich", "matplotlib", "torchvision",
         "torch._dynamo", "torch._inductor")
print([name for name in heavy if name in sys.modules])
import torch
print(torch.cuda.is_initialized())
from sparseflow.kernels.cpu import loader
"""


def test_import_is_lean():
    baseline = "import sys, torch; print([n for n in ('torch._dynamo', 'triton') if n in sys.modules])"
    run = lambda code: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout  # noqa: E731
    assert run(baseline).strip() == "[]"
    assert run(_PROBE).split("\n")[:2] == ["[]", "False"]
