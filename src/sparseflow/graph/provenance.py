"""What each operation does to the zeros of its input: the one propagation table.

The table is keyed by the name an operation has in torch (``torch.cat``, ``Tensor.view``, ``x += y`` and
``operator.add`` are ``cat``, ``view``, ``add`` and ``add``). What is not in it makes its result dense.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch

from sparseflow.plan import Provenance

_MAX_SOURCES = 3


@dataclasses.dataclass(frozen=True)
class Label:
    """Provenance of one tensor, and where its values come from.

    ``sources`` are the qualified names of neurons, layers or operations, in order of appearance; ``op`` joins them
    in :meth:`describe`.
    """

    provenance: Provenance
    sources: tuple[str, ...]
    op: str = ""

    def describe(self) -> str:
        """Short text for a report.

        Example:
            >>> Label(Provenance.INTEGER, ("layer1.0.sn2", "layer1.1.sn2"), "add").describe()
            'add(layer1.0.sn2, layer1.1.sn2)'
        """
        if not self.op:
            return ", ".join(self.sources)
        shown = ", ".join(self.sources[:_MAX_SOURCES])
        more = len(self.sources) - _MAX_SOURCES
        return f"{self.op}({shown}, and {more} more)" if more > 0 else f"{self.op}({shown})"


UNKNOWN = Label(Provenance.DENSE, ("a tensor made outside the traced operations",))


@dataclasses.dataclass(frozen=True)
class Call:
    """One executed operation: its name, arguments and the labels of tensors seen so far."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    label_of: Callable[[torch.Tensor], Label]

    @property
    def first(self) -> Any:
        """The operand the operation is applied to: a tensor, or a list of them for ``cat`` and ``stack``."""
        if self.args:
            return self.args[0]
        return next(iter(self.kwargs.values()), None)

    def option(self, name: str, position: int, default: Any = None) -> Any:
        """Argument ``name``, also when it was passed by position."""
        if name in self.kwargs:
            return self.kwargs[name]
        return self.args[position] if len(self.args) > position else default

    def labels(self, operands: Any) -> list[Label]:
        """Labels of the tensors in ``operands`` (nested lists and tuples)."""
        if isinstance(operands, torch.Tensor):
            return [self.label_of(operands)]
        if isinstance(operands, (list, tuple)):
            return [label for item in operands for label in self.labels(item)]
        return []

    @property
    def operands(self) -> list[Label]:
        """Labels of all tensor arguments."""
        return self.labels(self.args) + self.labels(tuple(self.kwargs.values()))


Rule = Callable[[Call], Provenance]


def propagate(call: Call) -> Label:
    """Label of the result of ``call``."""
    if call.name in _ORIGINS:
        return _ORIGINS[call.name]
    rule = _TABLE.get(call.name)
    if rule is None:
        return Label(Provenance.DENSE, (call.name,))
    provenance = rule(call)
    labels = _contributors(call)
    if len(labels) == 1 and provenance is labels[0].provenance:
        return labels[0]
    sources = tuple(dict.fromkeys(source for label in labels for source in label.sources))
    return Label(provenance, sources or (call.name,), call.name if sources else "")


def op_name(func: Any) -> str:
    """Name of a torch function, method or property without operator and in-place decoration.

    Example:
        >>> op_name(torch.Tensor.__iadd__), op_name(torch.Tensor.add_), op_name(torch.Tensor.T.__get__)
        ('add', 'add', 'T')
    """
    name = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        return getattr(func.__self__, "__name__", name)
    if name.startswith("__") and name.endswith("__"):
        return _OPERATORS.get(name.strip("_"), name.strip("_"))
    return name.rstrip("_")


