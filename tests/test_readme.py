"""The README's examples run as printed."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

import sparseflow

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = [block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "import" in block]
TITLES = [
    re.search(r"import (snntorch|spikingjelly)|from (spikingjelly)|(register_neuron)", block) for block in EXAMPLES
]


def test_there_is_an_example_for_each_framework():
    assert [next(filter(None, title.groups())) for title in TITLES] == ["spikingjelly", "snntorch", "register_neuron"]


@pytest.mark.parametrize("example", EXAMPLES, ids=["spikingjelly", "snntorch", "plain"])
def test_example_runs_and_leaves_an_accelerated_model(example):
    namespace: dict = {"__name__": "readme"}
    with warnings.catch_warnings():
        # Which layers win is measured; that the example runs and is planned is not.
        warnings.simplefilter("ignore", sparseflow.NothingAcceleratedWarning)
        exec(compile(example, str(README), "exec"), namespace)
    assert any(layer.provenance != "dense" for layer in sparseflow.report(namespace["net"]).layers)
