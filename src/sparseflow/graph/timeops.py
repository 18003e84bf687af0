"""Operations over all time steps at once: what a step-by-step call becomes when T steps are computed together.

A *sequence* is ``[T, N, ...]``: the values that a step-by-step forward had one after another. *Flat* is the same
memory as ``[T * N, ...]``, for operations that treat every sample on its own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.fx.node import has_side_effect
from torch.utils._pytree import tree_map

from sparseflow.frameworks import spikingjelly

Form = Literal["flat", "seq", "either"]


@has_side_effect
def neuron_sequence(module: nn.Module, x_seq: torch.Tensor, *states: Any) -> Any:
    """Call ``module`` once a time step, in order, as the forward did that this replaces.

    Whatever the calls leave in the module's attributes is what the forward's own calls would have left.

    Args:
        module: a neuron in single-step mode. In a graph this argument is a ``get_attr`` node of the module.
        x_seq: input ``[T, N, ...]``. Stride 0 in the first dimension says that the input is the same at every step.
        *states: initial states where the forward passes them; from the second step on they are the last
            ``len(states)`` outputs of the step before. None where the module keeps its state itself.

    Returns:
        The output over time ``[T, N, ...]``, or a tuple of them in the module's own order, e.g. ``(spk, mem)``.

    Example:
        >>> class Leaky(nn.Module):
        ...     def forward(self, x, mem):
        ...         mem = 0.5 * mem + x
        ...         return (mem > 1).to(x), mem
        >>> spk, mem = neuron_sequence(Leaky(), torch.ones(3, 1), torch.zeros(1))
        >>> spk.tolist(), mem.tolist()
        ([[0.0], [1.0], [1.0]], [[1.0], [1.5], [1.75]])
    """
    outputs = []
    for x in x_seq.unbind(0):
        output = module(x, *states)
        outputs.append(output)
        states = _last(output, len(states))
    return tree_map(lambda *values: torch.stack(values), *outputs)


def _last(output: Any, count: int) -> tuple[Any, ...]:
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    return tuple(outputs[len(outputs) - count :])


@dataclasses.dataclass(frozen=True, eq=False)
class Operand:
    """What a step's operation is applied to.

    Attributes:
        shape: of the value at one step; ``None`` where it is no tensor.
        varies: whether it is another value at every step, so that all of them are a sequence.
        key: whatever the caller knows the operand by.
        integer: whether it is an integer: what a size may be, and a whole shape is not.
    """

    shape: tuple[int, ...] | None
    varies: bool
    key: Any
    integer: bool = False


@dataclasses.dataclass(frozen=True)
class StepCall:
    """One operation as it is done at every step, with an :class:`Operand` for every node among its arguments.

    ``shape`` is that of the result at one step, ``steps`` is T.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]
    steps: int

    @property
    def operands(self) -> list[Operand]:
        """All operands, in the order of appearance."""
        return list(_operands((self.args, self.kwargs)))

    @property
    def varying(self) -> list[tuple[int, ...]]:
        """Shapes of the operands that vary over time."""
        return [operand.shape or () for operand in self.operands if operand.varies]

    @property
    def constant(self) -> list[tuple[int, ...]]:
        """Shapes of the tensors that are the same at every step."""
        return [operand.shape for operand in self.operands if not operand.varies and operand.shape is not None]

    @property
    def first_only(self) -> bool:
        """Whether the first argument, and nothing else, varies over time."""
        return len(self.varying) == 1 and bool(self.args) and isinstance(self.args[0], Operand) and self.args[0].varies

    def option(self, name: str, position: int, default: Any = None) -> Any:
        """Argument ``name``, also when it was passed by position."""
        return self.kwargs.get(name, self.args[position] if len(self.args) > position else default)

    def replace(self, name: str, position: int, value: Any) -> StepCall:
        """The same call with another value for argument ``name``."""
        if len(self.args) > position:
            args = (*self.args[:position], value, *self.args[position + 1 :])
            return dataclasses.replace(self, args=args)
        return dataclasses.replace(self, kwargs={**self.kwargs, name: value})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to do a step's operation for all steps at once.

    Attributes:
        form: what the varying operands have to be, and what the result is: flat, sequences, or either of them.
        args, kwargs: arguments, with the operands still in them.
        method: name of a tensor method to call instead of the step's own operation.
    """

    form: Form
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    method: str | None = None

    @property
    def operands(self) -> list[Operand]:
        """All operands, in the order of appearance."""
        return list(_operands((self.args, self.kwargs)))


Rule = Callable[[StepCall], Recipe | None]


def function_recipe(call: StepCall) -> Recipe | None:
    """How to do a function, operator or tensor method for all steps at once; ``None`` where that is not known.

    Example:
        >>> x = Operand((2, 8), True, "x")
        >>> function_recipe(StepCall("relu", (x,), {}, (2, 8), steps=4)).form
        'either'
        >>> function_recipe(StepCall("softmax", (x,), {"dim": 0}, (2, 8), steps=4)).kwargs  # not over T
        {'dim': 1}
        >>> function_recipe(StepCall("median", (x,), {}, (), steps=4)) is None
        True
    """
    rule = _FUNCTIONS.get(call.name)
    return rule(call) if rule is not None and call.varying else None


def is_known_function(name: str) -> bool:
    """Whether :func:`function_recipe` knows an operation called ``name``, which then has no effects.

    Example:
        >>> is_known_function("max_pool2d"), is_known_function("fft")
        (True, False)
    """
    return name in _FUNCTIONS


def module_recipe(module: nn.Module, call: StepCall) -> Recipe | None:
    """How to call a stateless layer for all steps at once; ``None`` where it cannot be.

    Batch norm and dropout only in eval mode, and no layer whose ``forward`` is not that of torch or SpikingJelly.

    Example:
        >>> call = StepCall("", (Operand((2, 8), True, "x"),), {}, (2, 8), steps=4)
        >>> module_recipe(nn.Linear(8, 8), call).form
        'flat'
        >>> module_recipe(nn.BatchNorm1d(8).train(), call) is None
        True
    """
    rank = sample_rank(module)
    if rank is None or not call.first_only or len(call.operands) > 1:
        return None
    return _per_sample(rank)(call)


def sample_rank(module: nn.Module) -> int | None:
    """Rank of a batch of samples of a stateless layer, 0 for any; ``None`` when it is not known to be one.

    Example:
        >>> sample_rank(nn.Conv2d(1, 1, 3)), sample_rank(nn.ReLU()), sample_rank(nn.LSTM(1, 1))
        (4, 0, None)
    """
    if "forward" in module.__dict__ or getattr(module, "step_mode", "s") != "s":
        return None
    base = next((cls for cls in type(module).__mro__ if cls in _MODULES), None)
    if base is None:
        return _wrapper_rank(module)
    return _MODULES[base](module) if _keeps_forward(module, base) else None


def _wrapper_rank(module: nn.Module) -> int | None:
    if spikingjelly.is_layer(module, frozenset({"VotingLayer"})):
        return 2
    return 0 if spikingjelly.is_layer(module, frozenset({"Dropout", "Dropout2d"})) and not module.training else None


def _keeps_forward(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether ``module`` runs the forward of ``base``, of SpikingJelly's wrapper, or of our own swapped layer."""
    cls = getattr(type(module), "_sparseflow_original", type(module))
    wrapper = spikingjelly.layer_class(base.__name__)
    return cls.forward is base.forward or (wrapper is not None and cls.forward is wrapper.forward)


