"""The run-time state of one accelerated layer: what it runs, what it saw, and its packed weights."""

from __future__ import annotations

import collections
import copy
import dataclasses
import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparseflow.config import MeasureBudget
from sparseflow.kernels import functional
from sparseflow.kernels.base import Call, ConvCall, Kernel, Refusal
from sparseflow.kernels.select import select
from sparseflow.plan import Crossover, LayerPlan, Path, Reason

from .cache import CrossoverCache
from .fingerprint import fingerprint
from .measure import measure
from .packing import PackedWeight
from .policy import Policy
from .progress import layer_budget, note_disturbed

_MAX_SITES = 16
_MAX_MEASURED = 8
_FORCED_VARIANT_DENSITY = 1.0
shared_cache = CrossoverCache()

Observer = Callable[["LayerRuntime", Tensor, Tensor, "Tensor | None", Call, Tensor, Path], None]


@dataclasses.dataclass
class LayerStats:
    """Counts since the layer was accelerated. ``nonzero`` of ``numel`` inputs and ``occupied`` of ``words`` blocks
    were seen by the prescans; calls without a prescan add nothing to them."""

    calls: collections.Counter[Path] = dataclasses.field(default_factory=collections.Counter)
    nonzero: int = 0
    numel: int = 0
    occupied: int = 0
    words: int = 0

    def add(self, scan: Any) -> None:
        """Add one prescan."""
        self.nonzero += scan.nonzero
        self.numel += scan.numel
        self.occupied += scan.occupied
        self.words += scan.words

    def paths(self) -> dict[str, int]:
        """Calls per path, by name."""
        return {str(path): count for path, count in self.calls.items()}

    @property
    def density(self) -> float | None:
        """Observed nonzero / numel in 0..1, ``None`` before the first prescan."""
        return self.nonzero / self.numel if self.numel else None

    @property
    def occupancy(self) -> float | None:
        """Observed share of blocks with at least one nonzero value."""
        return self.occupied / self.words if self.words else None


@dataclasses.dataclass
class _Site:
    """One call signature of a layer: the kernel bound to it and the policy that chooses."""

    kernel: Kernel | Refusal
    policy: Policy | None = None

    @property
    def never(self) -> bool:
        """Whether the measured choice is dense at every density."""
        return self.policy is None or self.policy.never

    def retune(self, crossover: Crossover) -> None:
        """Choose by ``crossover`` from now on."""
        self.policy = Policy(crossover)


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """How a layer decides. ``mode``: ``"auto"`` (measured), ``"sparse"`` or ``"dense"`` (forced).

    ``known`` are crossovers from a calibration file; ``budget`` bounds first-use measurement.
    """

    backend: str = "auto"
    mode: str = "auto"
    known: dict[str, Crossover] = dataclasses.field(default_factory=dict)
    budget: MeasureBudget = dataclasses.field(default_factory=MeasureBudget)


