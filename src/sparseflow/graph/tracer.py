"""A torch.fx tracer that answers a forward's questions about rank, shape and type from an example run.

Plain symbolic tracing stops at the first ``if x.dim() != 4``. Here every proxy carries the value that its node had
on the example, so such questions have answers. Neurons and other modules with state stay whole, as do methods that
change state (``reset``, ``init_leaky``): each is an operation of the graph, so a second call of the graph does what
a second call of the model does.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import has_side_effect
from torch.fx.proxy import Attribute
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary
from typing_extensions import override

from sparseflow.errors import SparseflowError
from sparseflow.frameworks import is_container, is_time_leaf, state_methods, state_tensors
from sparseflow.graph.eligibility import layer_kind
from sparseflow.graph.isolation import copied, isolated
from sparseflow.graph.recorder import LabelMode, Recorder

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
_CONSTANT = (bool, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
_RANK = frozenset({"ndim", "dim", "ndimension", "get_device", "element_size"})
_READS_DATA = frozenset({"item", "tolist", "numpy", "is_nonzero", "equal", "allclose"})


class TraceError(SparseflowError):
    """The model's forward cannot be written down as a graph; the message says where and why."""


@has_side_effect
def call_state_method(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """Graph operation for a method of ``module`` that changes its state, e.g. snnTorch's ``init_leaky``."""
    return getattr(module, name)(*args, **kwargs)


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    whole: Collection[str] = (),
) -> fx.GraphModule:
    """Trace ``model`` on an example into a graph that shares its modules and parameters.

    Ranks, data types and every size that Python needs as a number (loop bounds over T) are those of the example;
    other sizes stay symbolic. Convolutions, linear layers, normalisations, neurons and other stateful modules are
    ``call_module`` nodes. The graph computes the forward only: surrogate gradients written inside a forward are
    lost. Model and graph are called twice on the example and compared.

    Args:
        model: any module; nothing in it is changed.
        args, kwargs: what the model is called with.
        whole: names of modules to keep as one ``call_module`` node each, whatever they are.

    Returns:
        A module that is called like ``model``, with equal results and equal effects on the neurons' state.

    Raises:
        TraceError: control flow depends on tensor values, state is kept outside known neurons, an operation cannot
            be part of a graph, or the graph computes something else than the model.

    Example:
        >>> graph = trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), (torch.zeros(1, 2),))
        >>> [node.op for node in graph.graph.nodes]
        ['placeholder', 'call_module', 'call_module', 'output']
    """
    kwargs = kwargs or {}
    with isolated(model):
        graph = _graph_module(model, run_traced(model, Recorder(model), args, kwargs, whole))
    if not _equal(_two_calls(model, model, args, kwargs), _two_calls(model, graph, args, kwargs)):
        raise TraceError("the graph differs from the model: the forward asks what tracing answers otherwise")
    return graph


def run_traced(
    model: nn.Module,
    recorder: Recorder,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    whole: Collection[str] = (),
) -> fx.Graph:
    """Trace inside an :func:`isolated` context and report every operation to ``recorder``."""
    tracer = ExampleTracer(model, recorder, copied(args), copied(kwargs), whole)
    if tracer.is_leaf_module(model, ""):
        raise TraceError(f"the model is a single {type(model).__name__}")
    before = _python_state(model)
    try:
        with recorder.attached(), tracer.state_methods_as_operations(model), _Operations(tracer):
            graph = tracer.trace(model)
        _check_python_state(tracer, before)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(f"{type(error).__name__}: {error}") from error
    return graph