def _operands(value: Any) -> Iterator[Operand]:
    if isinstance(value, Operand):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(_operands, value.values()))
    elif isinstance(value, (tuple, list)):
        yield from itertools.chain.from_iterable(map(_operands, value))
    elif isinstance(value, slice):
        yield from _operands((value.start, value.stop, value.step))


def _elementwise(call: StepCall) -> Recipe | None:
    """Broadcasting aligns the last dimensions, so the steps must have the rank of the result."""
    rank = len(call.shape)
    if any(len(shape) != rank for shape in call.varying) or any(len(shape) > rank for shape in call.constant):
        return None
    flat = rank > 0 and all(shape[0] == call.shape[0] for shape in call.varying)
    flat = flat and all(len(shape) < rank for shape in call.constant)
    return Recipe("either" if flat else "seq", call.args, call.kwargs)


def _dropout(call: StepCall) -> Recipe | None:
    active = call.option("training", 2, True) and call.option("p", 1, 0.5) != 0
    return None if active else _elementwise(call)


def _per_sample(rank: int) -> Rule:
    """For operations on a batch of samples of the given rank (0 for any), or on one sample of one rank less."""

    def rule(call: StepCall) -> Recipe | None:
        if not call.first_only:
            return None
        actual = len(call.varying[0])
        if actual == rank or (rank <= 0 and actual >= 2 - rank):
            return Recipe("flat", call.args, call.kwargs)
        # Without a batch dimension the T steps are the batch.
        return Recipe("seq", call.args, call.kwargs) if actual == rank - 1 or rank == 0 else None

    return rule


