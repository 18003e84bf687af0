"""A model whose forward runs a fused plan: the same object under a subclass of its own class."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves

from sparseflow.config import MeasureBudget
from sparseflow.dispatch.crossovers import RuntimeConfig
from sparseflow.dispatch.measure import fastest, wait_for
from sparseflow.graph.fusion import fuse
from sparseflow.graph.isolation import copied, isolated, without_sources
from sparseflow.graph.readout import average_first
from sparseflow.graph.reroll import reroll
from sparseflow.graph.steps import FusedGraph
from sparseflow.graph.tracer import TraceError, trace
from sparseflow.graph.values import example_values
from sparseflow.kernels.blocks.buffers import BufferPool
from sparseflow.kernels.blocks.select import block_ops
from sparseflow.modules.swap import runtimes, watched_by_others
from sparseflow.plan import Reason

from .block import BlockRun
from .chain import Observer
from .graphs import WARM_UP, CudaGraphs, Replayed, graphs_for
from .guard import Guard, hooked, unsuited
from .program import Program

ATTRIBUTE = "_sparseflow_fusion"
logger = logging.getLogger("sparseflow")
_MAX_PLANS = 8
_MAX_LOSS = 1.0
_CONTESTS = 3
_VALUES = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclasses.dataclass
class Planned:
    """A plan for one input signature, or why there is none."""

    program: Program | None
    guard: Guard | None
    reason: Reason | None = None
    detail: str = ""
    fused_ms: float | None = None
    layers_ms: float | None = None
    replayed: Replayed | None = None

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns for these arguments, of which there has to be a program."""
        runner = self.replayed or self.program
        assert runner is not None
        return runner.run(args, kwargs)

    def holds(self) -> bool:
        """Whether the model is what it was when this was planned, but for the values of its weights."""
        return (self.guard is None or self.guard.holds()) and (self.program is None or self.program.is_current())


