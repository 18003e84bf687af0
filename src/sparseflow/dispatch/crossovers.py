"""Where the crossovers of a layer come from: a calibration, the cache, a measurement, or the nearest measurement."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Hashable

import torch
from torch import Tensor

from sparseflow.config import MeasureBudget
from sparseflow.kernels.base import Call, ConvCall, Kernel
from sparseflow.kernels.precision import tf32_convolution, tf32_matmul
from sparseflow.plan import Crossover, Path

from .cache import CrossoverCache
from .graphs import measure_on_gpu
from .measure import UnusableKernelError, measure
from .progress import layer_budget, note_disturbed
from .sites import Measured

logger = logging.getLogger("sparseflow")
_MAX_MEASURED = 8
_FORCED_LOAD = 1.0
shared_cache = CrossoverCache()


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """How a layer decides. ``mode``: ``"auto"`` (measured), ``"sparse"`` or ``"dense"`` (forced).

    ``known`` are crossovers from a calibration file; ``budget`` bounds first-use measurement.
    """

    backend: str = "auto"
    mode: str = "auto"
    known: dict[str, Crossover] = dataclasses.field(default_factory=dict)
    budget: MeasureBudget = dataclasses.field(default_factory=MeasureBudget)


class CrossoverSource:
    """Crossovers of one layer, measured where nobody did so before."""

    def __init__(self, layer: str, config: RuntimeConfig):
        self.layer, self.config = layer, config
        self._measured: dict[Path, list[tuple[int, Measured]]] = {}

    def of(
        self, kernels: tuple[Kernel, ...], x: Tensor, weight: Tensor, bias: Tensor | None, call: Call
    ) -> tuple[tuple[Kernel, Measured], ...]:
        """The kernels with their crossovers for this signature; what is missing is measured within one layer's budget.

        A kernel that there is no memory to measure, or that does not run here, is left out.
        """
        found = [self._found(kernel, x, weight, call) for kernel in kernels]
        missing = found.count(None)
        if missing:
            with layer_budget(self.config.budget) as budget:
                share = dataclasses.replace(budget, layer_ms=budget.layer_ms / missing)
                pairs = zip(kernels, found, strict=True)
                found = [known or self._measure(kernel, x, weight, bias, call, share) for kernel, known in pairs]
        pairs = zip(kernels, found, strict=True)
        return tuple((kernel, measured) for kernel, measured in pairs if measured is not None)

    def _found(self, kernel: Kernel, x: Tensor, weight: Tensor, call: Call) -> Measured | None:
        """What is known without measuring: the signature's own figures, or in the end those of the nearest size."""
        keys = crossover_keys(kernel, x, weight, call)
        known = [self.config.known.get(key) or shared_cache.get(key) for key in keys]
        eager, graph = known
        if eager is not None and graph is not None:
            return Measured(eager, graph)
        if len(self._measured.get(kernel.path, ())) < _MAX_MEASURED:
            return None
        return self._nearest(kernel, x)

    def _nearest(self, kernel: Kernel, x: Tensor) -> Measured | None:
        """The figures of the input nearest in size: a stream of new shapes must not measure for ever."""
        variants = kernel.variants()
        fitting = [(n, m) for n, m in self._measured[kernel.path] if {c.variant for c in m} <= set(variants)]
        return min(fitting, key=lambda pair: abs(math.log(pair[0] / x.numel())), default=(0, None))[1]

    def _measure(
        self, kernel: Kernel, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, budget: MeasureBudget
    ) -> Measured | None:
        keys = crossover_keys(kernel, x, weight, call)
        try:
            if x.is_cuda:
                found = Measured(*measure_on_gpu(keys, kernel, x, weight, bias, call, budget))
            else:
                crossover = measure(keys[0], kernel, x, weight, bias, call, budget)
                found = Measured(crossover, crossover)
        except torch.OutOfMemoryError:
            logger.warning("%s: no memory left to measure the %s kernel; it is not used", self.layer, kernel.path)
            return None
        except UnusableKernelError as error:
            logger.warning("%s: the %s kernel cannot be used here: %s", self.layer, kernel.path, error)
            return None
        self._measured.setdefault(kernel.path, []).append((x.numel(), found))
        for crossover in dict.fromkeys(found):
            if crossover.quiet:
                shared_cache.put(crossover)
            else:
                note_disturbed(self.layer)
        return found


def forced(kernel: Kernel, x: Tensor, weight: Tensor, call: Call) -> Measured:
    """Crossovers by which sparse always runs, in the variant that is the best guess."""
    key, _ = crossover_keys(kernel, x, weight, call)
    variant = kernel.variants()[0]
    crossover = Crossover(key, 1.0, 0.0, 0.0, 0.0, (_FORCED_LOAD,), (0.0,), variant, axis=kernel.axis)
    return Measured(crossover, crossover)


def conditions(x: Tensor) -> Hashable:
    """What decides, besides the tensors, how fast dense is: threads on the CPU, the TF32 switches on a GPU."""
    if not x.is_cuda:
        return torch.get_num_threads()
    return (tf32_convolution(), tf32_matmul()) if x.dtype is torch.float32 else None


@functools.lru_cache(maxsize=16)
def _gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}|{properties.major}.{properties.minor}"


def crossover_keys(kernel: Kernel, x: Tensor, weight: Tensor, call: Call) -> tuple[str, str]:
    """What the crossovers for eager and for captured calls are stored under; the same on the CPU.

    Kernel, shape bucket, layout, dtype, where zero blocks of the weight are skipped the share of the others, and the
    threads or the GPU. The batch is rounded up to a power of two; every other size counts exactly.
    """
    lead = x.shape[0] if isinstance(call, ConvCall) else math.prod(x.shape[:-1])
    bucket = 1 << max(0, lead - 1).bit_length()
    spatial = "x".join(map(str, x.shape[1:])) if isinstance(call, ConvCall) else str(x.shape[-1])
    layout = "first" if x.is_contiguous() else "last"
    weights = "x".join(map(str, weight.shape)) + ("" if weight.is_contiguous() else "last")
    if kernel.weight_share < 1.0:
        weights += f"|blocks{kernel.weight_share}"
    arguments = "" if not isinstance(call, ConvCall) else f"|{call.stride}{call.padding}{call.dilation}{call.groups}"
    dtype = str(x.dtype).removeprefix("torch.")
    text = f"{kernel.path}|{bucket}|{spatial}|{layout}|{weights}{arguments}|{dtype}".replace(" ", "")
    if not x.is_cuda:
        key = f"{text}|t{torch.get_num_threads()}" + ("|interpreted" if kernel.deferred else "")
        return key, key
    key = f"{text}|{_gpu(x.device)}|tf32={conditions(x)}"
    return f"{key}/eager", f"{key}/graph"
