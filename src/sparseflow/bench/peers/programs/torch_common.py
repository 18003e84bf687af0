"""What the worker programs share whose peer computes with PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


def read(file: str, shape: Sequence[int]) -> torch.Tensor:
    """A float32 tensor in memory of its own."""
    return torch.from_file(file, size=math.prod(shape), dtype=torch.float32).clone().reshape(tuple(shape))


def write(output: torch.Tensor, file: str) -> list[int]:
    """Raw float32; gives the shape."""
    target = torch.from_file(file, shared=True, size=output.numel(), dtype=torch.float32)
    target.copy_(output.detach().reshape(-1))
    return list(output.shape)


def compiled(function: Any) -> Any:
    """``torch.compile`` with weights frozen into the graph, and an error instead of a silent eager run."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function)


class OnTorch:
    """A contender that keeps float32 inputs as tensors; a subclass says what a call computes.

    ``prepared`` turns one input into what the peer is given, outside the timer.
    """

    note = ""

    def __init__(self, problem: dict[str, Any]):
        torch.set_num_threads(problem["threads"])
        torch.set_grad_enabled(False)
        self.device, self.shape = torch.device(problem["device"]), problem["x"]
        self.inputs: list[Any] = []

    def prepared(self, x: torch.Tensor) -> Any:
        """The peer's input."""
        return x

    def result(self, x: Any) -> torch.Tensor:
        """What is to be timed."""
        raise NotImplementedError

    def load(self, files: Sequence[str]) -> None:
        """Inputs on the device, and two calls to warm up: the second runs what the first has compiled."""
        self.inputs = [self.prepared(read(file, self.shape).to(self.device)) for file in files]
        for index in range(2):
            self.call(index % len(self.inputs))

    def call(self, index: int) -> torch.Tensor:
        """The result, with the device idle again."""
        output = self.result(self.inputs[index])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return output

    def save(self, output: torch.Tensor, file: str) -> list[int]:
        """As float32."""
        return write(output, file)
