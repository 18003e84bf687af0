"""From a model to swapped layers: trace, draft the plan, swap, and run the example once so that layers measure."""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from .config import MeasureBudget
from .dispatch.cache import Calibration
from .dispatch.progress import measuring
from .dispatch.runtime import LayerRuntime, RuntimeConfig
from .errors import BackendUnavailableError, NothingAcceleratedWarning, UnsupportedModelError
from .graph import LayerSite, SpikeMap, candidates, refuse, spike_map
from .graph.isolation import copied, isolated
from .kernels.cpu import engine
from .kernels.select import BACKENDS, why_not_triton
from .modules.fused.block import BlockRun
from .modules.fused.model import Fusion, fused_blocks, install, remove
from .modules.swap import runtimes, swap, swap_again, unswap
from .plan import BlockPlan, LayerPlan, Path, Plan, Provenance, Reason

logger = logging.getLogger("sparseflow")
RECORD = "_sparseflow_model"
MODES = ("auto", "sparse", "dense")

Patterns = str | Iterable[str] | Callable[[str, nn.Module], bool] | None


@dataclasses.dataclass(frozen=True)
class Options:
    """The validated keyword arguments of :func:`sparseflow.accelerate`."""

    backend: str
    mode: str
    include: Patterns
    exclude: Patterns
    calibration: Calibration | None
    strict: bool
    fuse: bool = True
    cuda_graph: bool = True

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}")
        for option in ("include", "exclude"):
            check_patterns(option, getattr(self, option))
        check_backend(self.backend)


@dataclasses.dataclass(frozen=True)
class ModelRecord:
    """What an accelerated model remembers of its plan; the layers' own part lives in their runtimes."""

    drafts: tuple[LayerPlan, ...]
    sites: tuple[LayerSite, ...]
    method: str
    backend: str
    fallback_detail: str
    unfused: str = ""


def check_backend(backend: str) -> None:
    """Raise for a backend that is unknown or cannot run in this process; ``"auto"`` always can."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "cpu" and not engine.available():
        raise BackendUnavailableError(
            f"backend='cpu': the native engine is not available ({engine.reason()}). Install a C++ compiler and "
            "reinstall, or use backend='torch'."
        )


def _check_device(model: nn.Module, backend: str) -> None:
    """Raise where the parameters of ``model`` are on a device that the named backend cannot use."""
    if backend != "triton":
        return
    for device in {parameter.device for parameter in model.parameters()}:
        reason = why_not_triton(device)
        if reason:
            raise BackendUnavailableError(f"backend='triton': {reason}. Or use backend='auto'.")


def check_patterns(option: str, patterns: Patterns) -> None:
    if patterns is None or isinstance(patterns, str) or callable(patterns):
        return
    if not isinstance(patterns, (list, tuple, set, frozenset)) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"{option} must be a glob pattern, a list of them or a function (name, module) -> bool")


def matches(patterns: Patterns, name: str, module: nn.Module) -> bool:
    if patterns is None:
        return False
    if callable(patterns):
        return bool(patterns(name, module))
    return any(fnmatch.fnmatchcase(name, p) for p in ([patterns] if isinstance(patterns, str) else patterns))


def _warn_of_idle_patterns(model: nn.Module, options: Options) -> None:
    names = list(candidates(model))
    for option, patterns in (("include", options.include), ("exclude", options.exclude)):
        for pattern in [patterns] if isinstance(patterns, str) else () if callable(patterns) else patterns or ():
            if not fnmatch.filter(names, pattern):
                text = f"{option}={pattern!r} matches no convolution or linear layer of {type(model).__name__}"
                warnings.warn(f"{text}; their names are {', '.join(names)}", stacklevel=4)


def as_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the model's forward from what the user passed as an example.

    >>> as_arguments((1, 2)), as_arguments({"x": 3}), as_arguments(4)
    (((1, 2), {}), ((), {'x': 3}), ((4,), {}))
    """
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, (tuple, list)) else ((example,), {})


