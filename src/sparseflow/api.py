"""The public functions: accelerate a model, look at what was done, undo it."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from .dispatch.cache import Calibration
from .dispatch.fingerprint import fingerprint
from .dispatch.observe import CalibrationObserver
from .errors import UnsupportedModelError
from .graph.isolation import copied, isolated
from .lowering import RECORD, Options, Patterns, as_arguments, current_plan, lower, raise_layers
from .modules.fused.model import fused_blocks, fusion_of, own_forward
from .modules.swap import runtime_of, runtimes
from .plan import Plan
from .report import LayerReport, Report
from .stepping import forget, stepping_notes

Model = TypeVar("Model", bound=nn.Module)


_planning = threading.RLock()


class _PlanOnFirstCall:
    """A forward pre-hook that plans with the first real input, then removes itself.

    It stays when the model cannot take that input, and plans with the next.
    """

    def __init__(self, options: Options):
        self.options = options
        # Planning inside a region that is being compiled would itself be compiled.
        self._plan: Any = torch.compiler.disable(_plan_on_first_call)

    def __reduce__(self) -> Any:
        return type(self), (self.options,)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._plan(model, args, kwargs, self.options)


def _plan_on_first_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> None:
    with _planning:
        if not _pending(model):  # another thread was first
            return
        try:
            lower(model, args, kwargs, options)
        except UnsupportedModelError:
            _cancel_pending(model)
            raise
        _cancel_pending(model)


def _pending(module: nn.Module) -> list[int]:
    return [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _PlanOnFirstCall)]


def _cancel_pending(model: nn.Module) -> None:
    for module in model.modules():
        for key in _pending(module):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def accelerate(
    model: Model,
    example_input: Any = None,
    *,
    backend: str = "auto",
    mode: str = "auto",
    include: Patterns = None,
    exclude: Patterns = None,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    strict: bool = False,
    fuse: bool = True,
    cuda_graph: bool = True,
) -> Model:
    """Make a spiking network faster in place; the same object comes back.

    Convolution and linear layers that are fed by spikes become two-stage modules that compute only where there are
    spikes, and dense again wherever that was measured to be faster. Parameters, hooks and ``state_dict`` keys stay.

    Args:
        model: a network written with SpikingJelly 2.x, snnTorch 1.x, or plain PyTorch and
            :func:`sparseflow.register_neuron`.
        example_input: what one forward call takes, for example ``[T, N, C, H, W]`` for a multi-step model: a tensor, a
            tuple (or list) of positional or a mapping of keyword arguments; wrap the input of a model that takes one
            list or dictionary in a tuple. Without it the first real call is the example.
        backend: ``"auto"`` (by the device of the tensors), ``"cpu"`` (native engine), ``"torch"`` (on the CPU without a
            compiler) or ``"triton"`` (GPUs). Only ``"auto"`` may fall back.
        mode: ``"auto"`` chooses by measurement; ``"sparse"`` and ``"dense"`` force one path.
        include, exclude: glob patterns on qualified layer names (``"layer2.*"``), or ``(name, module) -> bool``.
        calibration: result of :func:`calibrate`, or its file: skips first-use measurement.
        strict: raise instead of warn when no layer runs sparse.
        fuse: also run whole spiking blocks (convolution or linear layer, batch norm, neuron) as one kernel over all
            time steps on bit-packed spikes, where the model can be traced, no gradients are recorded, and it was
            measured to be faster; ``False`` only swaps layers.
        cuda_graph: replay fused blocks on a GPU as one CUDA graph for every kind of input, which spares the host the
            launches, at the price of the memory that a call works in, kept for the next; no effect on the CPU.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module or an option has a wrong type.
        ValueError: an option has an unknown value.
        BackendUnavailableError: the named backend cannot run here.
        UnsupportedModelError: nothing to accelerate and ``strict`` is set. The model is left as it was.

    >>> import torch, sparseflow
    >>> class Threshold(torch.nn.Module):
    ...     def forward(self, v):
    ...         return (v >= 1.0).to(v.dtype)
    >>> sparseflow.register_neuron(Threshold)
    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 512), Threshold(), torch.nn.Linear(512, 512)).eval()
    >>> net = sparseflow.accelerate(net, torch.randn(1, 64), mode="sparse")
    >>> print(sparseflow.report(net).layers[1].path)
    event
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate expects a torch.nn.Module, got {type(model).__name__}")
    if calibration is not None and not isinstance(calibration, Calibration):
        calibration = Calibration.load(calibration)
    options = Options(backend, mode, include, exclude, calibration, strict, fuse, cuda_graph)
    if example_input is None:
        restore(model).register_forward_pre_hook(_PlanOnFirstCall(options), with_kwargs=True)
    else:
        lower(model, *as_arguments(example_input), options)
        _cancel_pending(model)
    return model


def restore(model: Model) -> Model:
    """Undo :func:`accelerate`, exactly, on ``model`` and its submodules: classes, attributes and hooks are as before.

    Does nothing on a plain model.
    """
    _cancel_pending(model)
    raise_layers(model)
    forget(model)
    return model