def _batch_norm(call: StepCall) -> Recipe | None:
    return None if call.option("training", 5, False) else _per_sample(0)(call)


def _normalized(call: StepCall) -> Recipe | None:
    below_batch = len(call.option("normalized_shape", 1, ())) < len(call.varying[0])
    return _per_sample(0)(call) if below_batch else None


def _along(*names: str, first: int = 1, default: int | None = None) -> Rule:
    """For operations along given dimensions, of which a sequence has one more at the front."""

    def rule(call: StepCall) -> Recipe | None:
        for position, name in enumerate(names, first):
            dims = call.option(name, position, default)
            if not _is_dims(dims):
                return None
            call = call.replace(name, position, _shifted(dims))
        return Recipe("seq", call.args, call.kwargs) if _same_rank(call) else None

    return rule


def _same_rank(call: StepCall) -> bool:
    return not call.constant and len({len(shape) for shape in call.varying}) == 1


def _is_dims(dims: Any) -> bool:
    if isinstance(dims, (tuple, list)):
        return bool(dims) and all(type(dim) is int for dim in dims)
    return type(dims) is int


def _shifted(dims: Any) -> Any:
    if isinstance(dims, (tuple, list)):
        return tuple(_shifted(dim) for dim in dims)
    return dims + 1 if dims >= 0 else dims


def _permute(call: StepCall) -> Recipe | None:
    dims = call.option("dims", 1) if _is_sequence(call.option("dims", 1)) else call.args[1:]
    if not call.first_only or not _is_dims(dims) or call.kwargs.keys() - {"dims"}:
        return None
    rank = len(dims)
    return Recipe("seq", (call.args[0], 0, *(dim % rank + 1 for dim in dims)), {}, method="permute")


def _flatten(call: StepCall) -> Recipe | None:
    """Everything behind the batch dimension: the common case, and then every sample is on its own."""
    if call.option("start_dim", 1, 0) == 1 and call.option("end_dim", 2, -1) in (-1, len(call.varying[0]) - 1):
        return Recipe("flat", (call.args[0], 1), {}, method="flatten")
    call = call.replace("start_dim", 1, call.option("start_dim", 1, 0))
    return _along("start_dim", "end_dim", default=-1)(call)


def _reshape(call: StepCall) -> Recipe | None:
    if not call.first_only or call.kwargs:
        return None
    sizes = _sizes_of(call)
    if sizes is None:
        return None
    shape = call.varying[0]
    if len(sizes) == 2 and len(shape) >= 2 and call.shape[0] == shape[0]:  # view(N, -1)
        return Recipe("flat", (call.args[0], 1), {}, method="flatten")
    return Recipe("seq", (call.args[0], call.steps, *sizes), {}, method="reshape")


def _sizes_of(call: StepCall) -> tuple[int | Operand, ...] | None:
    """The sizes behind the first argument; ``None`` where one is no integer, such as another tensor's whole shape."""
    sizes = tuple(call.args[1] if _is_sequence(call.args[1]) else call.args[1:])
    known = all(size.integer if isinstance(size, Operand) else isinstance(size, int) for size in sizes)
    return sizes if known else None


def _sizes(keep: int) -> Rule:
    """For methods that take one number for each dimension, of which ``keep`` leaves a dimension as it is."""

    def rule(call: StepCall) -> Recipe | None:
        if not call.first_only or call.kwargs:
            return None
        sizes = _sizes_of(call)
        if sizes is None or len(sizes) != len(call.varying[0]):
            return None
        return Recipe("seq", (call.args[0], keep, *sizes), {})

    return rule


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def _index(call: StepCall) -> Recipe | None:
    """Basic indexing: nothing that gathers by a tensor."""
    if not call.first_only or not call.varying[0]:
        return None
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if any(not (item is None or item is Ellipsis or type(item) in (int, slice)) for item in index):
        return None
    return Recipe("seq", (call.args[0], (slice(None), *index)), {})


