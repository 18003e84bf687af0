"""Context managers that watch an accelerated model: where its time goes, and whether its results are right."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .dispatch.runtime import LayerRuntime
from .errors import MismatchError
from .frameworks import neuron_spec
from .kernels.base import Call
from .kernels.reference import excess
from .modules.fused.block import BlockRun
from .modules.fused.check import excess_of_block
from .modules.fused.model import fusion_of, own_forward
from .modules.swap import runtimes
from .plan import Path
from .report import LayerProfile, ProfileResult

_KINDS = (("conv", "Conv"), ("linear", "Linear"), ("norm", "Norm"), ("pool", "Pool"), ("dropout", "Dropout"))


def module_kind(module: nn.Module) -> str:
    """``conv``, ``linear``, ``neuron``, ``norm``, ``pool``, ``dropout`` or ``other``."""
    if neuron_spec(module) is not None:
        return "neuron"
    names = [cls.__name__ for cls in type(module).__mro__]
    return next((kind for kind, part in _KINDS if any(part in name for name in names)), "other")


@dataclasses.dataclass
class _Timing:
    kind: str
    seconds: float = 0.0
    calls: int = 0
    started: float = 0.0


class Profile:
    """Times per module, filled while the ``with`` block runs; :meth:`result` may be read at any time."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._timings: dict[str, _Timing] = {}
        self._whole = _Timing("model")
        self._before = {name: _counts(runtime) for name, runtime in runtimes(model).items()}

    def _leaves(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules timed as one: neurons with whatever they hold inside, and everything without children."""
        inside: tuple[str, ...] = ()
        for name, module in self._model.named_modules():
            if inside and name.startswith(inside):
                continue
            if neuron_spec(module) is not None:
                inside = (*inside, f"{name}.")
                yield name, module
            elif next(module.children(), None) is None and name:
                yield name, module

    def attach(self) -> list[RemovableHandle]:
        """Hook every timed module; returns the handles."""
        handles = []
        devices = gpus_of(self._model)
        for name, module in self._leaves():
            timing = self._timings[name] = _Timing(module_kind(module))
            handles += _time_calls(module, timing, devices)
        return handles + _time_calls(self._model, self._whole, devices)

    @property
    def layers(self) -> tuple[LayerProfile, ...]:
        """One record a module that ran, in order of definition."""
        return self.result().layers

    def result(self) -> ProfileResult:
        """What was measured so far."""
        found = runtimes(self._model)
        ran = ((name, timing) for name, timing in self._timings.items() if timing.calls)
        layers = tuple(self._layer(name, timing, found.get(name)) for name, timing in ran)
        return ProfileResult(layers, self._whole.seconds * 1e3)

    def _layer(self, name: str, timing: _Timing, runtime: LayerRuntime | None) -> LayerProfile:
        if runtime is None:
            return LayerProfile(name, timing.kind, timing.seconds * 1e3, timing.calls)
        runtime.receive()
        calls, nonzero, numel = self._before.get(name, (collections.Counter(), 0, 0))
        stats = runtime.stats
        seen = stats.numel - numel
        density = (stats.nonzero - nonzero) / seen if seen else None
        paths = {str(path): count for path, count in (stats.calls - calls).items()}
        return LayerProfile(name, timing.kind, timing.seconds * 1e3, timing.calls, density, paths)

    def __str__(self) -> str:
        return str(self.result())


def _counts(runtime: LayerRuntime) -> tuple[collections.Counter[Path], int, int]:
    return runtime.stats.calls.copy(), runtime.stats.nonzero, runtime.stats.numel


def _time_calls(module: nn.Module, timing: _Timing, devices: set[torch.device]) -> list[RemovableHandle]:
    def start(_module: nn.Module, _args: Any) -> None:
        wait_for(devices)
        timing.started = time.perf_counter()

    def stop(_module: nn.Module, _args: Any, _output: Any) -> None:
        wait_for(devices)
        timing.seconds += time.perf_counter() - timing.started
        timing.calls += 1

    return [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]


def gpus_of(model: nn.Module) -> set[torch.device]:
    """The GPUs that hold parameters of ``model``."""
    return {parameter.device for parameter in model.parameters() if parameter.is_cuda}


def wait_for(devices: set[torch.device]) -> None:
    """Let these GPUs finish what was launched, so that a clock sees it."""
    for device in devices:
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def profile(model: nn.Module) -> Iterator[Profile]:
    """Time every module of ``model`` (accelerated or not) while the block runs.

    Gives a :class:`Profile`: ``p.layers`` (ms, density, calls per path), ``p.result()``, ``print(p)``. The hooks cost
    about a microsecond a module and call, which is inside the times. On a GPU they also wait for the device before and
    after every module: the times then hold the launches, which a stream of calls would hide. Fused blocks have no
    modules to time: inside, every module runs on its own.

    >>> import torch, sparseflow
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    >>> with sparseflow.profile(net) as p:
    ...     _ = net(torch.zeros(1, 4))
    >>> [layer.kind for layer in p.layers]
    ['linear', 'other']
    """
    watch = Profile(model)
    handles = watch.attach()
    try:
        with own_forward(model):
            yield watch
    finally:
        for handle in handles:
            handle.remove()


class Verification:
    """Compares the sparse calls of every layer, and all fused blocks, with the dense oracle.

    ``checked`` counts the comparisons, ``worst`` is the largest error in budgets, and ``flips`` counts spikes of fused
    blocks that rounding at the threshold has decided otherwise than float64.
    """

    def __init__(self, every: int):
        self.every, self.checked, self.worst, self.flips = every, 0, 0.0, 0
        self._calls: collections.Counter[str] = collections.Counter()

    def __call__(
        self, runtime: LayerRuntime, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, y: Tensor, path: Path
    ) -> None:
        if path is Path.DENSE:
            return
        if self._due(runtime.plan.name):
            found = excess(y, x, weight, bias, call)
            self._take(runtime.plan.name, found, f"the {path} result", f"{tuple(x.shape)} {x.dtype}")

    def check_block(self, block: BlockRun, x: Any, residual: Any, before: tuple[Any, ...], result: Any) -> None:
        """The same for a block of a fused plan, teacher-forced."""
        if self._due(f"block {block.name}"):
            with torch.no_grad():
                found, flips = excess_of_block(block, x, residual, before, result)
            self.flips += flips
            self._take(block.name, found, "the fused result", f"{tuple(x.shape)}")

    def _due(self, name: str) -> bool:
        self._calls[name] += 1
        return (self._calls[name] - 1) % self.every == 0

    def _take(self, name: str, found: float, what: str, given: str) -> None:
        self.checked += 1
        self.worst = max(self.worst, found)
        if not found <= 1.0:
            raise MismatchError(
                f"{name}: {what} is {found:.3g} times outside its error budget against float64 for input {given}. Run "
                f"it dense with exclude={name!r} and please report it."
            )


@contextlib.contextmanager
def verify(model: nn.Module, every: int = 1) -> Iterator[Verification]:
    """Inside, check every ``every``-th sparse call of each layer, and of each fused block, against float64.

    Raises:
        ValueError: ``every`` is not a positive integer.
        MismatchError: from inside the model's call, when a result leaves its error budget
            (:func:`sparseflow.kernels.reference.error_budget`).
    """
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a positive integer, got {every!r}")
    watch = Verification(every)
    found = list(runtimes(model).values())
    fusions = [fusion for module in model.modules() if (fusion := fusion_of(module)) is not None]
    for runtime in found:
        runtime.observers.append(watch)
    for fusion in fusions:
        fusion.observers.append(watch.check_block)
    try:
        yield watch
    finally:
        for runtime in found:
            runtime.observers.remove(watch)
        for fusion in fusions:
            fusion.observers.remove(watch.check_block)
