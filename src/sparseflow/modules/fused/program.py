"""The executable form of a fused graph: steps bound to modules and kernels, over numbered slots."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparseflow.dispatch.crossovers import RuntimeConfig
from sparseflow.graph.eligibility import layer_kind
from sparseflow.graph.steps import Block, Combine, Eager, FusedGraph, Operand, Pool, Step, Unpack
from sparseflow.kernels.blocks.records import BlockOps
from sparseflow.kernels.blocks.spikes import PackedSpikes

from .block import BlockRun
from .chain import BoundBlock, Chain, Env, Observer, Scrutiny, Slots
from .constants import Watched, owners

_LENIENT = ("torch.nn.", "spikingjelly.", "snntorch.")
TRACED_CONSTANT = "_tensor_constant"  # how torch.fx names the tensors that it puts into a graph
Action = Callable[[Env], None]
Placed = tuple[Action, tuple[tuple[int, bool], ...]]


class Program:
    """Runs a fused graph. Slots hold the values of one call; what is read for the last time is released at once.

    ``generation`` counts how often weights were prepared anew: what was made from earlier ones no longer holds.
    """

    def __init__(
        self,
        model: nn.Module,
        fused: FusedGraph,
        ops: BlockOps,
        device: torch.device,
        observers: list[Observer],
    ):
        self.fused, self.ops, self.model = fused, ops, model
        self.modules = dict(model.named_modules())
        self.blocks: list[BlockRun] = []
        self._scrutiny = Scrutiny(observers)
        self._slots: dict[tuple[fx.Node, bool], int] = {}
        self._inputs: list[tuple[int, str, Any]] = []
        self.generation = 0
        self.device = device
        actions = [self._bound(step) for step in fused.steps]
        released = self._last_reads()
        placed = [(a, released.get(i, ())) for i, a in enumerate(actions) if a is not None]
        self._actions = list(self._chained(placed)) if hasattr(ops, "chain") else placed
        self._result = len(self._slots)
        self._watched = Watched([owner for block in self.blocks for owner in owners(block.block, self.modules)])

    # ---- running

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns for these arguments."""
        env: Env = [None] * (len(self._slots) + 1)
        self._fill_inputs(env, args, kwargs)
        for action, released in self._actions:
            action(env)
            for slot, pooled in released:
                if pooled:
                    self._give_back(env[slot])
                env[slot] = None
        return env[self._result]

    def is_current(self) -> bool:
        """Take note of weights that were written to or replaced; false where the plan cannot use the new ones."""
        if not self._watched.changed():
            return True
        if not self.fits():
            return False
        self.refresh()
        return True

    @property
    def observed(self) -> bool:
        """Whether somebody looks at single blocks."""
        return bool(self._scrutiny)

    def fits(self) -> bool:
        """Whether the weights of now are of the shapes, types and shares of zero blocks that the plan was made for."""
        return self._watched.fits() and all(block.fits() for block in self.blocks)

    def release(self) -> None:
        """Have the neurons hold their states as the model's own forward would leave them."""
        for block in self.blocks:
            if block.memory is not None:
                block.memory.release()

    def wants_gradients(self) -> bool:
        """Whether the memory of a neuron is part of an autograd graph that the call would extend."""
        return any(block.memory is not None and block.memory.wants_gradients() for block in self.blocks)

    def plan(self, args: tuple[Any, ...], kwargs: dict[str, Any], config: RuntimeConfig) -> None:
        """Run once and find the crossover of every block on the way."""
        self._scrutiny.planning = config
        try:
            self.run(args, kwargs)
        finally:
            self._scrutiny.planning = None

    def refresh(self) -> None:
        """Prepare all weights anew."""
        self._watched.renew()
        self.generation += 1
        for block in self.blocks:
            block.refresh()
        for action, _ in self._actions:
            if isinstance(action, Chain):
                action.unsettle()

    def _fill_inputs(self, env: Env, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for i, (slot, name, default) in enumerate(self._inputs):
            env[slot] = args[i] if i < len(args) else kwargs.get(name, default)

    def _give_back(self, value: Any) -> None:
        if self.ops.pool is not None and isinstance(value, PackedSpikes):
            self.ops.pool.give_spikes(value)

    # ---- binding

    def slot(self, node: fx.Node, packed: bool) -> int:
        """Where the value of ``node`` lies, packed or dense."""
        return self._slots.setdefault((node, packed), len(self._slots))

    def _read(self, operand: Operand) -> int:
        return self.slot(operand.node, operand.packed is not None)

    def _bound(self, step: Step) -> Action | None:
        if isinstance(step, Eager):
            return self._bound_eager(step.out)
        if isinstance(step, Block):
            return self._bound_block(step)
        if isinstance(step, Unpack):
            return self._bound_unpack(step)
        if isinstance(step, Pool):
            return self._bound_pool(step)
        assert isinstance(step, Combine)
        return self._bound_combine(step)

    def _bound_block(self, step: Block) -> Action:
        run = BlockRun(step, self.modules, self.ops, self.device, private=self._is_private(step))
        self.blocks.append(run)
        slots = Slots(
            self._read(step.source),
            self.slot(step.out, step.makes_packed),
            None if step.residual is None else self._read(step.residual),
            tuple(self.slot(node, False) for node in step.states),
            None if step.membrane is None else self.slot(step.membrane, False),
        )
        return BoundBlock(run, slots, self._scrutiny, exactly=self._exactly(step.out))

    def _is_private(self, step: Block) -> bool:
        """Whether only blocks read the result, as what they add."""
        reads = [(other, operand) for other in self.fused.steps for operand in other.operands]
        readers = [(other, operand) for other, operand in reads if operand.node is step.out]
        return not self.fused.aliased and all(isinstance(o, Block) and o.residual is operand for o, operand in readers)

    def _exactly(self, node: fx.Node) -> bool:
        """Whether the tensor of ``node`` must lie in memory as the model's does: views of it are written to."""
        return self.fused.aliased and node in self.fused.contiguous

    def _bound_unpack(self, step: Unpack) -> Action:
        source, out, layout = self._read(step.source), self.slot(step.out, False), step.source.packed
        assert layout is not None
        exactly = self._exactly(step.out)

        def act(env: Env) -> None:
            dense = self.ops.unpack(env[source])
            shape = (layout.images, layout.channels, *layout.size)
            images = dense.reshape(shape)
            result = images.reshape(layout.shape) if layout.flat else _with_lead(images, layout.lead)
            env[out] = result.contiguous() if exactly else result

        return act

    def _bound_pool(self, step: Pool) -> Action:
        source, out, layout = self._read(step.source), self.slot(step.out, step.makes_packed), step.layout

        exactly = self._exactly(step.out)

        def average(env: Env) -> None:
            dense = self.ops.avg_pool(env[source], step.kernel, step.stride, step.padding, step.include_pad)
            env[out] = dense.reshape(layout.shape).contiguous() if exactly else dense.reshape(layout.shape)

        def maximum(env: Env) -> None:
            env[out] = self.ops.max_pool(env[source], step.kernel, step.stride, step.padding, step.dilation)

        return average if step.average else maximum

    def _bound_combine(self, step: Combine) -> Action:
        parts, out, op = [self._read(part) for part in step.parts], self.slot(step.out, True), step.op

        def act(env: Env) -> None:
            values = tuple(env[part] for part in parts)
            if op == "concat":
                env[out] = self.ops.concat(values)
            elif op == "add":
                env[out] = self.ops.add(values[0], values[1])
            else:
                env[out] = self.ops.logical(values[0], values[1], op)

        return act

    def _bound_eager(self, node: fx.Node) -> Action | None:
        out = self.slot(node, False)
        if node.op == "placeholder":
            default = node.args[0] if node.args else None
            self._inputs.append((out, str(node.target), default))
            return None
        if node.op == "get_attr":
            return self._bound_attribute(str(node.target), out)
        arguments = _Arguments(node, self)
        if node.op == "output":
            return _output(arguments)
        return _call(node, arguments, self.modules, out, aliased=self.fused.aliased)

    def _bound_attribute(self, target: str, out: int) -> Action:
        """A parameter or buffer as the model holds it now; a constant of the trace lies in the graph."""
        find = operator.attrgetter(target)
        root: Any = self.fused.graph if target.startswith(TRACED_CONSTANT) else self.model

        def act(env: Env) -> None:
            env[out] = find(root)

        return act

    def _chained(self, actions: list[Placed]) -> Iterator[Placed]:
        """The same with neighbouring blocks on packed spikes made one action."""
        stepped = Counter(id(block.memory.module) for block in self.blocks if block.memory is not None)
        shared = {module for module, times in stepped.items() if times > 1}
        for chains, group in itertools.groupby(actions, lambda placed: _can_chain(placed[0], shared)):
            members = list(group)
            if chains and len(members) > 1:
                blocks = [action for action, _ in members if isinstance(action, BoundBlock)]
                released = tuple(slot for _, slots in members for slot in slots)
                yield Chain(blocks, {slot for slot, _ in released}), released
            else:
                yield from members

    # ---- when values are done with

    def _last_reads(self) -> dict[int, tuple[tuple[int, bool], ...]]:
        """By step: the slots read there for the last time, and whether their buffers can be used again."""
        last: dict[int, int] = {}
        for i, step in enumerate(self.fused.steps):
            for operand in step.operands:
                last[self._read(operand)] = i
            last.setdefault(self.slot(step.out, step.makes_packed), i)
        packed = {self.slot(step.out, True) for step in self.fused.steps if step.makes_packed}
        found: dict[int, tuple[tuple[int, bool], ...]] = {}
        for slot, i in last.items():
            found[i] = (*found.get(i, ()), (slot, slot in packed))
        return found


def _can_chain(action: Action, shared: Collection[int]) -> bool:
    """A chain reads all states before it runs, those that a graph passes on or two blocks share among them."""
    if not isinstance(action, BoundBlock) or not action.run.can_chain or action.slots.states:
        return False
    return action.run.memory is None or id(action.run.memory.module) not in shared


def _with_lead(images: Tensor, lead: tuple[int, ...]) -> Tensor:
    return images.unflatten(0, lead) if len(lead) > 1 else images


@dataclasses.dataclass
class _Arguments:
    """The arguments of a node, read from slots at every call."""

    node: fx.Node
    program: dataclasses.InitVar[Program]

    def __post_init__(self, program: Program) -> None:
        self._slots = {n: program.slot(n, False) for n in self.node.all_input_nodes}
        plain = all(isinstance(arg, (fx.Node, int, float, str, type(None))) for arg in self.node.args)
        strict = self.node.op == "output" or _is_foreign(self.node, program.modules)
        self._contiguous = program.fused.contiguous if strict else frozenset[fx.Node]()
        self._plain = plain and not strict and not any(isinstance(v, fx.Node) for v in self.node.kwargs.values())

    def positional(self, env: Env) -> tuple[Any, ...]:
        """Positional arguments with nodes replaced by their values."""
        if self._plain:
            return tuple(env[self._slots[arg]] if isinstance(arg, fx.Node) else arg for arg in self.node.args)
        return fx.node.map_arg(self.node.args, lambda n: self._value(env, n))  # type: ignore[return-value]

    def named(self, env: Env) -> dict[str, Any]:
        """Keyword arguments with nodes replaced by their values."""
        return fx.node.map_arg(self.node.kwargs, lambda n: self._value(env, n)) if self.node.kwargs else {}  # type: ignore[return-value]

    def _value(self, env: Env, node: fx.Node) -> Any:
        """What the model would pass on contiguous is so here, where somebody may ask for a view of it."""
        value = env[self._slots[node]]
        return value.contiguous() if node in self._contiguous and isinstance(value, Tensor) else value


def _is_foreign(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether ``node`` calls a module or hook of the user's; others take tensors however they lie in memory."""
    return node.op == "call_module" and is_foreign(modules[str(node.target)])


def is_foreign(module: nn.Module) -> bool:
    """Whether ``module`` runs code of the user's."""
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    return layer_kind(module) is None and not type(module).__module__.startswith(_LENIENT)


def _output(arguments: _Arguments) -> Action:
    def act(env: Env) -> None:
        env[-1] = arguments.positional(env)[0]

    return act


def _call(node: fx.Node, arguments: _Arguments, modules: dict[str, nn.Module], out: int, *, aliased: bool) -> Action:
    if node.op == "call_method":
        name = _method_name(node, aliased)

        def method(env: Env) -> None:
            owner, *rest = arguments.positional(env)
            env[out] = getattr(owner, name)(*rest, **arguments.named(env))

        return method
    target: Any = modules[str(node.target)] if node.op == "call_module" else node.target

    def call(env: Env) -> None:
        env[out] = target(*arguments.positional(env), **arguments.named(env))

    return call


def _method_name(node: fx.Node, aliased: bool) -> str:
    """What packed spikes unpack to is channels last, of which there may be no view where the model had one."""
    sizes = all(isinstance(arg, (fx.Node, int, tuple, list, torch.Size)) for arg in node.args[1:])
    if node.target == "view" and sizes and not node.kwargs and not aliased:
        return "reshape"
    return "reshape_as" if node.target == "view_as" and not aliased else str(node.target)
