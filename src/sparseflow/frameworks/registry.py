"""Which modules emit spikes: the users' own neurons first, then the frameworks' adapters."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparseflow.frameworks import snntorch, spikingjelly
from sparseflow.neuron import NeuronSpec
from sparseflow.plan import Provenance

_COMPARABLE = frozenset({bool, int, float, str, type(None), type, types.FunctionType, types.MethodType})
_registered: dict[type[nn.Module], NeuronSpec] = {}
_watched: dict[type[nn.Module], Callable[[dict[str, Any]], tuple[Any, ...]]] = {}  # by class, for fingerprint()


def register_neuron(cls: type[nn.Module], spec: NeuronSpec | None = None, *, overwrite: bool = False) -> None:
    """Tell sparseflow that modules of class ``cls`` emit spikes.

    The match is exact: a subclass of ``cls`` is another neuron and has to be registered itself. What the neuron
    returns is not changed by this; a wrong record can cost time, never a wrong result.

    Args:
        cls: the neuron's class; its forward returns the spikes, or a tuple that holds them.
        spec: what it emits; by default one {0, 1} tensor, or the first element of a tuple.
        overwrite: allow a second registration of the same class.

    Raises:
        TypeError: ``cls`` is not a subclass of ``torch.nn.Module``, or ``spec`` is not a :class:`NeuronSpec`.
        ValueError: ``cls`` is registered already and ``overwrite`` is false.

    Example:
        >>> import torch
        >>> class Step(torch.nn.Module):
        ...     def forward(self, x):
        ...         return (x > 1).to(x)
        >>> register_neuron(Step)
        >>> neuron_spec(Step()).emits.name
        'BINARY'
        >>> unregister_neuron(Step)
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_neuron takes the neuron's class, a subclass of torch.nn.Module; got {cls!r}")
    if spec is not None and not isinstance(spec, NeuronSpec):
        raise TypeError(f"spec must be a NeuronSpec, got {type(spec).__name__}")
    if cls in _registered and not overwrite:
        raise ValueError(f"{cls.__qualname__} is registered already; pass overwrite=True to replace its record")
    _registered[cls] = spec if spec is not None else NeuronSpec()


def unregister_neuron(cls: type[nn.Module]) -> None:
    """Undo :func:`register_neuron`. Raises ``ValueError`` when ``cls`` is not registered."""
    if _registered.pop(cls, None) is None:
        raise ValueError(f"{getattr(cls, '__qualname__', cls)!s} is not registered")


def neuron_spec(module: nn.Module) -> NeuronSpec | None:
    """The record of ``module`` if it is a neuron known to emit spikes, else ``None``.

    Exact types only. A SpikingJelly surrogate with ``spiking=False``, the ``NonSpiking`` nodes and LIAF have none. A
    neuron one of whose methods is replaced on the instance is opaque.
    """
    if type(module) in _registered:
        spec = _registered[type(module)]
    else:
        spec = spikingjelly.neuron_spec(module) or snntorch.neuron_spec(module)
    if spec is not None and spec.described and _has_own_methods(module):
        return dataclasses.replace(spec, charge=None)
    return spec


def live_spec(module: nn.Module) -> NeuronSpec | None:
    """:func:`neuron_spec` with trained constants as the tensors that gradients flow into.

    >>> live_spec(nn.ReLU()) is None
    True
    """
    spec = neuron_spec(module)
    if spec is None or not spec.described or type(module) in _registered:
        return spec
    adapter = snntorch if snntorch.is_spiking_neuron(module) else spikingjelly
    return dataclasses.replace(spec, **adapter.live_constants(module))


def fire(module: nn.Module, spec: NeuronSpec, membrane: torch.Tensor) -> torch.Tensor:
    """Spikes of a described neuron whose membrane is ``membrane``, 0 or 1, with its surrogate gradient.

    A neuron that the user registered has no surrogate that could be known, and gives no gradient.
    """
    if type(module) in _registered:
        reached = membrane >= spec.threshold if spec.comparator == ">=" else membrane > spec.threshold
        return reached.to(membrane.dtype)
    adapter = snntorch if snntorch.is_spiking_neuron(module) else spikingjelly
    return adapter.fire(module, membrane)


def _has_own_methods(module: nn.Module) -> bool:
    return any(callable(getattr(type(module), name, None)) for name in module.__dict__)


def fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """What has to stay as it is for a plan made from ``neuron_spec(module)`` to hold; compare with ``==``.

    Numbers and switches by value; functions and tensors by identity, tensors also by their memory and the number of
    writes into them (``tensor.data.add_()`` is not counted by torch and not seen). Takes 1 to 3 us for a described
    neuron, reads no tensor, and holds on to the tensors.

    >>> neuron = nn.ReLU()
    >>> fingerprint(neuron) == fingerprint(neuron)
    True
    """
    kind = type(module)
    attributes = module.__dict__
    if kind in _registered:
        spec = _registered[kind]
        values: tuple[Any, ...] = (spec.threshold, spec.decay, *spec.input_gains, spec.synapse_decay)
    else:
        spec = None
        watched = _watched.get(kind)
        if watched is None:
            watched = _watched[kind] = spikingjelly.watched(kind) or snntorch.watched(kind) or _unwatched
        values = watched(attributes)
    # A bound method is equal to another of the very same object; tensors would compare their elements.
    try:
        tokens = [v if type(v) in _COMPARABLE else (v.data_ptr, v.data_ptr(), v._version) for v in values]
    except (AttributeError, RuntimeError):
        tokens = [v if type(v) in _COMPARABLE else _token(v) for v in values]
    return kind, spec, "forward" in attributes, *tokens


def _unwatched(_: dict[str, Any]) -> tuple[()]:
    return ()


def _token(value: Any) -> Any:
    """Something that is equal as long as ``value`` is the same, and can be compared whatever it is."""
    if not isinstance(value, torch.Tensor):
        return value if callable(value) else (type(value), id(value))
    try:
        return value.data_ptr, value.data_ptr(), value._version
    except RuntimeError:  # made in inference mode, which counts no writes, or without memory (functional transforms)
        return value.data_ptr, None, -1


def emitted(module: nn.Module) -> Provenance | None:
    """Zeros of the output of a neuron or spike encoder; ``None`` where ``module`` is neither."""
    spec = neuron_spec(module)
    if spec is not None:
        return spec.emits
    return Provenance.BINARY if spikingjelly.encodes_spikes(module) else None


def is_unknown_neuron(module: nn.Module) -> bool:
    """Whether ``module`` looks like a neuron (framework base class, surrogate) that no record covers."""
    looks = snntorch.is_spiking_neuron(module) or (
        spikingjelly.is_memory_module(module) and hasattr(module, "surrogate_function")
    )
    return looks and neuron_spec(module) is None


def is_container(module: nn.Module) -> bool:
    """Whether ``module`` only applies its children over time (``SeqToANNContainer``...); a tracer goes into it."""
    return isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) or spikingjelly.is_container(module)


def is_time_leaf(module: nn.Module) -> bool:
    """Whether a tracer must keep ``module`` whole because its forward carries state or switches over time.

    True for every registered neuron, every snnTorch neuron, and SpikingJelly's stateful modules and wrappers; a
    step module that only groups other layers is traced into.
    """
    if is_container(module):
        return False
    if neuron_spec(module) is not None or snntorch.is_spiking_neuron(module):
        return True
    if spikingjelly.is_memory_module(module) or spikingjelly.encodes_spikes(module):
        return True
    return spikingjelly.is_step_module(module) and next(module.children(), None) is None


def steps_over_time(module: nn.Module) -> bool:
    """Whether one call of a neuron takes a whole sequence ``[T, N, *]``; false for the users' own neurons."""
    return spikingjelly.steps_over_time(module) or snntorch.steps_over_time(module)


def stores_sequence(module: nn.Module) -> bool:
    """Whether a neuron keeps the membrane of every time step, as SpikingJelly's do with ``store_v_seq=True``."""
    return spikingjelly.stores_sequence(module)


def state_methods(module: nn.Module) -> tuple[str, ...]:
    """Names of the methods by which a forward may change the memory of ``module``."""
    names: tuple[str, ...] = ()
    if snntorch.is_spiking_neuron(module):
        names += snntorch.STATE_METHODS
    if spikingjelly.is_memory_module(module):
        names += spikingjelly.STATE_METHODS
    return tuple(name for name in names if hasattr(type(module), name))


def state_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that ``module`` holds as its memory now, by attribute name."""
    spec = neuron_spec(module)
    names = spec.states if spec is not None else tuple(module.__dict__.get("_memories", ()))
    values = {name: getattr(module, name, None) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def reset_state(module: nn.Module) -> None:
    """Put the memory of one neuron back to what it was before the first step; other modules are left alone.

    Raises:
        TypeError: a registered neuron keeps state and has no ``reset()``.
    """
    if snntorch.is_spiking_neuron(module):
        reset: object = getattr(module, "reset_mem", None)
    elif spikingjelly.is_memory_module(module):
        reset = getattr(module, "reset", None)
    elif type(module) in _registered:
        reset = getattr(module, "reset", None)
        if not callable(reset) and _registered[type(module)].states:
            raise TypeError(f"{type(module).__name__} keeps state and has no reset(); add one that clears it")
    else:
        return
    if callable(reset):
        reset()
