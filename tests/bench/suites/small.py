"""Small workloads for the tests of suites."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("spikingjelly")
pytest.importorskip("snntorch")

from sparseflow.bench.suites import nets
from sparseflow.bench.suites.baselines import Workload
from sparseflow.bench.suites.stand_ins import fire_like_trained

CONFIG = {"batch": 2, "T": 3}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def narrow() -> Workload:
    """A narrow digits net, ``[3, 2, 1, 16, 16]``."""
    data, net = nets.from_checkout("digits.data"), nets.from_checkout("digits.net")
    images = nn.functional.avg_pool2d(data.load_split()[1].images[:4], 2)
    inputs = tuple(nets.encode(part, 3) for part in images.split(2))

    def build() -> nn.Module:
        torch.manual_seed(0)
        return fire_like_trained(net.DigitsResNet((4, 8, 8, 8)), inputs[0], density=0.1)

    return Workload("narrow", CONFIG, build, inputs)


def tutorial() -> Workload:
    """The trained tutorial net of snnTorch, two inputs of two images."""
    return nets.snntorch_convnet(2, images=4)