def is_in_place(func: Any) -> bool:
    """Whether ``func`` writes into its first argument."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name.strip("_") in _OPERATORS)
    return name.endswith("_")


def join(labels: Iterable[Label]) -> Provenance:
    """The least that is known of several tensors together; ``BINARY`` for none."""
    return min((label.provenance for label in labels), default=Provenance.BINARY)


def _contributors(call: Call) -> list[Label]:
    """Operands worth naming: an all-zero tensor adds nothing to a sum, nor does an index to a selection."""
    labels = call.labels(call.first) if call.name in _FIRST_ONLY else call.operands
    return list(dict.fromkeys(label for label in labels if label != ZEROS)) or labels


def _keep(call: Call) -> Provenance:
    """Values are moved, repeated or selected, or mapped so that 0, 1 and integers stay what they are."""
    return join(call.labels(call.first))


def _keep_all(call: Call) -> Provenance:
    return join(call.operands)


def _zero_preserving(call: Call) -> Provenance:
    """f(0) = 0, other values change."""
    return min(_keep(call), Provenance.SPARSE)


def _sum(call: Call) -> Provenance:
    """Sums of spikes are integers; adding a nonzero constant fills the zeros."""
    scalars = [value for value in call.args[:2] if not isinstance(value, torch.Tensor)]
    if any(_is_number(value) and value != 0 for value in scalars):
        return Provenance.DENSE
    limit = Provenance.INTEGER if call.option("alpha", 2, 1) in (1, -1) else Provenance.SPARSE
    return min(join(call.operands), limit)


def _reduce_sum(call: Call) -> Provenance:
    return min(_keep(call), Provenance.INTEGER)


def _product(call: Call) -> Provenance:
    """A product is zero wherever any one factor is."""
    labels = [label.provenance for label in call.operands]
    scalars = [value for value in call.args if _is_number(value)]
    if all(label >= Provenance.INTEGER for label in labels) and all(value in (0, 1) for value in scalars):
        return min(labels, default=Provenance.DENSE)
    return min(max(labels, default=Provenance.DENSE), Provenance.SPARSE)


def _either(call: Call) -> Provenance:
    """Logical or: nonzero where any operand is."""
    return Provenance.BINARY if join(call.operands) > Provenance.DENSE else Provenance.DENSE


def _quotient(call: Call) -> Provenance:
    return min(join(call.labels(call.first)), Provenance.SPARSE)


def _select(call: Call) -> Provenance:
    """``where(condition, a, b)``: zeros survive when both branches have them; a scalar branch must be 0."""
    branches = call.args[1:3] if call.name == "where" else (call.first, call.option("value", 2, 0))
    if any(_is_number(value) and value != 0 for value in branches):
        return Provenance.DENSE
    return join(call.labels(list(branches)))


def _clamp(call: Call) -> Provenance:
    low = 0 if call.name == "clamp_max" else call.option("min", 1, 0)
    high = call.option("max", 1 if call.name == "clamp_max" else 2, 0)
    fills_zeros = (_is_number(low) and low > 0) or (_is_number(high) and high < 0)
    return Provenance.DENSE if fills_zeros else _zero_preserving(call)


def _pad(call: Call) -> Provenance:
    mode, value = call.option("mode", 2, "constant"), call.option("value", 3, 0)
    return Provenance.DENSE if mode == "constant" and value not in (None, 0) else _keep(call)


def _resize(call: Call) -> Provenance:
    nearest = call.option("mode", 3, "nearest") in ("nearest", "nearest-exact")
    return _keep(call) if nearest else _zero_preserving(call)


def _dropout(call: Call) -> Provenance:
    active = call.option("training", 2, True) and call.option("p", 1, 0.5) != 0
    return _zero_preserving(call) if active else _keep(call)


def _write(call: Call) -> Provenance:
    """``x[index] = value``: what was there, joined with what is written."""
    value = call.option("value", len(call.args) - 1)
    if _is_number(value) and value not in (0, 1):
        return min(_keep(call), Provenance.SPARSE)
    return join(call.labels([call.first, value]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _rules(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


ZEROS = Label(Provenance.BINARY, ("zeros",))

# Uninitialised memory counts as zeros: nothing is read from it before it is written, and writes join.
_ORIGINS = {
    **dict.fromkeys(["zeros", "zeros_like", "new_zeros", "zero", "empty", "empty_like", "new_empty"], ZEROS),
    "bernoulli": Label(Provenance.BINARY, ("bernoulli",)),
}

_OPERATORS = {
    **{form + name: name for name in ("add", "sub", "mul", "and", "or", "xor") for form in ("", "i")},
    "radd": "add",
    "rsub": "rsub",
    "rmul": "mul",
    "truediv": "div",
    "itruediv": "div",
    "rand": "and",
    "ror": "or",
    "rxor": "xor",
}

_TABLE: dict[str, Rule] = {
    **_rules(
        _keep,
        """view reshape flatten unflatten ravel permute transpose t T mT H mH adjoint contiguous clone detach data
        alias requires_grad to float half double bfloat16 int long bool type type_as cuda cpu expand expand_as
        view_as reshape_as repeat repeat_interleave tile broadcast_to squeeze unsqueeze movedim moveaxis swapaxes
        swapdims getitem select narrow index_select gather masked_select take take_along_dim chunk split
        split_with_sizes tensor_split unbind cat concat concatenate stack hstack vstack dstack column_stack
        atleast_1d atleast_2d atleast_3d flip roll rot90 unfold diagonal tril triu as_strided pixel_shuffle
        pixel_unshuffle channel_shuffle max_pool1d max_pool2d max_pool3d max_pool1d_with_indices
        max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
        amax max relu relu6 abs sign ceil floor round trunc pin_memory share_memory""",
    ),
    **_rules(_keep_all, "maximum minimum"),
    **_rules(
        _zero_preserving,
        """avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d lp_pool1d
        lp_pool2d mean leaky_relu prelu elu selu celu gelu silu mish tanh hardtanh hardswish softsign softshrink
        hardshrink tanhshrink rrelu neg negative sqrt square sin asin atan erf expm1 log1p sinh fold normalize
        glu fake_quantize_per_tensor_affine""",
    ),
    **_rules(_sum, "add sub subtract"),
    **_rules(_reduce_sum, "sum cumsum nansum"),
    **_rules(_product, "mul multiply and logical_and bitwise_and"),
    **_rules(_either, "or xor logical_or logical_xor bitwise_or bitwise_xor"),
    **_rules(_quotient, "div divide true_divide floor_divide"),
    **_rules(_select, "where masked_fill"),
    **_rules(_clamp, "clamp clip clamp_min clamp_max"),
    **_rules(_pad, "pad"),
    **_rules(_resize, "interpolate upsample"),
    **_rules(_dropout, "dropout dropout1d dropout2d dropout3d feature_dropout"),
    **_rules(_write, "setitem index_put copy scatter index_copy masked_scatter"),
}

_FIRST_ONLY = frozenset(
    name for name, rule in _TABLE.items() if rule in (_keep, _zero_preserving, _quotient, _dropout, _clamp, _pad)
)
