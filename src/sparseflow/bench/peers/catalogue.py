"""Who takes part: each peer, the environment it runs in, and what it can do."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from sparseflow.bench.records import Scope

from .environments import Group

PROGRAMS = Path(__file__).parent / "programs"

_JAX = ("brainevent", "jax", "jaxlib", "numba")
TORCH = Group("torch", (), "torch", ("torch",))
SCIPY = Group("scipy", ("scipy>=1.11", "numpy"), "scipy", ("scipy", "numpy"))
SPIKINGJELLY = Group("spikingjelly", ("spikingjelly>=2.0",), "spikingjelly", ("spikingjelly", "torch"))
SNNTORCH = Group("snntorch", ("snntorch>=1.0",), "snntorch", ("snntorch", "torch"))
NORSE = Group("norse", ("norse>=1.1",), "norse", ("norse", "torch"))
SINABS = Group("sinabs", ("sinabs>=3.0",), "sinabs", ("sinabs", "torch"))
BRAINEVENT = Group("brainevent", ("brainevent>=0.2.1", "jax[cpu]", "numba"), "brainevent", _JAX, on_torch=False)
BRAINEVENT_CUDA = Group("brainevent-cuda", ("brainevent>=0.2.1", "jax[cuda13]"), "brainevent", _JAX, on_torch=False)


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to compute a problem.

    Attributes:
        name: as in the tables.
        kind: of the problems it computes, ``"product"`` or ``"layer"``.
        group: its environment.
        program: the worker's file in ``programs/``.
        variant: what of it to build.
        family: of kernels, for the tables.
        dense: whether it is a dense path that others may be measured against.
        compiles: whether it is left out where nothing is to be compiled.
        precision: ``"fp32"`` or ``"bf16"``.
        devices: where it runs.
        environment: variables of its process.
    """

    name: str
    kind: str
    group: Group
    program: str
    variant: str
    family: str
    dense: bool = False
    compiles: bool = False
    precision: str = "fp32"
    devices: tuple[str, ...] = ("cpu", "cuda")
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def scope(self) -> Scope:
        """Ours is exact; all others are peers."""
        return Scope.EXACT if self.ours else Scope.PEER

    @property
    def variation(self) -> bool:
        """Whether the same peer also takes part in float32 and from dense spikes."""
        return self.precision != "fp32" or self.variant.endswith("own format")

    @property
    def ours(self) -> bool:
        """Whether it is sparseflow."""
        return self.variant.startswith("sparseflow")


_ON_CPU, _ON_CUDA = ("cpu",), ("cuda",)
_product = functools.partial(Peer, kind="product")
_torch = functools.partial(_product, group=TORCH, program="on_torch.py")
_scipy = functools.partial(_product, group=SCIPY, program="on_scipy.py", family="sparse matrix", devices=_ON_CPU)
_brainevent = functools.partial(_product, program="on_jax.py", family="event-driven")
_layer = functools.partial(Peer, kind="layer", program="lif_layers.py")
_dense_layer = functools.partial(_layer, family="dense", dense=True)
_spikingjelly = functools.partial(_dense_layer, group=SPIKINGJELLY, variant="spikingjelly")
_IMPLEMENTATION = "SJ_LIF_CUDA_IMPLEMENTATION"

PEERS = (
    _torch("sparseflow level 1", variant="sparseflow fp32", family="event-driven"),
    _torch("sparseflow level 1 bf16", variant="sparseflow bf16", family="event-driven", precision="bf16"),
    _torch("PyTorch eager fp32", variant="eager fp32", family="dense", dense=True),
    _torch("PyTorch eager bf16", variant="eager bf16", family="dense", dense=True, precision="bf16"),
    _torch("torch.compile fp32", variant="compiled fp32", family="dense", dense=True, compiles=True),
    _torch("torch.compile bf16", variant="compiled bf16", family="dense", dense=True, compiles=True, precision="bf16"),
    _torch("torch.sparse CSR", variant="csr", family="sparse matrix"),
    _torch("torch.sparse CSR, own format", variant="csr, own format", family="sparse matrix"),
    _scipy("scipy CSR", variant="dense spikes"),
    _scipy("scipy CSR, own format", variant="own format"),
    _brainevent("brainevent", group=BRAINEVENT, variant="dense spikes", devices=_ON_CPU),
    _brainevent("brainevent, own format", group=BRAINEVENT, variant="own format", devices=_ON_CPU),
    _brainevent(
        "brainevent CUDA",
        group=BRAINEVENT_CUDA,
        variant="dense spikes",
        devices=_ON_CUDA,
        environment=(("JAX_PLATFORMS", "cuda"), ("XLA_PYTHON_CLIENT_PREALLOCATE", "false")),
    ),
    _layer(
        "sparseflow level 2 (SpikingJelly net)", group=SPIKINGJELLY, variant="sparseflow spikingjelly", family="fused"
    ),
    _layer("sparseflow level 2 (snnTorch net)", group=SNNTORCH, variant="sparseflow snntorch", family="fused"),
    _dense_layer("PyTorch eager loop", group=TORCH, variant="loop"),
    _dense_layer("torch.compile loop", group=TORCH, variant="compiled", compiles=True),
    _spikingjelly("SpikingJelly multi-step", devices=_ON_CPU),
    _spikingjelly("SpikingJelly Triton", devices=_ON_CUDA, environment=((_IMPLEMENTATION, "triton"),)),
    _spikingjelly("SpikingJelly CUDA", devices=_ON_CUDA, environment=((_IMPLEMENTATION, "cuda"),)),
    _dense_layer("snnTorch", group=SNNTORCH, variant="snntorch"),
    _dense_layer("Norse", group=NORSE, variant="norse"),
    _dense_layer("Sinabs", group=SINABS, variant="sinabs"),
)

# Asked for, and not to be had: SpikingJelly's CuPy neurons ended with its release 2.0.
GONE = (
    ("SpikingJelly CuPy", "layer", "SpikingJelly 2.0 has no CuPy backend; its Triton and CUDA kernels replaced it"),
)
