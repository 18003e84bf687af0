"""Worker program: products of spikes and a dense weight matrix in PyTorch.

Variants: ``eager fp32``, ``eager bf16``, ``compiled fp32``, ``compiled bf16`` (weights frozen, hence prepacked),
``csr`` (a CSR tensor is made of the dense spikes in every call), ``csr, own format`` (it is given), ``sparseflow fp32``
and ``sparseflow bf16``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch_common import OnTorch, compiled, read
from wire import serve


class Dense(OnTorch):
    """A linear layer; bfloat16 spikes are what a network in bfloat16 has, so they are converted outside the timer."""

    def __init__(self, variant: str, problem: dict[str, Any]):
        super().__init__(problem)
        self.dtype = torch.bfloat16 if variant.endswith("bf16") else torch.float32
        outputs, inputs = problem["w"]
        layer = torch.nn.Linear(inputs, outputs, bias=False).eval()
        layer.weight.copy_(read(problem["weight"], problem["w"]))
        layer = layer.to(self.device, self.dtype)
        self.layer = compiled(layer) if variant.startswith("compiled") else layer

    def prepared(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype)

    def result(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Csr(OnTorch):
    """Spikes in CSR times the dense ``[K, N]`` matrix, transposed once."""

    def __init__(self, variant: str, problem: dict[str, Any]):
        super().__init__(problem)
        self.given = variant.endswith("own format")
        self.weight = read(problem["weight"], problem["w"]).t().contiguous().to(self.device)

    def prepared(self, x: torch.Tensor) -> torch.Tensor:
        return x.to_sparse_csr() if self.given else x

    def result(self, x: torch.Tensor) -> torch.Tensor:
        return (x if self.given else x.to_sparse_csr()) @ self.weight


class Sparseflow(OnTorch):
    """An accelerated linear layer on spikes, as a user has it: dense or sparse as was measured to be faster."""

    def __init__(self, variant: str, problem: dict[str, Any]):
        super().__init__(problem)
        self.dtype = torch.bfloat16 if variant.endswith("bf16") else torch.float32
        outputs, inputs = problem["w"]
        linear = torch.nn.Linear(inputs, outputs, bias=False)
        linear.weight.copy_(read(problem["weight"], problem["w"]))
        self.net = torch.nn.Sequential(linear).eval().to(self.device, self.dtype)

    def load(self, files: Any) -> None:
        import sparseflow

        first = self.prepared(read(files[0], self.shape).to(self.device))
        self.net = sparseflow.accelerate(sparseflow.restore(self.net), first)
        super().load(files)
        self.note = "; ".join(f"{layer.path} ({layer.reason})" for layer in sparseflow.report(self.net).layers)

    def prepared(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype)

    def result(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def build(variant: str, problem: dict[str, Any]) -> OnTorch:
    """The contender of that name."""
    if variant.startswith("sparseflow"):
        return Sparseflow(variant, problem)
    return Csr(variant, problem) if variant.startswith("csr") else Dense(variant, problem)


if __name__ == "__main__":
    serve(build)