def _matmul(call: StepCall) -> Recipe | None:
    rank = len(call.shape)
    matrices = rank >= 2 and all(len(shape) == rank for shape in call.varying)
    return Recipe("seq", call.args, call.kwargs) if matrices and all(len(s) == 2 for s in call.constant) else None


def _rules(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_FUNCTIONS: dict[str, Rule] = {
    **_rules(
        _elementwise,
        """add sub subtract mul multiply div divide true_divide floor_divide rsub neg negative abs absolute sign pow
        square sqrt rsqrt reciprocal exp log log1p expm1 sin cos tanh sigmoid relu relu6 leaky_relu elu selu celu gelu
        silu mish softplus softsign hardtanh hardswish hardsigmoid logsigmoid clamp clip clamp_min clamp_max maximum
        minimum floor ceil round trunc heaviside erf where masked_fill gt ge lt le eq ne and or xor logical_and
        logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor invert float half double bfloat16 long
        int bool to type_as contiguous clone detach lerp addcmul addcdiv zeros_like ones_like""",
    ),
    **_rules(_dropout, "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout"),
    **_rules(_per_sample(3), "conv1d conv_transpose1d max_pool1d avg_pool1d"),
    **_rules(_per_sample(3), "adaptive_avg_pool1d adaptive_max_pool1d"),
    **_rules(_per_sample(4), "conv2d conv_transpose2d max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d"),
    **_rules(_per_sample(5), "conv3d conv_transpose3d max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d"),
    **_rules(_per_sample(0), "linear"),
    **_rules(_per_sample(4), "pixel_shuffle pixel_unshuffle"),
    "batch_norm": _batch_norm,
    "layer_norm": _normalized,
    **_rules(_along("dim"), "sum mean amax amin softmax log_softmax argmax argmin unsqueeze squeeze unflatten"),
    **_rules(_along("dim", default=0), "cat concat concatenate stack"),
    **_rules(_along("dim0", "dim1"), "transpose swapaxes swapdims"),
    "permute": _permute,
    "flatten": _flatten,
    **_rules(_reshape, "view reshape"),
    "expand": _sizes(-1),
    "repeat": _sizes(1),
    "getitem": _index,
    "matmul": _matmul,
}


def _any(_module: nn.Module) -> int:
    return 0


def _rank(rank: int) -> Callable[[nn.Module], int | None]:
    return lambda _module: rank


def _max_pool(rank: int) -> Callable[[Any], int | None]:
    return lambda module: None if module.return_indices else rank


def _norm(module: Any) -> int | None:
    """With running statistics in eval mode; otherwise the batch is part of the result."""
    return None if module.training or module.running_mean is None else 0


def _inactive(module: Any) -> int | None:
    return None if module.training and module.p > 0 else 0


def _flat_module(module: Any) -> int | None:
    return 0 if module.start_dim == 1 and module.end_dim == -1 else None


def _layer_norm(module: Any) -> int:
    """Any rank that leaves the batch dimension out of the mean."""
    return 1 - len(module.normalized_shape)


_DIMENSIONS = (1, 2, 3)
_MODULES: dict[type[nn.Module], Callable[[Any], int | None]] = {
    **dict.fromkeys(
        [
            *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
            *(nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Threshold),
            *(nn.Identity, nn.Linear, nn.GroupNorm),
        ],
        _any,
    ),
    **dict.fromkeys([nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout], _inactive),
    **dict.fromkeys([nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm], _norm),
    **{getattr(nn, f"Conv{d}d"): _rank(d + 2) for d in _DIMENSIONS},
    **{getattr(nn, f"ConvTranspose{d}d"): _rank(d + 2) for d in _DIMENSIONS},
    **{getattr(nn, f"AvgPool{d}d"): _rank(d + 2) for d in _DIMENSIONS},
    **{getattr(nn, f"AdaptiveAvgPool{d}d"): _rank(d + 2) for d in _DIMENSIONS},
    **{getattr(nn, f"MaxPool{d}d"): _max_pool(d + 2) for d in _DIMENSIONS},
    **{getattr(nn, f"AdaptiveMaxPool{d}d"): _max_pool(d + 2) for d in _DIMENSIONS},
    **{getattr(nn, f"ZeroPad{d}d"): _rank(d + 2) for d in _DIMENSIONS},
    nn.LayerNorm: _layer_norm,
    nn.Flatten: _flat_module,
}