def lower(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> None:
    """Plan, swap and measure. Leaves the model as it was, accelerated or plain, if anything fails."""
    _check_device(model, options.backend)
    put_back = raise_layers(model)
    try:
        spikes = spike_map(model, args, kwargs)
        drafts = _drafts(model, spikes, options)
        _warn_of_idle_patterns(model, options)
        _swap_all(model, drafts, options)
        model.__dict__[RECORD] = ModelRecord(
            drafts, spikes.layers, spikes.method, options.backend, spikes.fallback_detail
        )
        _warm_up(model, args, kwargs)
        if options.fuse and options.mode != "dense":
            _fuse(model, args, kwargs, drafts, options)
        _announce(model, options)
    except BaseException as error:
        raise_layers(model)
        put_back()
        _note_hooks(model, error)
        raise


def raise_layers(model: nn.Module) -> Callable[[], None]:
    """Put every swapped layer below ``model`` back to its own class and forget all plans; returns what undoes this."""
    modules = dict(model.named_modules())
    records = [(module, module.__dict__.pop(RECORD)) for module in modules.values() if RECORD in module.__dict__]
    fused = [(module, fusion) for module in modules.values() if (fusion := remove(module)) is not None]
    swapped = [(modules[name], type(modules[name]), runtime) for name, runtime in runtimes(model).items()]
    for layer, _, _ in swapped:
        unswap(layer)

    def put_back() -> None:
        for layer, cls, runtime in swapped:
            swap_again(layer, cls, runtime)
        for module, fusion in fused:
            install(module, fusion)
        for module, record in records:
            module.__dict__[RECORD] = record

    return put_back


def _note_hooks(model: nn.Module, error: BaseException) -> None:
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        error.add_note(
            "sparseflow runs the example without the model's hooks. If one of them changes what goes in, give "
            "example_input as it is behind that hook, or leave it out to plan at the first call."
        )


def _drafts(model: nn.Module, spikes: SpikeMap, options: Options) -> tuple[LayerPlan, ...]:
    sites = {site.name: site for site in spikes.layers}
    modules = candidates(model)
    ordered = [name for name in sites if name in modules] + [name for name in modules if name not in sites]
    return tuple(_draft(name, modules[name], sites.get(name), options) for name in ordered)


def _draft(name: str, module: nn.Module, site: LayerSite | None, options: Options) -> LayerPlan:
    if site is None:
        kind = type(module).__name__.lower()
        return LayerPlan(name, kind, Path.DENSE, Reason.NEVER_RUN, Provenance.DENSE)
    reason, detail = _decide(name, module, site, options)
    return LayerPlan(name, site.kind, Path.DENSE, reason, site.provenance, detail)


def _decide(name: str, module: nn.Module, site: LayerSite, options: Options) -> tuple[Reason, str]:
    refusal = refuse(module)
    if site.provenance is Provenance.DENSE:
        return Reason.NOT_SPIKE_FED, site.detail
    if refusal is not None:
        return refusal
    included = options.include is None or matches(options.include, name, module)
    if not included or matches(options.exclude, name, module):
        return Reason.EXCLUDED, site.detail
    if options.mode == "dense":
        return Reason.MODE, site.detail
    return Reason.NOT_MEASURED, site.detail


def _config(options: Options) -> RuntimeConfig:
    calibration = options.calibration
    known = calibration.crossovers if calibration and calibration.fits else {}
    return RuntimeConfig(backend=options.backend, mode=options.mode, known=known)


def _swap_all(model: nn.Module, drafts: tuple[LayerPlan, ...], options: Options) -> None:
    calibration = options.calibration
    if calibration and not calibration.fits:
        logger.warning("the calibration was measured on another machine or with other versions; measuring again")
    modules = candidates(model)
    config = _config(options)
    for draft in drafts:
        if draft.reason is Reason.NOT_MEASURED:
            swap(modules[draft.name], LayerRuntime(draft, config))


def _warm_up(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the example once: every layer binds its kernel and measures, the report has densities."""
    with isolated(model), measuring(len(runtimes(model)), MeasureBudget()):
        model(*copied(args), **copied(kwargs))


def _fuse(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], drafts: tuple[LayerPlan, ...], options: Options
) -> None:
    """Plan whole blocks for the example, and let the model make plans for other inputs."""
    excluded = [draft.name for draft in drafts if draft.reason is Reason.EXCLUDED]
    fusion = Fusion(_config(options), excluded, cuda_graph=options.cuda_graph)
    with measuring(len(drafts), MeasureBudget()):
        planned = fusion.prepare(model, args, kwargs)
    if planned.reason in (None, Reason.FUSED_LOSES):
        install(model, fusion)
    else:
        logger.info("%s is not fused: %s. %s", type(model).__name__, planned.reason, planned.detail)
        model.__dict__[RECORD] = dataclasses.replace(
            model.__dict__[RECORD], unfused=f"{planned.reason}: {planned.detail}"
        )


def current_plan(model: nn.Module) -> Plan:
    """The plan of an accelerated model as it stands now."""
    record: ModelRecord = model.__dict__[RECORD]
    live = {name: runtime.describe() for name, runtime in runtimes(model).items()}
    blocks = fused_blocks(model)
    live |= {name: block.describe(live[name]) for name, block in blocks.items() if name in live}
    layers = {draft.name: live.get(draft.name) or _without_runtime(draft) for draft in record.drafts}
    return Plan(_blocks(layers, record.sites, blocks), record.method, record.backend, record.fallback_detail)


def _without_runtime(draft: LayerPlan) -> LayerPlan:
    return dataclasses.replace(draft, reason=Reason.REPLACED) if draft.reason is Reason.NOT_MEASURED else draft


def _blocks(
    layers: dict[str, LayerPlan], sites: tuple[LayerSite, ...], fused: dict[str, BlockRun]
) -> tuple[BlockPlan, ...]:
    by_name = {site.name: site for site in sites}

    def block(name: str, plan: LayerPlan) -> BlockPlan:
        if name in fused:
            return BlockPlan((plan,), fused[name].block.norm, fused[name].block.neuron, fused=True)
        site = by_name.get(name)
        return BlockPlan((plan,)) if site is None else BlockPlan((plan,), site.norm, site.neuron)

    return tuple(block(name, plan) for name, plan in layers.items())


def _announce(model: nn.Module, options: Options) -> None:
    layers = current_plan(model).layers
    sparse = [layer for layer in layers if layer.path is not Path.DENSE]
    if sparse:
        logger.info("%d of %d layers run sparse: %s", len(sparse), len(layers), type(model).__name__)
        return
    why = "; ".join(sorted({f"{layer.reason}" for layer in layers})) or "the model has no convolution or linear layer"
    text = f"no layer of {type(model).__name__} runs sparse: {why}. sparseflow.report(model) lists every layer."
    if options.strict:
        raise UnsupportedModelError(text)
    warnings.warn(text, NothingAcceleratedWarning, stacklevel=4)
