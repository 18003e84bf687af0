"""Fused plans on a GPU replayed as CUDA graphs: one launch a call instead of one a kernel, and no Python between them.

A graph is a list of launches with all their arguments. What a plan decides on the host is therefore part of what a
graph is found by: where the neurons' memory lies, whether they start afresh, the strides of the inputs, the modes of
PyTorch. What is on the device may change from replay to replay: inputs (copied to where the graph reads them), spikes,
random numbers.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from sparseflow.dispatch.graphs import captured
from sparseflow.dispatch.stats import LayerStats
from sparseflow.frameworks import neuron_spec
from sparseflow.graph.eligibility import layer_kind
from sparseflow.graph.steps import Eager
from sparseflow.graph.tracer import call_state_method
from sparseflow.kernels.precision import tf32_convolution, tf32_matmul
from sparseflow.modules.swap import runtimes

from .constants import Watched
from .program import TRACED_CONSTANT, Program, is_foreign

logger = logging.getLogger("sparseflow")
_MAX_GRAPHS = 4
_MAX_SEEN = 8
_FUNCTIONS = ("torch", "_operator", "math", "builtins", "sparseflow", "einops")
_VALUES = (bool, int, float, str, type(None), torch.Size, torch.dtype, torch.device)
_INDEXED = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
_RESETS = ("init_", "reset_mem")  # snnTorch's, of one neuron; the values they replace do not matter to them
_SIGHTS = 2  # calls before a graph: the first compiles kernels and prepares weights, the second runs as it is captured
WARM_UP = 2 * _SIGHTS  # calls after which a plan that is not reset replays: it starts afresh, and then goes on


class CudaGraphs:
    """What replaying takes of CUDA: capture, replay, streams. Graphs of one device share the memory they work in."""

    def __init__(self, device: torch.device):
        self.device = device
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._stream = torch.cuda.current_stream(device)

    def capturing(self) -> bool:
        """Whether somebody is recording what the current stream runs."""
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    def follow(self) -> None:
        """Let the current stream wait for the one that was current here before: both run in the same memory."""
        stream = torch.cuda.current_stream(self.device)
        if self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        """Record what ``run`` launches, without running it, as a function that does. Waits for the device."""
        other = next(iter(self._graphs), None)  # the pool of graphs that are all gone cannot be used again
        with torch.cuda.device(self.device):
            graph = captured(run, pool=None if other is None else other.pool())
        self._graphs.add(graph)
        return functools.partial(self._replay, graph)

    def _replay(self, graph: torch.cuda.CUDAGraph) -> None:
        with torch.cuda.device(self.device):
            graph.replay()


def graphs_for(device: torch.device) -> CudaGraphs | None:
    """The graphs of a device, where it has any."""
    return CudaGraphs(device) if device.type == "cuda" else None


class _Place:
    """Where a graph reads an input that was laid out as ``x``; a size of stride 0 is stored once."""

    def __init__(self, x: Tensor):
        self._once = tuple(slice(1) if stride == 0 else slice(None) for stride in x.stride())
        self._memory = torch.empty_like(x.detach()[self._once])
        self.tensor = self._memory.expand(x.shape)

    def take(self, x: Tensor) -> None:
        """Read the values of ``x`` from now on."""
        self._memory.copy_(x[self._once])


@dataclasses.dataclass(frozen=True)
class _Recording:
    """A captured call: the inputs it reads, the results it writes, and how often each path ran in it."""

    inputs: list[_Place | None]
    replay: Callable[[], None]
    results: list[Any]
    structure: TreeSpec
    calls: list[tuple[LayerStats, collections.Counter[Any]]]


class Replayed:
    """Runs a program as CUDA graphs wherever that gives what the program itself would.

    The first call from some start condition runs the program, the second one runs it once more and captures it, the
    others replay. Results are copies, which nobody writes into later. ``why`` says what keeps the program from being
    captured at all, ``""`` if nothing does.
    """

    def __init__(self, program: Program, graphs: CudaGraphs):
        self.program, self._graphs = program, graphs
        self.replays = 0
        self.why = _obstacle(program)
        self._memories = [block.memory for block in program.blocks if block.memory is not None]
        self._leads = list(_leads(program))
        self._watched = Watched(_read_in_place(program))
        self._runtimes = runtimes(program.model)
        self.forget()

    def forget(self) -> None:
        """Drop all graphs, as the weights or buffers that they read are not the ones any more."""
        self._watched.renew()
        self._generation = self.program.generation
        self._recordings: collections.OrderedDict[Hashable, _Recording] = collections.OrderedDict()
        self._seen: collections.OrderedDict[Hashable, None] = collections.OrderedDict()

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return len(self._recordings)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the program returns for these arguments."""
        inputs, structure = _flat(args, kwargs)
        if self._graphs.capturing():
            return self.program.run(args, kwargs)
        self._graphs.follow()
        if self.why or self.program.observed or not self._on_device(inputs):
            return self.program.run(args, kwargs)
        if self._generation != self.program.generation or self._watched.changed():
            self.forget()
        key = (self._settled(), tuple(x.stride() if isinstance(x, Tensor) else None for x in inputs), _modes())
        recording = self._recordings.get(key)
        if recording is not None:
            self._recordings.move_to_end(key)
            return self._replay(recording, inputs)
        if key not in self._seen:
            _keep(self._seen, key, None, _MAX_SEEN)
            return self._apart(self.program.run(args, kwargs))
        return self._record(key, inputs, structure)

    def _on_device(self, inputs: list[Any]) -> bool:
        return all(x.device == self.program.device for x in inputs if isinstance(x, Tensor))

    def _settled(self) -> tuple[Hashable, ...]:
        """Have all neurons' states in their memory; where that is, and which of them start afresh."""
        pairs = zip(self._memories, self._leads, strict=True)
        return tuple(memory.settle(leads=leads) for memory, leads in pairs)

    def _replay(self, recording: _Recording, inputs: list[Any]) -> Any:
        _fill(recording.inputs, inputs)
        recording.replay()
        self._end()
        for stats, calls in recording.calls:
            stats.calls.update(calls)
        self.replays += 1
        return tree_unflatten(_copies(recording.results), recording.structure)

    def _end(self) -> None:
        for memory in self._memories:
            memory.end()

    # ---- capture

    def _record(self, key: Hashable, inputs: list[Any], structure: TreeSpec) -> Any:
        """Run the program on inputs of its own, and capture the same call for the next ones."""
        places = [_Place(x) if isinstance(x, Tensor) else None for x in inputs]
        _fill(places, inputs)
        arguments = [x if place is None else place.tensor for x, place in zip(inputs, places, strict=True)]
        args, kwargs = tree_unflatten(arguments, structure)
        before, survey = [memory.held() for memory in self._memories], _Survey(self.program.device, arguments)
        with self._fixed(), survey:
            result = self._apart(self.program.run(args, kwargs))
        if why := survey.why or self._odd_result(result, arguments):
            self._give_up(why)
            for number in survey.written:
                inputs[number].copy_(arguments[number])
            return result
        self._put(before)
        try:
            recording = self._captured(places, args, kwargs)
            _keep(self._recordings, key, recording, _MAX_GRAPHS)
        except Exception as error:  # whatever a step of the user's makes of being captured
            self._give_up(f"capturing it failed with {type(error).__name__}: {_first_line(error)}")
        finally:
            self._end()
        return result

    def _captured(self, places: list[_Place | None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Recording:
        results: list[Any] = []
        with self._fixed(), self._counted() as calls:
            replay = self._graphs.capture(lambda: results.append(self._apart(self.program.run(args, kwargs))))
        leaves, structure = tree_flatten(results.pop())
        return _Recording(places, replay, leaves, structure, calls)

    def _put(self, states: list[tuple[Any, ...]]) -> None:
        for memory, values in zip(self._memories, states, strict=True):
            memory.put(values)

    @contextlib.contextmanager
    def _fixed(self) -> Iterator[None]:
        """Inside, neurons keep the memory that they were settled in."""
        for memory in self._memories:
            memory.fixed = True
        try:
            yield
        finally:
            for memory in self._memories:
                memory.fixed = False

    @contextlib.contextmanager
    def _counted(self) -> Iterator[list[tuple[LayerStats, collections.Counter[Any]]]]:
        """Gives what was counted inside, for the replays to add: the capture itself is no call."""
        every = [block.stats for block in self.program.blocks] + [found.stats for found in self._runtimes.values()]
        before = [copy.deepcopy(vars(stats)) for stats in every]
        found: list[tuple[LayerStats, collections.Counter[Any]]] = []
        try:
            yield found
        finally:
            for stats, kept in zip(every, before, strict=True):
                if calls := stats.calls - kept["calls"]:
                    found.append((stats, calls))
                vars(stats).update(kept)

    def _give_up(self, why: str) -> None:
        logger.info("%s runs without a CUDA graph: %s", type(self.program.model).__name__, why)
        self.why = why
        self.forget()

    def _apart(self, result: Any) -> Any:
        """``result`` with copies in place of neurons' memory, which would have to move if somebody held on to it."""
        memory = {place for memory in self._memories for place in memory.places()}
        leaves, structure = tree_flatten(result)
        parts = [x.clone() if isinstance(x, Tensor) and _storage(x) in memory else x for x in leaves]
        return tree_unflatten(parts, structure)

    def _odd_result(self, result: Any, arguments: list[Any]) -> str:
        """What about a result a copy of what a graph has written is not."""
        model, leaves = self.program.model, tree_leaves(result)
        lasting = [*model.parameters(), *model.buffers(), *(x for x in arguments if isinstance(x, Tensor))]
        known = {_storage(x) for x in lasting if x.numel()}
        if any(isinstance(x, Tensor) and _storage(x) in known for x in leaves):
            return "it returns an input, a parameter or a buffer itself"
        other = next((x for x in leaves if not isinstance(x, (Tensor, *_VALUES))), None)
        return "" if other is None else f"it returns a {type(other).__name__}"


def _keep(kept: collections.OrderedDict[Hashable, Any], key: Hashable, value: Any, most: int) -> None:
    kept[key] = value
    while len(kept) > most:
        kept.popitem(last=False)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def _modes() -> tuple[Hashable, ...]:
    """The switches of PyTorch that decide what is launched."""
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        tf32_convolution(),
        tf32_matmul(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.deterministic,
    )


# ---- inputs and results


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], TreeSpec]:
    """The leaves of all arguments, and how they are put together."""
    return tree_flatten((args, kwargs))


