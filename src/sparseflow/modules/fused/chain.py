"""Blocks bound to the slots of a program, and runs of them that one native call executes.

What Python does between two blocks finds caches full of weights and pays for it: in a network at batch 1 as much as for
the blocks. A chain does all of it before and after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from sparseflow.dispatch.crossovers import RuntimeConfig
from sparseflow.kernels.blocks.records import State
from sparseflow.kernels.blocks.spikes import PackedSpikes

from .block import BlockRun
from .state import NeuronGroup

Env = list[Any]
Observer = Callable[[BlockRun, Any, Any, Any, Any], None]


@dataclasses.dataclass(frozen=True)
class Slots:
    """Where a block finds and leaves its values."""

    source: int
    out: int
    residual: int | None = None
    states: tuple[int, ...] = ()
    membrane: int | None = None


@dataclasses.dataclass
class Scrutiny:
    """Who looks at single blocks: observers, and the run that plans them."""

    observers: list[Observer]
    planning: RuntimeConfig | None = None

    def __bool__(self) -> bool:
        return self.planning is not None or bool(self.observers)


class BoundBlock:
    """A block at its place in a program. ``exactly``: its result has to be contiguous."""

    def __init__(self, run: BlockRun, slots: Slots, scrutiny: Scrutiny, *, exactly: bool):
        self.run, self.slots, self.scrutiny = run, slots, scrutiny
        self._exactly = exactly

    def __call__(self, env: Env) -> None:
        x, residual = env[self.slots.source], None if self.slots.residual is None else env[self.slots.residual]
        given = self.given(env)
        call = self._scrutinised if self.scrutiny else self.run
        self.leave(env, call(x, residual, given))

    def _scrutinised(self, x: Any, residual: Any, given: tuple[Any, ...]) -> Any:
        if self.scrutiny.planning is not None:
            if isinstance(x, PackedSpikes):
                self.run.plan(self.scrutiny.planning, x, residual)
            else:
                self.run.plan_entry(self.scrutiny.planning, x, residual)
        before = self.run.memory.peek(given) if self.run.memory is not None else ()
        result = self.run(x, residual, given)
        for observer in self.scrutiny.observers:
            observer(self.run, x, residual, before, result)
        return result

    def given(self, env: Env) -> tuple[Any, ...]:
        """The states that the graph passes to the neuron."""
        return tuple(env[slot] for slot in self.slots.states)

    def leave(self, env: Env, result: Any) -> None:
        """Put the result, and the membrane if somebody wants it, where they belong."""
        run = self.run
        env[self.slots.out] = result.contiguous() if self._exactly and isinstance(result, Tensor) else result
        if self.slots.membrane is not None and run.memory is not None and run.last_state is not None:
            env[self.slots.membrane] = run.memory.membrane_sequence(run.last_state)


class Chain:
    """Neighbouring blocks, run by one native call as far as they can be, else one by one.

    Once all of them have run in one call, the next one changes only what differs. ``private``: the slots that nobody
    else reads.
    """

    def __init__(self, blocks: list[BoundBlock], private: Collection[int]):
        self._blocks, self._scrutiny = blocks, blocks[0].scrutiny
        makers = {block.slots.out: i for i, block in enumerate(blocks)}
        self._sources = [makers.get(block.slots.source) for block in blocks]
        self._residuals = [None if (slot := block.slots.residual) is None else makers.get(slot) for block in blocks]
        self._native = blocks[0].run.ops.chain(len(blocks))  # type: ignore[attr-defined]
        self._linked: list[Any] = [None] * len(blocks)
        self._entered = [i for i in range(len(blocks)) if self._reads_from_outside(i)]
        self._left = [b for b in blocks if b.slots.out not in private or b.slots.membrane is not None]
        self._neurons = [i for i, block in enumerate(blocks) if block.run.memory is not None]
        self._settled: NeuronGroup | None = None

    def __call__(self, env: Env) -> None:
        if self._scrutiny:
            self.unsettle()
        first = self._run_settled(env) if self._settled is not None else 0
        while first < len(self._blocks):
            together = 0 if self._scrutiny else self._together(first)
            ran = self._run(env, first, together) if together else 0
            if ran == len(self._blocks):
                self._settle()
            if ran == 0:  # the first of them is not prepared, or has too many spikes
                self._blocks[first](env)
            first += max(1, ran)

    def unsettle(self) -> None:
        """What the blocks were prepared for may have changed."""
        self._settled = None

    def _reads_from_outside(self, i: int) -> bool:
        return self._sources[i] is None or (self._residuals[i] is None and self._blocks[i].slots.residual is not None)

    # ---- all blocks, as at the last call

    def _settle(self) -> None:
        memories = [memory for block in self._blocks if (memory := block.run.memory) is not None]
        if all(memory.is_plain for memory in memories):
            self._settled = NeuronGroup(memories)

    def _run_settled(self, env: Env) -> int:
        """Run as many blocks as are still for events; none if a neuron holds something unusual."""
        group = self._settled
        assert group is not None
        changed = group.begin()
        if changed is None:
            self.unsettle()
            return 0
        ran = 0
        try:
            if changed:
                for i, state in zip(self._neurons, group.states, strict=True):
                    self._linked[i].start_from(state)
            residuals = [self._residual(env, i, 0) for i in self._entered]  # dense ones have to outlive the call
            for i, residual in zip(self._entered, residuals, strict=True):
                self._linked[i].bind(self._source(env, i, 0), residual)
            ran = self._native.run(0, len(self._blocks))
        finally:  # neurons that did not run, for whatever reason, hold what they held
            group.end(sum(i < ran for i in self._neurons))
            if ran < len(self._blocks):
                self.unsettle()
        whole = ran == len(self._blocks)
        for i, block in enumerate(self._blocks[:ran]):
            block.run.note(self._native.seen(i))
        for block in self._left if whole else self._blocks[:ran]:
            block.leave(env, block.run.shaped(block.run.prepared.result))
        return ran

    # ---- as many as can run together

    def _together(self, first: int) -> int:
        """How many blocks from ``first`` on are prepared."""
        for i, block in enumerate(self._blocks[first:], first):
            prepared, most = block.run.prepared, block.run.most_spikes
            if most < 0:
                return i - first
            if self._linked[i] is not prepared:
                self._linked[i] = prepared
                self._native.link(i, prepared)
            self._native.limit(i, most)
        return len(self._blocks) - first

    def _run(self, env: Env, first: int, together: int) -> int:
        """Run blocks from ``first`` on; returns how many were for events."""
        states: list[State | None] = []
        residuals = []  # dense ones have to outlive the call
        for i in range(first, first + together):
            block = self._blocks[i]
            states.append(block.run.begin(block.given(env)))
            residuals.append(self._residual(env, i, first))
            self._linked[i].bind(self._source(env, i, first), residuals[-1])
            self._linked[i].start_from(states[-1])
        ran = self._native.run(first, together)
        for i, state in zip(range(first, first + ran), states, strict=False):
            block = self._blocks[i]
            block.run.note(self._native.seen(i))
            block.leave(env, block.run.end(state, self._linked[i].result))
        return ran

    def _source(self, env: Env, i: int, first: int) -> Any:
        """What block ``i`` reads: of a block that has not run yet, where its result will be."""
        maker = self._sources[i]
        return env[self._blocks[i].slots.source] if maker is None or maker < first else self._linked[maker].result

    def _residual(self, env: Env, i: int, first: int) -> Any:
        """The same of what it adds, flat."""
        maker, block = self._residuals[i], self._blocks[i]
        if maker is not None and maker >= first:
            return self._linked[maker].result
        return block.run.flat(None if block.slots.residual is None else env[block.slots.residual])