def _graph_module(model: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    try:
        return fx.GraphModule(model, graph, type(model).__name__)
    except Exception as error:
        raise TraceError(f"{type(error).__name__}: {error}") from error


def _two_calls(
    model: nn.Module, callee: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[torch.Tensor]:
    """Tensors that ``callee``, a graph of ``model`` or itself, returns from two calls on the example."""
    outputs = []
    with isolated(model):
        for _ in range(2):
            call_args, call_kwargs = copied((args, kwargs))
            outputs += copied(tree_leaves(callee(*call_args, **call_kwargs)))
    return [leaf for leaf in outputs if isinstance(leaf, torch.Tensor)]


def _equal(expected: list[torch.Tensor], actual: list[torch.Tensor]) -> bool:
    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        alike = a.shape == b.shape and a.dtype is b.dtype
        return alike and (torch.allclose(a, b, equal_nan=True) if a.is_floating_point() else torch.equal(a, b))

    return len(expected) == len(actual) and all(map(same, expected, actual))


class ExampleProxy(fx.Proxy):
    """A proxy that knows the value its node had on the example."""

    def __init__(self, node: fx.Node, tracer: ExampleTracer, value: Any) -> None:
        super().__init__(node, tracer)
        self.value = value

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Forwards ask ``isinstance(state, tuple)``. A tensor cannot be posed as: C code would believe it and crash."""
        return ExampleProxy if isinstance(self.value, torch.Tensor) else type(self.value)

    def __getattr__(self, name: str) -> Any:
        if callable(getattr(type(self.value), name, None)):
            return Attribute(self, name)
        if not hasattr(self.value, name):
            raise AttributeError(f"{type(self.value).__name__!r} object has no attribute {name!r}")
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self.value)))

    def __getitem__(self, index: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __len__(self) -> int:
        return len(self.value)

    def __bool__(self) -> bool:
        return bool(self._python_number())

    def __index__(self) -> int:
        return operator.index(self._python_number())

    def __int__(self) -> int:
        return int(self._python_number())

    def __float__(self) -> float:
        return float(self._python_number())

    def _python_number(self) -> Any:
        if isinstance(self.value, torch.Tensor):
            raise TraceError(f"control flow depends on the values of a tensor ({self.node.name})")
        return self.value


class IntProxy(ExampleProxy, int):
    """A size that passes for a number where torch and Python insist on one, as ``torch.zeros(n)`` does."""

    # torch refuses an overriding object as the first of several sizes; the mode sees the call all the same.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    def __new__(cls, _node: fx.Node, _tracer: ExampleTracer, value: int) -> IntProxy:
        return int.__new__(cls, value)


class SizeProxy(ExampleProxy, tuple):
    """A shape that passes for one, as in ``torch.zeros(x.shape)``."""

    def __new__(cls, _node: fx.Node, _tracer: ExampleTracer, value: torch.Size) -> SizeProxy:
        return tuple.__new__(cls, value)


_PROXIES: dict[type, type[ExampleProxy]] = {int: IntProxy, torch.Size: SizeProxy}


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[ExampleProxy, Any], Any]:
    def method(self: ExampleProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


# Without these Python would turn ``x += y`` into ``x = x + y``, and other names of x would keep the old values.
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(ExampleProxy, f"__i{_name}__", _in_place(getattr(operator, f"__i{_name}__")))


class ExampleTracer(fx.Tracer):
    """Builds the graph and runs every node on the example as it is added."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        model: nn.Module,
        recorder: Recorder,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        whole: Collection[str] = (),
    ) -> None:
        super().__init__()
        self._names = {module: name for name, module in model.named_modules()}
        self._whole = {m for m, name in self._names.items() if name in whole or self._keeps_whole(m)}
        self.entered: set[nn.Module] = set()
        self._recorder = recorder
        self._example = (args, kwargs)
        self._states: Any = WeakTensorKeyDictionary()
        self._thread = threading.get_ident()
        self._running = False
        self._had_default = False
        self._autocast = _autocast()
        self._note_states(model)
        recorder.label_inputs(args, kwargs)

    @property
    def passive(self) -> bool:
        """Whether module calls and torch functions are none of this trace: a node is running, or another thread."""
        return self._running or threading.get_ident() != self._thread

    @override
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self._whole

    def _keeps_whole(self, module: nn.Module) -> bool:
        if is_container(module):
            return False
        known = is_time_leaf(module) or layer_kind(module) is not None or isinstance(module, NORMS)
        return known or super().is_leaf_module(module, "")

    @override
    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.passive:
            return forward(*args, **kwargs)
        if m not in self._whole:
            self.entered.add(m)
        return super().call_module(m, forward, args, kwargs)

    @override
    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.passive:
            return attr_val
        self._refuse_state(attr_val)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    @override
    def create_arg(self, a: Any) -> Any:
        if _is_proxy(a):
            return a.node
        self._refuse_state(a)
        return super().create_arg(a)

    @override
    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Callable[[fx.Node], fx.Proxy] | None = None,
    ) -> Any:
        value = self.evaluate(kind, target, _values(args), _values(kwargs))
        if kind != "call_module" and _is_answer(target, args, value):
            return value
        return self.record(kind, target, args, kwargs, value)

    def record(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> ExampleProxy:
        """Add a node whose value on the example is known."""
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs))
        return _PROXIES.get(type(value), ExampleProxy)(node, self, value)

    def evaluate(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one node on the example, labelling what it makes."""
        if _autocast() != self._autocast:
            raise TraceError("the forward enters or leaves an autocast region, which a graph does not record")
        if _target_name(target) in _READS_DATA:
            raise TraceError(f"the forward reads tensor values ({_target_name(target)})")
        self._running = True
        try:
            with LabelMode(self._recorder):
                return self._call(kind, target, args, kwargs)
        finally:
            self._running = False

    def _call(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kind == "get_attr":
            return operator.attrgetter(target)(self.root)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if kind == "call_function" and target is not call_state_method:
            return target(*args, **kwargs)
        module = args[0] if kind == "call_function" else operator.attrgetter(target)(self.root)
        result = (target if kind == "call_function" else module)(*args, **kwargs)
        self._note_states(module)
        return result

    @override
    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Placeholders named like the forward's parameters; arguments without a tensor keep the example's value."""
        root: Any = self.root
        self.entered.add(root)
        parameters = inspect.signature(root.forward).parameters.values()
        bound = inspect.signature(root.forward).bind(*self._example[0], **self._example[1])
        positional: list[Any] = []
        named: dict[str, Any] = {}
        for parameter in parameters:
            value = bound.arguments.get(parameter.name, parameter.default)
            if parameter.kind is parameter.VAR_POSITIONAL:
                extra = () if value is parameter.empty else value
                positional += [self._placeholder(f"{parameter.name}_{i}", item) for i, item in enumerate(extra)]
            elif parameter.kind is parameter.VAR_KEYWORD:
                extra = {} if value is parameter.empty else value
                named.update({key: self._placeholder(key, item) for key, item in extra.items()})
            elif parameter.kind is parameter.KEYWORD_ONLY:
                named[parameter.name] = self._placeholder(parameter.name, value, parameter.default)
            else:
                positional.append(self._placeholder(parameter.name, value, parameter.default))
        return (lambda *given: root.forward(*given, **named)), positional

    def _placeholder(self, name: str, value: Any, default: Any = inspect.Parameter.empty) -> Any:
        if default is inspect.Parameter.empty and self._had_default:
            default = None
        self._had_default = default is not inspect.Parameter.empty
        node = self.graph.placeholder(name, default_value=default)
        has_tensor = any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))
        return ExampleProxy(node, self, value) if has_tensor else value

    @contextlib.contextmanager
    def state_methods_as_operations(self, model: nn.Module) -> Iterator[None]:
        """Make calls such as ``lif.init_leaky()`` nodes of the graph instead of running them once, now."""
        replaced = [(module, name) for module in model.modules() for name in state_methods(module)]
        for module, name in replaced:
            module.__dict__[name] = self._state_method(module, name)
        try:
            yield
        finally:
            for module, name in replaced:
                module.__dict__.pop(name, None)

    def _state_method(self, module: nn.Module, name: str) -> Callable[..., Any]:
        original = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.passive:
                return original(*args, **kwargs)
            owner = self.create_proxy("get_attr", self.path_of_module(module), (), {})
            return self.create_proxy("call_function", call_state_method, (owner, name, *args), kwargs)

        return call

    def _note_states(self, module: nn.Module) -> None:
        for part in module.modules():
            for attribute, tensor in state_tensors(part).items():
                self._states[tensor] = f"{attribute} of {self._names[part]}"

    def _refuse_state(self, value: Any) -> None:
        """A neuron's memory that the forward reads would become a constant of the graph."""
        if type(value) is torch.Tensor and value in self._states:
            raise TraceError(f"the forward reads {self._states[value]} directly")