def _fill(places: list[_Place | None], inputs: list[Any]) -> None:
    for place, x in zip(places, inputs, strict=True):
        if place is not None:
            place.take(x)


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _copies(leaves: list[Any]) -> list[Any]:
    """The values of ``leaves`` in new memory, which tensors share that shared it."""
    shared = collections.Counter(_storage(x) for x in leaves if isinstance(x, Tensor))
    tensors: dict[int, Tensor] = {}
    storages: dict[int, torch.UntypedStorage] = {}
    for x in leaves:
        if not isinstance(x, Tensor) or id(x) in tensors:
            continue
        at = _storage(x)
        if shared[at] == 1:
            tensors[id(x)] = x.clone()
            continue
        if at not in storages:
            storages[at] = x.untyped_storage().clone()
        tensors[id(x)] = x.new_empty(0).set_(storages[at], x.storage_offset(), x.shape, x.stride())  # type: ignore[call-overload]
    return [tensors[id(x)] if isinstance(x, Tensor) else x for x in leaves]


# ---- what must not be captured


def _leads(program: Program) -> Iterator[bool]:
    """Whether the attributes of a block's neuron say what it starts from: no earlier block, and not the graph."""
    seen: set[str] = set()
    for block in program.blocks:
        name = block.block.neuron
        if name is not None:
            yield name not in seen and not block.block.states
            seen.add(name)


