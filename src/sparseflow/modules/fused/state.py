"""The memory of neurons between a fused plan and the attributes where frameworks, monitors and users look for it."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseflow.frameworks import neuron_spec, read_state, state_table, write_state
from sparseflow.graph.steps import Block
from sparseflow.kernels.blocks.records import State
from sparseflow.kernels.blocks.spikes import as_tensor, channels_last
from sparseflow.neuron import Reset


class _Slot:
    """One state: its memory ``[N, pixels, channels]`` and the view ``[*lead, channels, *size]`` that the neuron holds.

    The memory is written in place from call to call unless somebody else has got hold of it.
    """

    def __init__(self, shape: tuple[int, ...], lead: int, device: torch.device):
        self.shape, self._lead = shape, lead
        self._allocate(device)

    def _allocate(self, device: torch.device) -> None:
        images, pixels = math.prod(self.shape[: self._lead]), math.prod(self.shape[self._lead + 1 :])
        self.memory = torch.empty(images, pixels, self.shape[self._lead], device=device)
        self.view = as_tensor(self.memory, self.shape, self._lead)
        self.storage = self.memory.untyped_storage()._cdata
        self.uses = torch._C._storage_Use_Count(self.storage)  # by the memory, the view, and whatever PyTorch keeps
        self.inference = self.memory.is_inference()

    def secure(self, held: bool, device: torch.device) -> None:
        """Get new memory unless only this slot, and the neuron where ``held``, refers to what there is."""
        references = sys.getrefcount(self.view) - 2  # this slot's and that of the question
        uses = torch._C._storage_Use_Count(self.storage)
        if references > held or uses > self.uses or self.inference != torch.is_inference_mode_enabled():
            self._allocate(device)

    def load(self, value: Any) -> bool:
        """Take over ``value``; false where it is no state of this shape, so that the neuron starts afresh."""
        if not isinstance(value, Tensor) or value.shape != self.shape:
            return False
        if value is not self.view:
            self.memory.copy_(channels_last(value.to(torch.float32), self._lead))
        return True


def _kind(value: Any) -> Hashable:
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else type(value)


class NeuronMemory:
    """Reads the state of one neuron before a block runs, and writes it back behind."""

    def __init__(self, module: nn.Module, block: Block, device: torch.device):
        spec = neuron_spec(module)
        assert spec is not None
        layout = block.layout
        self.module, self.names, self.device = module, spec.states, device
        self.restart = spec.reset_value if spec.reset is Reset.HARD else 0.0
        self._steps, self._lead, self._over_time = block.steps, len(block.state_lead), block.over_time
        self.shape = (*block.state_lead, layout.channels, *layout.size)
        self._slots = [_Slot(self.shape, self._lead, device) for _ in spec.states]
        self._wants_sequence = block.membrane is not None and block.over_time
        self.fixed = False

    def begin(self, given: tuple[Any, ...]) -> State:
        """The state that the neuron starts from: ``given`` by the graph, or what its attributes hold.

        While ``fixed``, the memory stays where it is, as :meth:`settle` left it.
        """
        if not self.fixed:
            self._secure(given)
        fresh, start = self._load(given)
        v, *syn = (slot.memory for slot in self._slots)
        sequence = v.new_empty(self._steps, *v.shape) if self._wants_sequence else None
        return State(v, syn[0] if syn else None, fresh, start, sequence)

    @property
    def is_plain(self) -> bool:
        """Whether a :class:`NeuronGroup` can hold it: one state, in a table of the module's, and no sequence of it."""
        return len(self._slots) == 1 and not self._wants_sequence and self.table is not None

    @property
    def table(self) -> dict[str, Any] | None:
        """Where the module keeps its first state."""
        return state_table(self.module, self.names[0])

    @property
    def slot(self) -> _Slot:
        """The first state, the membrane."""
        return self._slots[0]

    def settle(self, *, leads: bool) -> Hashable:
        """Make ready for a call whose kernels know their addresses; returns all that they depend on.

        That is where the memory lies, what kind of things the attributes hold, and, if the neuron ``leads`` (they say
        what it starts from), whether it starts afresh and from which membrane. Where it goes on, its attributes then
        hold this very memory.
        """
        for name, slot in zip(self.names, self._slots, strict=True):
            slot.secure(read_state(self.module, name) is slot.view, self.device)
        places = self.places()
        fresh, start = self._load(()) if leads else (True, 0.0)
        if fresh:
            return (places, start, *map(_kind, self.held()))
        self.end()
        return places

    def places(self) -> tuple[int, ...]:
        """Addresses of the memory, the membrane's first."""
        return tuple(slot.memory.data_ptr() for slot in self._slots)

    def held(self) -> tuple[Any, ...]:
        """What the neuron's attributes hold."""
        return tuple(read_state(self.module, name) for name in self.names)

    def put(self, values: tuple[Any, ...]) -> None:
        """Have the neuron's attributes hold what :meth:`held` returned."""
        for name, value in zip(self.names, values, strict=True):
            write_state(self.module, name, value)

    def wants_gradients(self) -> bool:
        """Whether what the neuron holds requires a gradient."""
        values = (read_state(self.module, name) for name in self.names)
        return any(isinstance(value, Tensor) and value.requires_grad for value in values)

    def release(self) -> None:
        """Leave contiguous copies in the neuron's attributes: forwards ask for views of what follows from its state."""
        for name, slot in zip(self.names, self._slots, strict=True):
            if read_state(self.module, name) is slot.view:
                write_state(self.module, name, slot.view.contiguous())

    def peek(self, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Copies of what :meth:`begin` would start from, in the order of the record."""
        return tuple(value.clone() if isinstance(value, Tensor) else value for value in self._values(given))

    def end(self) -> None:
        """Leave the last state in the neuron's attributes."""
        for name, slot in zip(self.names, self._slots, strict=True):
            write_state(self.module, name, slot.view)

    def membrane_sequence(self, state: State) -> Tensor:
        """The membrane of every step as the graph knows it: ``[T, *lead, channels, *size]``, or that of one step."""
        if not self._over_time:
            return self._slots[0].view
        assert state.v_seq is not None
        return as_tensor(state.v_seq.flatten(0, 1), (self._steps, *self.shape), self._lead + 1)

    def _secure(self, given: tuple[Any, ...]) -> None:
        replaced = self._values(given) if given else (None,) * len(self.names)
        for name, slot, value in zip(self.names, self._slots, replaced, strict=True):
            held = read_state(self.module, name) is slot.view
            if held and given:  # it may be the very same tensor; another thread must not find nothing there meanwhile
                write_state(self.module, name, value)
            slot.secure(held and not given, self.device)

    def _load(self, given: tuple[Any, ...]) -> tuple[bool, float]:
        """Bring the state into the memory; whether there is none, and the membrane that such a neuron starts from."""
        values = self._values(given)
        known = [slot.load(value) for slot, value in zip(self._slots, values, strict=True)]
        start = values[0] if isinstance(values[0], float) else self.restart
        if any(known):
            self._fill_in(known, start)
        return not any(known), float(start)

    def _values(self, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """States are passed and returned with the membrane last; the record has it first."""
        return (given[-1], *given[:-1]) if given else self.held()

    def _fill_in(self, known: list[bool], start: float) -> None:
        """Where one of two states was there, the other starts afresh by itself."""
        for i, slot in enumerate(self._slots):
            if not known[i]:
                slot.memory.fill_(start if i == 0 else 0.0)


class NeuronGroup:
    """The memories of several neurons that begin and end together, as :meth:`NeuronMemory.begin` left them.

    Before a call the caches hold weights, not Python's objects, and what is touched is what it costs: the same question
    is asked of all neurons at once. It knows the two cases that calls repeat: a neuron goes on from this very memory,
    or starts afresh from a number.
    """

    def __init__(self, memories: Sequence[NeuronMemory]):
        slots = [memory.slot for memory in memories]
        self._tables: list[Any] = [memory.table for memory in memories]
        self._names = [memory.names[0] for memory in memories]
        self._views = [slot.view for slot in slots]
        self._storages = [slot.storage for slot in slots]
        self._uses = [slot.uses for slot in slots]
        self._inference = slots[0].inference if slots else False
        self._starts: list[float | None] = []
        self._held: list[Any] = []
        self.states = [State(slot.memory) for slot in slots]

    def begin(self) -> bool | None:
        """Have all neurons hold their memory, where their state will be.

        Returns whether :attr:`states` are others than at the last call; ``None``, and nothing has happened, if a neuron
        holds anything else or somebody else its memory.
        """
        held = list(map(dict.get, self._tables, self._names))
        starts = [None if value is view else value for value, view in zip(held, self._views, strict=True)]
        # A neuron that holds its memory refers to it, and so does the list of what they hold.
        alone = [_ALONE + 2 * (start is None) for start in starts]
        if list(map(sys.getrefcount, self._views)) != alone or self._inference != torch.is_inference_mode_enabled():
            return None
        if any(map(operator.gt, map(torch._C._storage_Use_Count, self._storages), self._uses)):
            return None
        changed = starts != self._starts
        if changed and not self._set(starts):
            return None
        for table, name, view in zip(self._tables, self._names, self._views, strict=True):
            table[name] = view
        self._held = held
        return changed

    def end(self, ran: int) -> None:
        """The first ``ran`` neurons ran; have the others hold what they held before."""
        for i in range(ran, len(self._held)):
            self._tables[i][self._names[i]] = self._held[i]
        self._held = []

    def _set(self, starts: list[Any]) -> bool:
        if any(start is not None and type(start) is not float for start in starts):
            return False
        for state, start in zip(self.states, starts, strict=True):
            state.fresh, state.start = start is not None, start or 0.0
        self._starts = starts
        return True


def _references() -> int:
    """What ``sys.getrefcount`` counts through ``map`` for an element of a list that one other place refers to."""
    elsewhere = [object()]
    return next(map(sys.getrefcount, elsewhere[:]))


_ALONE = _references()
