"""Which modules emit spikes: the users' own neurons first, then the frameworks' adapters."""

from __future__ import annotations

import torch
from torch import nn

from sparseflow.frameworks import snntorch, spikingjelly
from sparseflow.frameworks.spec import NeuronSpec
from sparseflow.plan import Provenance

_registered: dict[type[nn.Module], NeuronSpec] = {}


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

    Exact types only. A SpikingJelly surrogate with ``spiking=False``, the ``NonSpiking`` nodes and LIAF have none.
    """
    if type(module) in _registered:
        return _registered[type(module)]
    return spikingjelly.neuron_spec(module) or snntorch.neuron_spec(module)


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
