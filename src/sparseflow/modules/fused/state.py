"""The memory of neurons between a fused plan and the attributes where frameworks, monitors and users look for it."""

from __future__ import annotations

import math
import sys
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from sparseflow.frameworks import neuron_spec, read_state, write_state
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

    def secure(self, held: bool, device: torch.device) -> None:
        """Get new memory unless only this slot, and the neuron where ``held``, refers to what there is."""
        references = sys.getrefcount(self.view) - 2  # this slot's and that of the question
        storages = torch._C._storage_Use_Count(self.memory.untyped_storage()._cdata) - 3  # memory, view, question
        usable = self.memory.device == device and self.memory.is_inference() == torch.is_inference_mode_enabled()
        if references > held or storages > 0 or not usable:
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