class Fusion:
    """The fused plans of one model, by input signature.

    A plan is made for the example, and for any other input at the second such call, or (``at_once``) at the first. On a
    GPU it is replayed as CUDA graphs unless ``cuda_graph`` is off.
    """

    def __init__(
        self,
        config: RuntimeConfig,
        excluded: Collection[str] = (),
        *,
        at_once: bool = False,
        cuda_graph: bool = True,
    ):
        self.config, self.excluded, self.at_once, self.cuda_graph = config, frozenset(excluded), at_once, cuda_graph
        self.disabled = 0
        self.observers: list[Observer] = []
        self._reset()

    def _reset(self) -> None:
        self.plans: collections.OrderedDict[Any, Planned] = collections.OrderedDict()
        self.last: Planned | None = None
        self.why: Reason | None = None
        self._ran: Program | None = None
        self._hooked: frozenset[str] = frozenset()
        self._seen_once: set[Any] = set()
        self._graphs: dict[torch.device, CudaGraphs | None] = {}
        self._lock = threading.RLock()
        self._busy = False

    def __getstate__(self) -> dict[str, Any]:
        names = ("config", "excluded", "at_once", "cuda_graph")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Fusion:
        return Fusion(**self.__getstate__())

    def run(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], otherwise: Callable[..., Any]
    ) -> Any:
        """What the model returns, by a fused plan if there is one for this call, else by ``otherwise``."""
        if torch.compiler.is_compiling():
            return otherwise(*args, **kwargs)
        if self._busy or not self._lock.acquire(blocking=False):  # planning, or another thread runs in the buffers
            return otherwise(*args, **kwargs)
        try:
            planned = None if self.disabled or watched_by_others() else self._planned(model, args, kwargs)
            program = None if planned is None else planned.program
            if self._ran is not program:
                self.release()
            self._ran = program
            if planned is not None and program is not None:
                return planned.run(args, kwargs)
        finally:
            self._lock.release()
        return otherwise(*args, **kwargs)

    def release(self) -> None:
        """Have neurons hold their states as the model's own forward would leave them."""
        if self._ran is not None:
            self._ran.release()
            self._ran = None

    def notes(self) -> tuple[str, ...]:
        """Lines for a report: what the plan of the last call is, and what stays outside its blocks."""
        if self.why is not None:
            return (f"the last call was not fused: {self.why}",)
        planned = self.last
        if planned is None:
            return ("the last call was not fused: its input was seen for the first time; the second call plans",)
        if planned.program is None:
            return (f"not fused: {planned.reason} ({planned.detail})",)
        blocks = planned.program.fused.blocks
        steps = max(block.steps for block in blocks)
        times = ""
        if planned.fused_ms is not None and planned.layers_ms is not None:
            times = f": {planned.fused_ms:.2f} ms, layer by layer {planned.layers_ms:.2f} ms"
        refusals = planned.program.fused.refusals
        apart = (f"not fused: {name}: {why}" for name, why in refusals.items())
        return (f"{len(blocks)} blocks fused over {steps} time steps{times}", *self._graph_notes(planned), *apart)

    def _graph_notes(self, planned: Planned) -> tuple[str, ...]:
        if planned.replayed is None:
            on_gpu = planned.program is not None and planned.program.device.type == "cuda"
            return ("not replayed as a CUDA graph: cuda_graph=False",) if on_gpu else ()
        why = planned.replayed.why
        return (f"not replayed as a CUDA graph: {why}" if why else "replayed as a CUDA graph",)

    def refresh(self) -> None:
        """Prepare the weights of all plans anew at the next call; drop plans that were made for others.

        A plan that lost is forgotten: with other weights, such as pruned ones, it may win.
        """
        for key, planned in list(self.plans.items()):
            if planned.reason is Reason.FUSED_LOSES:
                del self.plans[key]
            elif planned.program is not None and planned.program.fits():
                planned.program.refresh()
            elif planned.program is not None:
                del self.plans[key]

    def prepare(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Planned:
        """Plan for the signature of an example now."""
        with self._lock, torch.no_grad():
            self._hooked = frozenset(hooked(model))
            planned = self._make(model, args, kwargs)
            self._keep((signature(model, args, kwargs), self._hooked), planned)
            self.last = planned
            return planned

    def _planned(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Planned | None:
        self.why = unsuited(model, args, kwargs)
        if self.why is not None:
            return None
        key = (signature(model, args, kwargs), self._hooked)
        planned = self.plans.get(key)
        if planned is None or not planned.holds():
            planned = self._replan(model, args, kwargs, key)
        self.last = planned
        program = None if planned is None else planned.program
        if program is not None and torch.is_grad_enabled() and program.wants_gradients():
            self.why = Reason.GRADIENTS
            return None
        return planned

    def _replan(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], stale: Any) -> Planned | None:
        """A plan for what the model is now, once the same call has been seen twice."""
        self._hooked = frozenset(hooked(model))
        key = (stale[0], self._hooked)
        known = self.plans.get(key)
        if known is not None and known.holds():
            return known
        self.plans.pop(key, None)
        if len(self._seen_once) > _MAX_PLANS:
            self._seen_once.clear()
        if key not in self._seen_once and not self.at_once:
            self._seen_once.add(key)
            return None
        with torch.no_grad():
            planned = self._make(model, args, kwargs)
        self._keep(key, planned)
        return planned

    def _keep(self, key: Any, planned: Planned) -> None:
        self._seen_once.discard(key)
        self.plans[key] = planned
        while len(self.plans) > _MAX_PLANS:
            self.plans.popitem(last=False)

    def _make(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Planned:
        with self._planning(), own_forward(model), unfused(model), unrecorded(model), without_sources():
            try:
                return self._plan(model, args, kwargs)
            except TraceError as error:
                return Planned(None, None, Reason.NOT_TRACED, str(error))

    def _plan(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Planned:
        if any(why := _unusual(leaf) for leaf in tree_leaves((args, kwargs))):
            return Planned(None, None, Reason.NO_BLOCKS, why)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        pool = BufferPool(device)
        ops, why = block_ops(device, self.config.backend, pool)
        if ops is None:
            return Planned(None, None, Reason.NO_ENGINE, why)
        fused = _fused_graph(model, args, kwargs, self.excluded, self._hooked)
        if not any(block.neuron is not None for block in fused.blocks):
            detail = "; ".join(sorted(set(fused.refusals.values()))) or "no neuron has a known update rule"
            return Planned(None, None, Reason.NO_BLOCKS, detail)
        program = Program(model, fused, ops, device, self.observers)
        with isolated(model):
            program.plan(copied(args), copied(kwargs), self.config)
        planned = Planned(program, Guard(model, fused, self._hooked), replayed=self._replayed(program))
        if self.config.mode == "auto":
            _contest(model, args, kwargs, planned)
        if planned.program is not None:
            _forget_packed(model, planned.program)
        return planned

    def _replayed(self, program: Program) -> Replayed | None:
        if program.device not in self._graphs:
            self._graphs[program.device] = graphs_for(program.device) if self.cuda_graph else None
        graphs = self._graphs[program.device]
        return None if graphs is None else Replayed(program, graphs)

    @contextlib.contextmanager
    def _planning(self) -> Iterator[None]:
        self._busy = True
        try:
            yield
        finally:
            self._busy = False


def signature(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a plan is made for: shapes, dtypes and devices of tensors, other arguments by value, training, threads.

    >>> signature(nn.ReLU().eval(), (torch.zeros(2, 3),), {})[0]
    ((torch.Size([2, 3]), torch.float32, device(type='cpu')),)
    """
    mode = (model.training, torch.get_num_threads())
    if not kwargs and all(type(arg) is torch.Tensor and _is_ordinary(arg) for arg in args):
        return tuple((arg.shape, arg.dtype, arg.device) for arg in args), mode
    leaves, spec = tree_flatten((args, kwargs))
    return tuple(map(_leaf, leaves)), str(spec), mode


def _leaf(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return type(value), value.shape, value.dtype, value.device, _is_ordinary(value)
    return (type(value), value) if isinstance(value, _VALUES) else _Same(value)


def _is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether the memory of ``tensor`` holds its values, of which there are some."""
    return tensor.layout is torch.strided and tensor.numel() > 0 and not tensor.is_neg()


class _Same:
    """Equal for one object only, which it keeps, so that no other one gets its address."""

    def __init__(self, value: Any):
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._value is self._value

    def __hash__(self) -> int:
        return id(self._value)


def _unusual(value: Any) -> str:
    """What about an input keeps fused blocks from taking it, and the trace from following it."""
    if not isinstance(value, torch.Tensor):
        return "" if isinstance(value, _VALUES) else f"an input is a {type(value).__name__}, which can change by itself"
    if type(value) not in (torch.Tensor, nn.Parameter) or not _is_ordinary(value):
        return "an input is empty, or a tensor of an unusual kind"
    return ""


def _fused_graph(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], excluded: frozenset[str], whole: frozenset[str]
) -> FusedGraph:
    """Trace, batch over time and find the blocks. A hook in a loop over time wants every step: nothing is batched."""
    graph = trace(model, args, kwargs, whole=whole)
    if not whole:
        graph = reroll(graph, args, kwargs) or graph
    average_first(model, graph, example_values(model, graph, args, kwargs), whole)
    values = example_values(model, graph, args, kwargs)
    return fuse(model, graph, values, excluded, whole)


def _forget_packed(model: nn.Module, program: Program) -> None:
    """Drop the packed weights of layers that the plan computes; they are packed anew if they run on their own."""
    found = runtimes(model)
    for block in program.blocks:
        if block.block.layer in found:
            found[block.block.layer].refresh(block.layer.weight)


def _contest(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], planned: Planned) -> None:
    """Keep the plan only if it is faster than the model's own forward with its layers on their own.

    A network is long enough that a few runs spend the budget, and other work may disturb them all: one that loses is
    measured again before it is dropped for good.
    """
    program = planned.program
    assert program is not None
    with isolated(model):
        example = copied((args, kwargs))
        device = program.device
        runs: dict[str, Callable[[], object]] = {
            "fused": lambda: (planned.run(*example), wait_for(device)),
            "layers": lambda: (model(*example[0], **example[1]), wait_for(device)),
        }
        for run in runs.values():
            for _ in range(1 if planned.replayed is None else WARM_UP):
                run()
        times = dict.fromkeys(runs, float("inf"))
        for _ in range(_CONTESTS):
            found = fastest(runs, MeasureBudget().layer_ms).ms
            times = {name: min(ms, found[name]) for name, ms in times.items()}
            if times["fused"] <= _MAX_LOSS * times["layers"]:
                break
    planned.fused_ms, planned.layers_ms = times["fused"], times["layers"]
    if times["fused"] > _MAX_LOSS * times["layers"]:
        planned.program, planned.replayed, planned.reason = None, None, Reason.FUSED_LOSES
        planned.detail = f"{times['fused']:.3f} against {times['layers']:.3f} ms"


class FusedModel(nn.Module):
    """Mixed in before the model's own class."""

    _sparseflow_plain: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.__dict__[ATTRIBUTE].release()
        _, _, *state = super().__reduce_ex__(2)  # of which the first two rebuild by a class nobody can import
        return _rebuild, (type(self)._sparseflow_plain,), *state


@functools.cache
def _fused_class(plain: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(plain.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        fusion: Fusion | None = self.__dict__.get(ATTRIBUTE)
        if fusion is None:  # another thread is planning
            return plain.forward(self, *args, **kwargs)
        return fusion.run(self, args, kwargs, functools.partial(plain.forward, self))

    body = {
        "_sparseflow_plain": plain,
        "forward": forward,
        "__module__": plain.__module__,
        "__doc__": plain.__doc__,
    }
    return type(plain.__name__, (FusedModel, plain), body)  # type: ignore[return-value]


def _rebuild(plain: type[nn.Module]) -> nn.Module:
    cls = _fused_class(plain)
    return cls.__new__(cls)


def install(model: nn.Module, fusion: Fusion) -> None:
    """Make ``model`` run the plans of ``fusion``, in place."""
    model.__dict__[ATTRIBUTE] = fusion
    model.__class__ = _fused_class(type(model))


def remove(model: nn.Module) -> Fusion | None:
    """Undo :func:`install`; returns what was installed."""
    fusion = model.__dict__.pop(ATTRIBUTE, None)
    if fusion is not None:
        fusion.release()
        model.__class__ = type(model)._sparseflow_plain  # type: ignore[attr-defined]
    return fusion


def fusion_of(model: nn.Module) -> Fusion | None:
    """The fused plans of ``model``, if it has any."""
    return model.__dict__.get(ATTRIBUTE)


def fused_blocks(model: nn.Module) -> dict[str, BlockRun]:
    """The blocks of the plan that ran last, by the name of their layer."""
    fusion = fusion_of(model)
    if fusion is None or fusion.last is None or fusion.last.program is None:
        return {}
    return {block.block.layer: block for block in fusion.last.program.blocks if block.block.layer is not None}


@contextlib.contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` has its own class and forward."""
    fusion = remove(model)
    try:
        yield
    finally:
        if fusion is not None:
            install(model, fusion)


@contextlib.contextmanager
def unrecorded(model: nn.Module) -> Iterator[None]:
    """Inside, what the layers see and do is not counted."""
    kept = [(runtime.stats, copy.deepcopy(vars(runtime.stats))) for runtime in runtimes(model).values()]
    try:
        yield
    finally:
        for stats, before in kept:
            vars(stats).update(before)


@contextlib.contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` and its submodules run without fused plans, layer by layer."""
    found = [fusion for module in model.modules() if (fusion := fusion_of(module)) is not None]
    for fusion in found:
        fusion.disabled += 1
    try:
        yield
    finally:
        for fusion in found:
            fusion.disabled -= 1