class _Operations(TorchFunctionMode):
    """Makes nodes of torch functions that see no proxy, such as ``torch.zeros`` and ``torch.rand``."""

    def __init__(self, tracer: ExampleTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._tracer.passive:
            return func(*args, **kwargs)
        method = is_tensor_method_or_property(func)
        kind, target = ("call_method", func.__name__) if method else ("call_function", func)
        if any(_is_proxy(leaf) for leaf in tree_leaves((args, kwargs))):
            return self._tracer.create_proxy(kind, target, args, kwargs)
        value = self._tracer.evaluate("call_function", func, args, kwargs)
        made_tensor = any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))
        if not made_tensor or func.__name__ == "__get__":
            return value
        return self._tracer.record(kind, target, args, kwargs, value)


def _is_proxy(value: Any) -> bool:
    """``isinstance`` would believe a proxy that it is what it stands for."""
    return issubclass(type(value), ExampleProxy)


def _values(arguments: Any) -> Any:
    """Arguments of a node with every proxy replaced by its value on the example."""
    if _is_proxy(arguments):
        return arguments.value
    if isinstance(arguments, (list, tuple)):
        items = [_values(item) for item in arguments]
        return type(arguments)(*items) if hasattr(arguments, "_fields") else type(arguments)(items)
    if isinstance(arguments, dict):
        return {key: _values(item) for key, item in arguments.items()}
    if isinstance(arguments, slice):
        return slice(_values(arguments.start), _values(arguments.stop), _values(arguments.step))
    return arguments


def _is_answer(target: Any, args: tuple[Any, ...], value: Any) -> bool:
    """Whether ``value`` answers a question of the forward (rank, type, comparison of sizes) and needs no node."""
    name = args[1] if target is getattr else _target_name(target)
    return isinstance(value, _CONSTANT) or name in _RANK


def _autocast() -> tuple[bool, bool]:
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _target_name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def _python_state(model: nn.Module) -> dict[nn.Module, dict[str, Any]]:
    simple = (bool, int, float, str, type(None))
    return {m: {k: v for k, v in m.__dict__.items() if isinstance(v, simple)} for m in model.modules()}


def _check_python_state(tracer: ExampleTracer, before: dict[nn.Module, dict[str, Any]]) -> None:
    """State that a forward keeps in Python attributes would be lost in a graph."""
    for module in tracer.entered:
        kept = [name for name, value in module.__dict__.items() if _holds_proxy(value)]
        kept += [n for n, value in before[module].items() if n not in kept and module.__dict__.get(n) != value]
        if kept:
            raise TraceError(f"{type(module).__name__} keeps state in {', '.join(kept)}; register it as a neuron")


def _holds_proxy(value: Any) -> bool:
    return any(_is_proxy(leaf) for leaf in tree_leaves(value))
