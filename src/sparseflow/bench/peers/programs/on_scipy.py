"""Worker program: scipy's sparse matrices, on one thread as scipy has it.

Variants: ``dense spikes`` makes a CSR matrix of a float32 array in every call, ``own format`` is given one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from wire import serve


class Product:
    """``[M, K]`` spikes in CSR times a dense ``[K, N]`` matrix; the weights are transposed once."""

    note = "one thread"

    def __init__(self, variant: str, problem: dict[str, Any]):
        self.given, self.shape = variant == "own format", problem["x"]
        self.weight = _read(problem["weight"], problem["w"]).T.copy()
        self.inputs: list[Any] = []

    def load(self, files: Sequence[str]) -> None:
        """As dense arrays, or as CSR matrices."""
        from scipy.sparse import csr_matrix

        dense = [_read(file, self.shape) for file in files]
        self.inputs = [csr_matrix(x) for x in dense] if self.given else dense
        self.call(0)

    def call(self, index: int) -> Any:
        """``[M, N]``."""
        from scipy.sparse import csr_matrix

        x = self.inputs[index]
        return (x if self.given else csr_matrix(x)) @ self.weight

    def save(self, output: Any, file: str) -> list[int]:
        """As float32."""
        output.astype("float32").tofile(file)
        return list(output.shape)


def _read(file: str, shape: Sequence[int]) -> Any:
    import numpy as np

    return np.fromfile(file, dtype=np.float32, count=math.prod(shape)).reshape(shape)


if __name__ == "__main__":
    serve(Product)
