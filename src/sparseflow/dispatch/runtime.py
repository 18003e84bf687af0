"""The run-time state of one accelerated layer: what it runs, what it saw, and its packed weights."""

from __future__ import annotations

import collections
import copy
import dataclasses
import threading
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from sparseflow.kernels import functional
from sparseflow.kernels.base import Call, HostKernel, Refusal
from sparseflow.kernels.select import Candidates, candidates
from sparseflow.kernels.weight_blocks import present_share
from sparseflow.plan import LayerPlan, Path, Reason

from .crossovers import CrossoverSource, RuntimeConfig, conditions, forced
from .fingerprint import fingerprint
from .mailbox import capturing
from .sites import DeferredSite, DenseSite, HostSite, LayerState, Site
from .stats import LayerStats

__all__ = ["LayerRuntime", "LayerStats", "Observer", "RuntimeConfig"]

_MAX_SITES = 16

Observer = Callable[["LayerRuntime", Tensor, Tensor, "Tensor | None", Call, Tensor, Path], None]


class LayerRuntime:
    """Decides, call by call, how one layer runs. Copies and pickles without its packed weights."""

    def __init__(self, plan: LayerPlan, config: RuntimeConfig):
        self.plan, self.config = plan, config
        self.stats = LayerStats()
        self.disabled = 0
        self.observers: list[Observer] = []
        self._reset_caches()

    def _reset_caches(self) -> None:
        self._state = LayerState(self.plan.name, self.stats, forced=self.config.mode == "sparse")
        self._crossovers = CrossoverSource(self.plan.name, self.config)
        self._sites: collections.OrderedDict[tuple[object, ...], Site] = collections.OrderedDict()
        self._lock = threading.RLock()
        self._hopeless: dict[tuple[object, ...], Site] = {}
        self.last_site: Site | None = None
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

    def refresh(self, weight: Tensor) -> None:
        """Pack ``weight`` anew: at once where captured graphs read the packed copy, else at the next sparse call.

        Where another share of its blocks is zero now, other variants may win: the next call binds its kernels anew.
        """
        self._state.packed.invalidate()
        self._state.resident.refresh(weight)
        shares = {kernel.weight_share for site in self._sites.values() for kernel, _ in site.candidates}
        if not weight.is_cuda and shares - {present_share(weight)}:
            with self._lock:
                self._sites.clear()
                self._hopeless = {}

    def goes_dense(self, x: Tensor) -> bool:
        """The cheap check that lets a layer where sparse never wins run its original forward at once."""
        if self.disabled:
            return True
        if not self._hopeless:
            return False
        site = self._hopeless.get((x.device, x.dtype, x.shape, conditions(x)))
        return site is not None and self._passes_by(site)

    def always_dense(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> bool:
        """The same answer from the first call of a signature on: recomputed activations must be saved alike."""
        return not self.disabled and self._passes_by(self._site(x, weight, bias, call))

    def _passes_by(self, site: Site) -> bool:
        """Count a call that runs PyTorch's own layer because no input would make sparse win."""
        passes = self.config.mode == "auto" and site.never and not self.observers
        if passes:
            self.stats.calls[Path.DENSE] += 1
        return passes

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, *, training: bool = False) -> Tensor:
        """Compute the layer, sparse or dense. ``weight`` may differ from ``x`` in dtype under autocast.

        ``training`` says that gradients are recorded. Such a call is captured dense: what the optimizer does to the
        weight between two replays would not reach a packed copy.
        """
        if self.disabled:
            return _dense(x, weight, bias, call)
        site = self._site(x, weight, bias, call)
        if training and capturing(x):
            site = self._captured_dense("gradients are recorded (torch.no_grad() is for inference)")
        path, y = site.attempt(x, weight, bias)
        if y is None:
            y = _dense(x, weight, bias, call)
        self.stats.calls[path] += 1
        for observer in self.observers:
            observer(self, x, weight, bias, call, y, path)
        return y

    def _site(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Site:
        biased = bias is not None and bias.shape
        key = (x.device, x.dtype, x.shape, conditions(x), x.stride(), weight.shape, weight.stride(), biased, call)
        site = self._sites.get(key)
        if site is None:
            if capturing(x):
                return self._captured_dense(f"it never ran with input {tuple(x.shape)} {x.dtype}")
            with self._lock:
                site = self._sites.get(key) or self._new_site(key, x, weight, bias, call)
        self.last_site = site
        return site

    def _captured_dense(self, why: str) -> Site:
        """The dense layer in a CUDA graph; nothing can be measured or packed while one is captured."""
        self._state.say_captured_dense(why)
        return _CAPTURED_DENSE

    def _new_site(self, key: tuple[object, ...], x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Site:
        site = self._sites[key] = self._bound(x, weight, bias, call)
        while len(self._sites) > _MAX_SITES:
            self._sites.popitem(last=False)
        self._hopeless = {key[:4]: site for key, site in self._sites.items() if site.never}
        return site

    def _bound(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Site:
        kernels = self._kernels(x, weight, bias, call)
        if isinstance(kernels, Refusal):
            return DenseSite(kernels)
        if not x.numel():
            return DenseSite(None)
        if self._state.forced:
            found = ((kernels[0], forced(kernels[0], x, weight, call)),)
        else:
            found = self._crossovers.of(kernels, x, weight, bias, call)
        if not found:
            return DenseSite(Refusal(Reason.NO_ENGINE, "there was no memory to measure any, or none runs here"))
        if not kernels[0].deferred:
            return HostSite(cast(HostKernel, found[0][0]), found[0][1], self._state)
        site = DeferredSite(found, self._state)
        site.prime(x)
        return site

    def _kernels(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Candidates:
        if weight.device != x.device or (bias is not None and bias.device != x.device):
            return Refusal(Reason.DEVICE, f"the input is on {x.device}, the weight on {weight.device}")
        if bias is not None and bias.shape != weight.shape[:1]:
            return Refusal(Reason.CUSTOM_FORWARD, f"the bias has shape {tuple(bias.shape)}")
        return candidates(x, weight, call, self.config.backend)

    def receive(self) -> None:
        """Take in the counts that have arrived from a GPU since the last call."""
        self._state.mailbox.poll()

    def describe(self) -> LayerPlan:
        """The plan of this layer as it stands now: path, reason and figures of the last signature it ran."""
        self.receive()
        site = self.last_site or DenseSite(None)
        seen = {"density": self.stats.density, "occupancy": self.stats.occupancy}
        return dataclasses.replace(self.plan, **{**seen, **site.describe()})


_CAPTURED_DENSE = DenseSite(None)


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    return call.dense(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