class LayerRuntime:
    """Decides, call by call, how one layer runs. Copies and pickles without its packed weights."""

    def __init__(self, plan: LayerPlan, config: RuntimeConfig):
        self.plan, self.config = plan, config
        self.stats = LayerStats()
        self.disabled = 0
        self.observers: list[Observer] = []
        self._reset_caches()

    def _reset_caches(self) -> None:
        self._sites: collections.OrderedDict[tuple[object, ...], _Site] = collections.OrderedDict()
        self._packed = PackedWeight()
        self._lock = threading.RLock()
        self._hopeless: dict[tuple[object, object], _Site] = {}
        self._measured: list[tuple[int, Crossover]] = []
        self.last_site: _Site | None = None
        self.handle = functional.register_runner(self)

    def __getstate__(self) -> dict[str, Any]:
        state = {"plan": self.plan, "config": self.config, "stats": copy.deepcopy(self.stats)}
        return {**state, "measured_on": fingerprint()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.plan, self.config, self.stats = state["plan"], state["config"], state["stats"]
        if state["measured_on"] != fingerprint():  # unpickled on another machine: its times are not ours
            self.config = dataclasses.replace(self.config, known={})
        self.disabled, self.observers = 0, []
        self._reset_caches()

    def invalidate(self) -> None:
        """Forget packed weights; the next sparse call packs anew."""
        self._packed.invalidate()

    def goes_dense(self, x: Tensor) -> bool:
        """The cheap check that lets a layer where sparse never wins run its original forward at once."""
        if self.disabled:
            return True
        site = self._hopeless.get((x.shape, x.dtype))
        return site is not None and self._passes_by(site)

    def always_dense(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> bool:
        """The same answer from the first call of a signature on: recomputed activations must be saved alike."""
        return not self.disabled and self._passes_by(self._site(x, weight, bias, call))

    def _passes_by(self, site: _Site) -> bool:
        """Count a call that runs PyTorch's own layer because no density would make sparse win."""
        passes = self.config.mode == "auto" and site.never and not self.observers
        if passes:
            self.stats.calls[Path.DENSE] += 1
        return passes

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
        """Compute the layer, sparse or dense. ``weight`` may differ from ``x`` in dtype under autocast."""
        if self.disabled:
            return _dense(x, weight, bias, call)
        site = self._site(x, weight, bias, call)
        path, y = self._attempt(site, x, weight, bias)
        if y is None:
            y = _dense(x, weight, bias, call)
        self.stats.calls[path] += 1
        for observer in self.observers:
            observer(self, x, weight, bias, call, y, path)
        return y

    def _attempt(self, site: _Site, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Path, Tensor | None]:
        """The sparse result, or ``None`` where dense is to run."""
        kernel, policy = site.kernel, site.policy
        if isinstance(kernel, Refusal) or policy is None or policy.skip_scan():
            return Path.DENSE, None
        scan = kernel.prescan(x, policy.crossover.variant)
        self.stats.add(scan)
        density = scan.nonzero / scan.numel if scan.numel else 0.0
        if not policy.decide(density):
            return Path.DENSE, None
        crossover = policy.crossover
        gain_ms = crossover.dense_ms - crossover.sparse_ms_at(density)
        forced = self.config.mode == "sparse"
        packed = self._packed.get(weight, kernel, crossover.variant, crossover, float("inf") if forced else gain_ms)
        if packed is None:
            return Path.DENSE, None
        return kernel.path, kernel.compute(x, scan, packed, bias, crossover.variant)

    def _site(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> _Site:
        biased = bias is not None and bias.shape
        key = (x.shape, x.stride(), x.dtype, weight.shape, weight.stride(), biased, call, torch.get_num_threads())
        site = self._sites.get(key)
        if site is None:
            with self._lock:
                site = self._sites.get(key) or self._new_site(key, x, weight, bias, call)
        self.last_site = site
        return site

    def _new_site(self, key: tuple[object, ...], x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> _Site:
        site = _Site(self._kernel(x, weight, bias, call))
        if not isinstance(site.kernel, Refusal) and x.numel():
            site.policy = Policy(self._crossover(site.kernel, x, weight, bias, call))
        self._sites[key] = site
        while len(self._sites) > _MAX_SITES:
            self._sites.popitem(last=False)
        self._hopeless = {(shape, dtype): s for (shape, _, dtype, *_), s in self._sites.items() if s.never}
        return site

    def _kernel(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Kernel | Refusal:
        if weight.device != x.device or (bias is not None and bias.device != x.device):
            return Refusal(Reason.DEVICE, f"the input is on {x.device}, the weight on {weight.device}")
        if bias is not None and bias.shape != weight.shape[:1]:
            return Refusal(Reason.CUSTOM_FORWARD, f"the bias has shape {tuple(bias.shape)}")
        return select(x, weight, call, self.config.backend)

    def _crossover(self, kernel: Kernel, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Crossover:
        key = crossover_key(kernel.path, x, weight, call)
        if self.config.mode == "sparse":
            variant = kernel.variants()[0]
            return Crossover(key, 1.0, 0.0, 0.0, 0.0, (_FORCED_VARIANT_DENSITY,), (0.0,), variant)
        found = self.config.known.get(key) or shared_cache.get(key)
        if found is None and len(self._measured) >= _MAX_MEASURED:
            found = self._nearest(kernel, x)
        if found is None:
            with layer_budget(self.config.budget) as budget:
                found = measure(key, kernel, x, weight, bias, call, budget)
            self._measured.append((x.numel(), found))
            if found.quiet:
                shared_cache.put(found)
            else:
                note_disturbed(self.plan.name)
        return found

    def _nearest(self, kernel: Kernel, x: Tensor) -> Crossover | None:
        """The measured crossover of the input nearest in size: a stream of new shapes must not measure for ever."""
        fitting = [(numel, c) for numel, c in self._measured if c.variant in kernel.variants()]
        return min(fitting, key=lambda pair: abs(math.log(pair[0] / x.numel())), default=(0, None))[1]

    def describe(self) -> LayerPlan:
        """The plan of this layer as it stands now: path, reason and figures of the last signature it ran."""
        return dataclasses.replace(self.plan, density=self.stats.density, occupancy=self.stats.occupancy, **self._now())

    def _now(self) -> dict[str, Any]:
        site = self.last_site
        if site is None:
            return {"path": Path.DENSE, "reason": Reason.NOT_MEASURED}
        if isinstance(site.kernel, Refusal):
            return {"path": Path.DENSE, "reason": site.kernel.reason, "detail": site.kernel.detail}
        if site.policy is None:
            return {"path": Path.DENSE, "reason": Reason.NOT_MEASURED}
        if self.config.mode == "sparse":
            return {"path": site.kernel.path, "reason": Reason.FORCED}
        sparse = site.policy.sparse and not site.policy.never
        return {
            "path": site.kernel.path if sparse else Path.DENSE,
            "reason": Reason.SPARSE_WINS if sparse else Reason.DENSE_WINS,
            "crossover": site.policy.crossover,
        }


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    return call.dense(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def crossover_key(path: Path, x: Tensor, weight: Tensor, call: Call) -> str:
    """What a crossover is stored under: kernel, shape bucket, layout, dtype and threads.

    The batch is rounded up to a power of two; every other size counts exactly.
    """
    lead = x.shape[0] if isinstance(call, ConvCall) else math.prod(x.shape[:-1])
    bucket = 1 << max(0, lead - 1).bit_length()
    spatial = "x".join(map(str, x.shape[1:])) if isinstance(call, ConvCall) else str(x.shape[-1])
    layout = "first" if x.is_contiguous() else "last"
    weights = "x".join(map(str, weight.shape)) + ("" if weight.is_contiguous() else "last")
    arguments = "" if not isinstance(call, ConvCall) else f"|{call.stride}{call.padding}{call.dilation}{call.groups}"
    dtype = str(x.dtype).removeprefix("torch.")
    text = f"{path}|{bucket}|{spatial}|{layout}|{weights}{arguments}|{dtype}|t{torch.get_num_threads()}"
    return text.replace(" ", "")
