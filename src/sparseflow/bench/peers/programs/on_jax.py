"""Worker program: brainevent's event-driven product of spikes and a dense weight matrix, in JAX.

Variants: ``dense spikes`` starts from a float32 array, ``own format`` from brainevent's ``BinaryArray`` of booleans. On
the CPU each takes the faster of its kernels with and without parallel loops, and the first also the faster of floats as
they are and floats turned into booleans.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastest import fastest
from wire import serve


class Product:
    """``[M, K]`` spikes times a dense ``[K, N]`` matrix; the weights are transposed once, when they are loaded."""

    def __init__(self, variant: str, problem: dict[str, Any]):
        import jax.numpy as jnp  # pyright: ignore[reportMissingImports]

        self.bits, self.shape, self.note = variant == "own format", problem["x"], ""
        self.threads, self.gpu = problem["threads"], problem["device"] != "cpu"
        self.weight = jnp.asarray(_read(problem["weight"], problem["w"]).T.copy())
        self.inputs: list[Any] = []
        self.way = lambda _index: None

    def load(self, files: Sequence[str]) -> None:
        """Compile every way to multiply for these inputs, and keep the fastest."""
        import jax.numpy as jnp  # pyright: ignore[reportMissingImports]

        dense = [jnp.asarray(_read(file, self.shape)) for file in files]
        self.inputs = [x > 0 for x in dense] if self.bits else dense
        ways = dict(self._ways())
        self.note = fastest(ways, len(files))
        self.way = ways[self.note]

    def _ways(self) -> Any:
        import brainevent as be  # pyright: ignore[reportMissingImports]
        import jax  # pyright: ignore[reportMissingImports]

        kinds = {"as given": lambda x, w: be.BinaryArray(x) @ w}
        if not self.bits:
            kinds["as booleans"] = lambda x, w: be.BinaryArray(x > 0) @ w
        for parallel in (False,) if self.gpu or self.threads == 1 else (False, True):
            be.config.set_numba_parallel(parallel, num_threads=self.threads)
            jax.clear_caches()  # the setting is read while a kernel is traced
            for name, product in kinds.items():
                compiled = jax.jit(product).lower(self.inputs[0], self.weight).compile()
                label = f"{name}, parallel" if parallel else name
                yield label, lambda i, run=compiled: run(self.inputs[i], self.weight).block_until_ready()

    def call(self, index: int) -> Any:
        """``[M, N]``."""
        return self.way(index)

    def save(self, output: Any, file: str) -> list[int]:
        """As float32."""
        import numpy as np

        np.asarray(output, dtype=np.float32).tofile(file)
        return list(output.shape)


def _read(file: str, shape: Sequence[int]) -> Any:
    import numpy as np

    return np.fromfile(file, dtype=np.float32, count=math.prod(shape)).reshape(shape)


if __name__ == "__main__":
    serve(Product)