def _outside(program: Program) -> list[fx.Node]:
    """The nodes that run as they are, outside of all blocks."""
    return [step.out for step in program.fused.steps if isinstance(step, Eager)]


def _obstacle(program: Program) -> str:
    """What about the steps outside of blocks is seen from outside: they must do the same at every call."""
    return next((why for node in _outside(program) if (why := _why_not(program, node))), "")


def _why_not(program: Program, node: fx.Node) -> str:
    target: Any = node.target
    if node.op == "call_module":
        return _module_obstacle(str(target), program.modules[str(target)])
    if node.op == "get_attr" and not str(target).startswith(TRACED_CONSTANT):
        return _attribute_obstacle(program, node)
    module = (getattr(target, "__module__", None) or "builtins").split(".")[0]
    if node.op == "call_function" and module not in _FUNCTIONS:
        return f"it calls {getattr(target, '__name__', target)} of {module}"
    return ""


def _attribute_obstacle(program: Program, node: fx.Node) -> str:
    target = str(node.target)
    if target in program.modules:
        outside = set(_outside(program))
        users = (user for user in node.users if user in outside and not _only_resets(program, user, target))
        return _module_obstacle(target, program.modules[target]) if any(users) else ""
    owner, _, name = target.rpartition(".")
    module = program.modules[owner]
    if neuron_spec(module) is not None:
        return f"it reads {name} of the neuron {owner}"
    return "" if _table(module, name) is not None else f"it computes its attribute {target}"