def analyze(model: nn.Module, example_input: Any, **options: Any) -> Plan:
    """The plan :func:`accelerate` would make, with its measurements; the model is unchanged afterwards.

    Takes the options of :func:`accelerate`. On an accelerated model it returns the plan as it stands.
    """
    if RECORD in model.__dict__:
        return current_plan(model)
    defaults = {"backend": "auto", "mode": "auto", "include": None, "exclude": None, "calibration": None}
    defaults |= {"fuse": True, "cuda_graph": True}
    unknown = options.keys() - defaults.keys()
    if unknown:
        raise TypeError(f"analyze got unknown options {sorted(unknown)}; it takes {sorted(defaults)}")
    with _put_back_after(model):
        lower(model, *as_arguments(example_input), Options(**{**defaults, **options}, strict=False))
        return current_plan(model)


@contextlib.contextmanager
def _put_back_after(model: nn.Module) -> Iterator[None]:
    """Plain inside, and afterwards as it was: layers may have been accelerated as parts of another model."""
    put_back = raise_layers(model)
    try:
        yield
    finally:
        raise_layers(model)
        put_back()


def calibrate(model: nn.Module, batches: Iterable[Any], *, prepare: Callable[[Any], Any] | None = None) -> Calibration:
    """Measure crossovers and densities on real data.

    Args:
        model: accelerated or not; a plain model is restored afterwards.
        batches: inputs of the model's forward, in the forms ``example_input`` of :func:`accelerate` takes. Neuron
            state is put back after each.
        prepare: turns an item of ``batches`` into such an input, for example ``lambda item: item[0]`` for a loader
            of (image, label) pairs.

    Returns:
        A :class:`Calibration`, to be passed to :func:`accelerate` or saved beside the model.

    Raises:
        ValueError: ``batches`` is empty.
    """
    inputs = (prepare(item) if prepare else item for item in batches)
    first = next(inputs, None)
    if first is None:
        raise ValueError("calibrate needs at least one batch")
    batches = itertools.chain((first,), inputs)
    if RECORD in model.__dict__:
        return _watch(model, batches)
    with _put_back_after(model):
        accelerate(model, first)
        return _watch(model, batches)


def _watch(model: nn.Module, batches: Iterable[Any]) -> Calibration:
    found = runtimes(model)
    observers = {name: CalibrationObserver() for name in found}
    for name, runtime in found.items():
        runtime.observers.append(observers[name])
    try:
        for batch in batches:
            args, kwargs = as_arguments(batch)
            with isolated(model), own_forward(model):
                model(*copied(args), **copied(kwargs))
    finally:
        for name, runtime in found.items():
            runtime.observers.remove(observers[name])
    crossovers = {key: c for observer in observers.values() for key, c in observer.crossovers.items()}
    seen = {name: observer.observation() for name, observer in observers.items()}
    return Calibration(crossovers, {name: o for name, o in seen.items() if o}, fingerprint())


def report(model: nn.Module) -> Report:
    """What runs where and why, with the figure behind every decision. Raises ``ValueError`` on a plain model."""
    plan = _require_plan(model)
    calls = {name: dict(runtime.stats.paths()) for name, runtime in runtimes(model).items()}
    for name, block in fused_blocks(model).items():
        calls.setdefault(name, {}).update(block.stats.paths())
    layers = tuple(LayerReport.from_plan(layer, calls.get(layer.name, {})) for layer in plan.layers)
    notes = (f"fx could not trace the model: {plan.fallback_detail}",) if plan.fallback_detail else ()
    notes += _fusion_notes(model) + stepping_notes(model)
    return Report(type(model).__name__, plan.backend, plan.method, layers, dict(fingerprint()), notes)


def _fusion_notes(model: nn.Module) -> tuple[str, ...]:
    """What is fused and what that brings, or why nothing is."""
    fusion = fusion_of(model)
    if fusion is None:
        why = model.__dict__[RECORD].unfused
        return (f"not fused: {why}",) if why else ()
    return fusion.notes()


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Run dense inside the ``with`` block, for comparison."""
    found = list(runtimes(model).values())
    for runtime in found:
        runtime.disabled += 1
    try:
        with own_forward(model):
            yield
    finally:
        for runtime in found:
            runtime.disabled -= 1


def refresh(model: nn.Module) -> None:
    """Pack the weights anew: at once where CUDA graphs captured earlier read them, elsewhere at the next call.

    Weight changes are noticed by themselves, with two exceptions. What is written through ``weight.data`` is noticed
    late on the CPU (single elements only) and not at all on a GPU, where comparing values would wait for the device.
    And a graph that is only replayed never asks whether the weights it reads are current.
    """
    for module in model.modules():
        fusion = fusion_of(module)
        if fusion is not None:
            fusion.refresh()
        runtime = runtime_of(module)
        if runtime is not None:
            runtime.refresh(module.weight)  # type: ignore[arg-type]


def _require_plan(model: nn.Module) -> Plan:
    if RECORD in model.__dict__:
        return current_plan(model)
    inner = next((name for name, module in model.named_modules() if RECORD in module.__dict__), None)
    if inner is not None:
        hint = f"its part {inner!r} has: ask for that of model.{inner}"
    elif _pending(model):
        hint = "it plans at its first call: run it once"
    else:
        hint = "call sparseflow.accelerate(model) first"
    raise ValueError(f"{type(model).__name__} has no plan; {hint}")
