"""Following spikes through one run of a model: every tensor carries a label, every layer notes what feeds it."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from sparseflow.frameworks import emitted, is_unknown_neuron, neuron_spec
from sparseflow.graph.eligibility import candidates
from sparseflow.graph.provenance import UNKNOWN, ZEROS, Call, Label, is_in_place, op_name, propagate
from sparseflow.plan import Provenance

_SPIKE_INPUT_DENSITY = 0.5


@dataclasses.dataclass
class Feed:
    """What fed one layer, joined over its calls."""

    label: Label
    calls: int = 1

    def join(self, label: Label) -> None:
        """Take one more call into account."""
        self.calls += 1
        if label.provenance < self.label.provenance or self.label == ZEROS:
            self.label = label


class Recorder:
    """Labels of the tensors of one run, and the layers they reached.

    ``feeds`` maps the qualified name of every convolution and linear layer that ran to what fed it, in the order of
    first execution.
    """

    def __init__(self, model: nn.Module) -> None:
        self.feeds: dict[str, Feed] = {}
        self._model = model
        self._labels: Any = WeakTensorKeyDictionary()

    def label_of(self, tensor: torch.Tensor) -> Label:
        """Label of ``tensor``; dense when it was made by no operation that was seen."""
        return self._labels.get(tensor, UNKNOWN)

    def label_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Label the example itself: event streams and pre-encoded spikes are told by their values."""
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._labels[tensor] = _input_label(tensor)

    def observe(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Label what ``func`` returned, and what it wrote into."""
        in_place = is_in_place(func) and args and isinstance(args[0], torch.Tensor)
        outputs = _tensors(result)
        if not outputs and not in_place:
            return
        label = propagate(Call(op_name(func), args, kwargs, self.label_of))
        for tensor in outputs:
            self._labels[tensor] = label
        if in_place:
            self._overwrite(args[0], label)

    def _overwrite(self, tensor: torch.Tensor, label: Label) -> None:
        self._labels[tensor] = label
        base = tensor._base
        if base is not None and base in self._labels and label.provenance < self.label_of(base).provenance:
            self._labels[base] = label

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on neurons, encoders and layers for as long as the context lasts; deaf to other threads' calls."""
        layers = candidates(self._model)
        handles = []
        for name, module in self._model.named_modules():
            if name in layers:
                handles.append(module.register_forward_pre_hook(_own_thread(self._note_feed(name)), with_kwargs=True))
            provenance = emitted(module)
            if provenance is not None:
                spec = neuron_spec(module)
                index = spec.output_index if spec is not None else 0
                mark = self._mark_spikes(Label(provenance, (name,)), index)
                handles.append(module.register_forward_hook(_own_thread(mark)))
            elif is_unknown_neuron(module):
                note = f"{name} ({type(module).__name__}, not a registered neuron)"
                handles.append(module.register_forward_hook(_own_thread(self._name_output(note))))
            elif next(module.children(), None) is None:
                handles.append(module.register_forward_hook(_own_thread(self._name_output(name))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note_feed(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            operand = args[0] if args else next(iter(kwargs.values()), None)
            label = self.label_of(operand) if isinstance(operand, torch.Tensor) else UNKNOWN
            if name in self.feeds:
                self.feeds[name].join(label)
            else:
                self.feeds[name] = Feed(label)

        return hook

    def _mark_spikes(self, label: Label, index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            spikes = output[index] if isinstance(output, (tuple, list)) else output
            if isinstance(spikes, torch.Tensor):
                self._labels[spikes] = label

        return hook

    def _name_output(self, source: str) -> Callable[..., None]:
        """Name the module, not the operation in it, as the source of a dense tensor."""

        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            inputs = {self.label_of(leaf) for leaf in _tensors(args)}
            for leaf in _tensors(output):
                label = self.label_of(leaf)
                if label not in inputs and label.provenance is Provenance.DENSE:
                    self._labels[leaf] = Label(Provenance.DENSE, (source,))

        return hook


class LabelMode(TorchFunctionMode):
    """While active, every torch function that runs is reported to a :class:`Recorder`."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._recorder.observe(func, args, kwargs, result)
        return result


def _own_thread(hook: Callable[..., None]) -> Callable[..., None]:
    """``hook`` for calls from this thread only."""
    owner = threading.get_ident()

    def guarded(*args: Any) -> None:
        if threading.get_ident() == owner:
            hook(*args)

    return guarded


def _tensors(value: Any) -> list[torch.Tensor]:
    """Tensors in ``value``; not a tracer's stand-ins for them, which pass ``isinstance`` but have no identity here."""
    items = value if issubclass(type(value), (tuple, list)) else (value,)
    return [item for item in items if issubclass(type(item), torch.Tensor)]


def _input_label(tensor: torch.Tensor) -> Label:
    """Spikes are told from images by what they are made of: few, non-negative whole numbers."""
    dense = Label(Provenance.DENSE, ("model input",))
    if tensor.numel() == 0 or tensor.is_complex() or tensor.is_sparse:
        return dense
    density = float(torch.count_nonzero(tensor)) / tensor.numel()
    counts = tensor.long()
    if not 0 < density < _SPIKE_INPUT_DENSITY or bool((tensor != counts).any()) or int(counts.min()) < 0:
        return dense
    provenance = Provenance.BINARY if int(counts.max()) == 1 else Provenance.INTEGER
    return Label(provenance, (f"model input (spikes, density {density:.3f})",))