def _only_resets(program: Program, node: fx.Node, neuron: str) -> bool:
    """Whether ``node`` resets a neuron that a block then runs: its attributes end up holding what the block leaves."""
    if node.target is not call_state_method or all(block.block.neuron != neuron for block in program.blocks):
        return False
    return str(node.args[1]).startswith(_RESETS)


def _module_obstacle(name: str, module: nn.Module) -> str:
    for part in module.modules():
        if is_foreign(part):
            return f"{name} runs code of its own or a hook at every call"
        if neuron_spec(part) is not None or part.__dict__.get("_memories"):
            return f"{name} keeps a state outside of fused blocks"
        if part.training and layer_kind(part) is None and _may_train(part):
            return f"{name} is in training mode; call eval()"
    return ""


def _may_train(module: nn.Module) -> bool:
    """Whether training may change what a module does: it holds tensors, or a probability."""
    held = any(x is not None for x in (*module._parameters.values(), *module._buffers.values()))
    return held or any(name in module.__dict__ for name in ("p", "dropout", "training_p"))


def _table(module: nn.Module, name: str) -> dict[str, Any] | None:
    """Where a module keeps one of its attributes."""
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)  # type: ignore[assignment]
    return next((table for table in tables if name in table), None)


def _read_in_place(program: Program) -> list[tuple[dict[str, Any], str]]:
    """Where the tensors live that steps outside of blocks read: a graph knows them by their addresses."""
    found: list[tuple[dict[str, Any], str]] = []
    for node in _outside(program):
        target = str(node.target)
        module = program.modules.get(target) if node.op in ("call_module", "get_attr") else None
        if module is not None and neuron_spec(module) is None:
            for part in module.modules():
                found += [(table, name) for table in (part._parameters, part._buffers) for name in table]  # type: ignore[misc]
        elif module is None and node.op == "get_attr" and not target.startswith(TRACED_CONSTANT):
            owner, _, name = target.rpartition(".")
            table = _table(program.modules[owner], name)
            found += [] if table is None or not isinstance(table[name], Tensor) else [(table, name)]
    return found


class _Survey(TorchDispatchMode):
    """Looks at the operations of one call for what a graph could not repeat; ``why`` is the first such thing.

    ``written`` are the numbers of the inputs that were written to. Kernels of blocks are none of these operations.
    """

    def __init__(self, device: torch.device, inputs: list[Any]):
        super().__init__()
        self._device = device
        self._inputs = {_storage(x): number for number, x in enumerate(inputs) if isinstance(x, Tensor)}
        self.why = ""
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        writes = self._writes(func, args, kwargs)
        self.written |= writes
        self.why = self.why or ("it writes into its input" if writes else self._why_not(func, args, kwargs, result))
        return result

    def _writes(self, func: Any, args: Any, kwargs: Any) -> set[int]:
        if not func._schema.is_mutable:
            return set()
        given = [*zip(func._schema.arguments, args, strict=False)]
        given += [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]
        changed = [value for argument, value in given if argument.alias_info and argument.alias_info.is_write]
        storages = {_storage(x) for x in tree_leaves(changed) if isinstance(x, Tensor)}
        return {number for storage, number in self._inputs.items() if storage in storages}

    def _why_not(self, func: Any, args: Any, kwargs: Any, result: Any) -> str:
        if _looks_at_values(func, args):
            return f"{func} makes the host look at values"
        if kwargs.get("generator") is not None:
            return f"{func} draws from a generator of its own"
        made = (x for x in tree_leaves(result) if isinstance(x, Tensor))
        if any(x.device != self._device and x.numel() for x in made):
            return f"{func} works on another device"
        return ""


def _looks_at_values(func: Any, args: Any) -> bool:
    """Whether an operation returns a value to the host, or works on as many as there are values of a kind."""
    if func.overloadpacket in _INDEXED:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
