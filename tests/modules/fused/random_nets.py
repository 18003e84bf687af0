"""Random small spiking networks, drawn stage by stage, whose every sum is exact.

A network is a list of stages. Each takes the current value and may look back at earlier ones; a stage that does not
apply (a residual of another shape) does nothing, so that every list of stages is a network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import snntorch
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn

LIFS = st.fixed_dictionaries(
    {
        "tau": st.sampled_from([2.0, 4.0, 3.0]),
        "decay_input": st.booleans(),
        "v_reset": st.sampled_from([0.0, None, 0.25]),
        "v_threshold": st.sampled_from([0.5, 1.0]),
    }
)
IFS = st.fixed_dictionaries({"v_reset": st.sampled_from([0.0, None]), "v_threshold": st.sampled_from([0.5, 1.0])})
SNN = {
    "threshold": st.sampled_from([0.5, 1.0]),
    "reset_mechanism": st.sampled_from(["subtract", "zero", "none"]),
    "reset_delay": st.booleans(),
}
LEAKY = st.fixed_dictionaries({"beta": st.sampled_from([0.5, 0.9]), **SNN})
SYNAPTIC = st.fixed_dictionaries({"alpha": st.sampled_from([0.5, 0.8]), "beta": st.just(0.75), **SNN})
JELLY = st.one_of(
    st.tuples(st.just("LIFNode"), LIFS), st.tuples(st.just("IFNode"), IFS), st.tuples(st.just("ParametricLIFNode"), IFS)
)
TORCH = st.one_of(st.tuples(st.just("Leaky"), LEAKY), st.tuples(st.just("Synaptic"), SYNAPTIC))
BACK = st.integers(1, 6)
WIDTHS = st.sampled_from([1, 3, 8, 16, 20, 33])
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda x: x.flip(-1),
    "transpose": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "squeeze": lambda x: x.unsqueeze(0).squeeze(0),
    "there and back": lambda x: x.reshape(x.shape[0], -1).reshape(*x.shape),
    "view": lambda x: x.contiguous().view(-1).view(*x.shape),
    "slices": lambda x: torch.cat([x[..., :1], x[..., 1:]], -1),
    "roll": lambda x: x.roll(1, 0),
    "dropout": lambda x: F.dropout(x, 0.5, False),
    "stack": lambda x: torch.stack([x, x]).sum(0),
}
ISLANDS: dict[str, Callable[[Tensor], Tensor]] = {
    "half": lambda x: x * 0.5,
    "shift": lambda x: x - 0.25,
    "relu": lambda x: F.relu(x),
    "clamp": lambda x: x.clamp(-1, 2),
    "negate": lambda x: -x,
    "abs": lambda x: x.abs(),
    "complement": lambda x: 1 - x,
}
WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda x: x.mul_(2),
    "item": lambda x: x[0].zero_(),
    "slice": lambda x: x[..., :1].add_(0.5),
    "view": lambda x: x.view(-1)[:3].fill_(0.5) if x.is_contiguous() else x.add_(0.5),
    "relu": lambda x: F.relu(x, inplace=True),
}
STAGES = st.one_of(
    st.tuples(st.just("conv"), WIDTHS, st.sampled_from([1, 3]), st.sampled_from([1, 1, 2]), st.booleans()),
    st.tuples(st.just("conv"), WIDTHS, st.sampled_from([1, 3]), st.just(1), st.just(False)),
    st.tuples(st.just("again"), BACK),
    st.tuples(st.just("norm")),
    st.tuples(st.just("neuron"), JELLY, TORCH),
    st.tuples(st.just("neuron"), JELLY, TORCH),
    st.tuples(st.just("same neuron"), BACK),
    st.tuples(st.just("add"), BACK),
    st.tuples(st.just("add_"), BACK),
    st.tuples(st.just("mul"), BACK),
    st.tuples(st.just("iand"), BACK),
    st.tuples(st.just("cat"), BACK, st.sampled_from([1, 1, 2, -1])),
    st.tuples(st.just("pool"), st.sampled_from(["max", "avg", "adaptive", "F.max", "F.avg"])),
    st.tuples(st.just("view"), st.sampled_from(sorted(VIEWS))),
    st.tuples(st.just("island"), st.sampled_from(sorted(ISLANDS))),
    st.tuples(st.just("write"), st.sampled_from(sorted(WRITES)), BACK),
    st.tuples(st.just("flatten")),
    st.tuples(st.just("linear"), WIDTHS, st.booleans()),
    st.tuples(st.just("back"), BACK),
    st.tuples(st.just("output")),
)
_START = [("conv", 8, 3, 1, False), ("neuron", ("IFNode", {}), ("Leaky", {"beta": 0.5}))]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """``style``: ``"multi"`` (SpikingJelly, all steps at once) or ``"loop"`` (snnTorch); sizes; the stages."""

    style: str
    steps: int
    batch: int
    size: int
    stages: tuple[Any, ...]
    seed: int


@st.composite
def recipes(draw: Any) -> Recipe:
    stages = draw(st.lists(STAGES, min_size=2, max_size=14))
    return Recipe(
        draw(st.sampled_from(["multi", "multi", "loop", "hidden"])),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 2)),
        draw(st.sampled_from([4, 8])),
        (*_START, *stages),
        draw(st.integers(0, 2**16)),
    )


@dataclasses.dataclass
class _Value:
    """A tensor of the forward; ``depth`` counts the layers since the last neuron, which limits its bits."""

    tensor: Any
    depth: int


class Drawn(nn.Module):
    """The network of a recipe. The first call, on an example, makes its modules."""

    def __init__(self, recipe: Recipe, example: Tensor) -> None:
        super().__init__()
        self.recipe, self.parts, self.building = recipe, nn.ModuleDict(), True
        self.chosen: dict[str, str] = {}
        with torch.no_grad():
            self(example)
        self.building = False

    @property
    def lead(self) -> int:
        return 2 if self.recipe.style == "multi" else 1

    def forward(self, x: Tensor) -> list[Any]:
        if self.recipe.style == "multi":
            return self.walk(x, {})
        states: dict[str, Any] = {}
        steps = [self.walk(x[t], states) for t in range(self.recipe.steps)]
        stacked: list[Any] = [torch.stack(values) for values in zip(*steps, strict=True)]
        return [*stacked, *(value[-1] for value in states.values())]

    def walk(self, x: Tensor, states: dict[str, Any]) -> list[Any]:
        """All stages on one value ``[(T,) N, C, H, W]``."""
        history, outputs = [_Value(x, 0)], []
        for i, (kind, *options) in enumerate(self.recipe.stages):
            current = history[-1]
            if kind == "output":
                outputs.append(current.tensor)
                continue
            method = getattr(self, "_" + kind.replace(" ", "_").replace("add_", "add_in_place"))
            made = method(f"{kind}{i}".replace(" ", "_"), history, states, *options)
            if made is not None:
                history.append(made)
        return [*outputs, history[-1].tensor]

    def part(self, name: str, make: Callable[[], nn.Module]) -> Any:
        if self.building and name not in self.parts:
            self.parts[name] = make()
        return self.parts[name]

    def earlier(self, name: str, kinds: tuple[type, ...], distance: int) -> Any:
        """One of the modules that there were when stage ``name`` was first walked through."""
        if self.building and name not in self.chosen:
            found = [n for n, m in self.parts.items() if isinstance(m, kinds)]
            self.chosen[name] = found[max(0, len(found) - distance)]
        return self.parts[self.chosen[name]]

    def back(self, history: list[_Value], distance: int) -> _Value:
        return history[max(0, len(history) - 1 - distance)]

    # ---- stages

    def _conv(self, name, history, states, width, kernel, stride, bias):
        x = history[-1].tensor
        if x.dim() != self.lead + 3 or history[-1].depth > 0 or x.shape[-1] < stride:
            return None
        options = {"padding": kernel // 2, "stride": stride, "bias": bias}
        channels = x.shape[self.lead]
        if self.recipe.style == "multi":
            module = self.part(name, lambda: layer.Conv2d(channels, width, kernel, **options, step_mode="m"))
        else:
            module = self.part(name, lambda: nn.Conv2d(channels, width, kernel, **options))
        return _Value(module(x), 1)

    def _linear(self, name, history, states, width, bias):
        x = history[-1].tensor
        if x.dim() != self.lead + 1 or history[-1].depth > 0:
            return None
        return _Value(self.part(name, lambda: nn.Linear(x.shape[-1], width, bias))(x), 1)

    def _again(self, name, history, states, distance):
        """A layer that was there before."""
        module, x = self.earlier(name, (nn.Conv2d, nn.Linear), distance), history[-1].tensor
        image, channels = isinstance(module, nn.Conv2d), module.weight.shape[1]
        if history[-1].depth > 0 or x.dim() != self.lead + (3 if image else 1) or x.shape[self.lead] != channels:
            return None
        return _Value(module(x), 1)

    def _norm(self, name, history, states):
        x = history[-1].tensor
        if x.dim() != self.lead + 3:
            return None
        channels = x.shape[self.lead]
        if self.recipe.style == "multi":
            module = self.part(name, lambda: layer.BatchNorm2d(channels, step_mode="m"))
        else:
            module = self.part(name, lambda: nn.BatchNorm2d(channels))
        return _Value(module(x), history[-1].depth)

    def _neuron(self, name, history, states, jelly, snn):
        kind, options = jelly if self.recipe.style == "multi" else snn
        if self.recipe.style == "multi":
            self.part(name, lambda: getattr(neuron, kind)(**options, step_mode="m"))
        else:
            hidden = self.recipe.style == "hidden"
            self.part(name, lambda: getattr(snntorch, kind)(**options, init_hidden=hidden))
        return self.fire(name, history[-1].tensor, states)

    def _same_neuron(self, name, history, states, distance):
        node = self.earlier(name, (neuron.BaseNode, snntorch.SpikingNeuron), distance)
        return self.fire(next(n for n, m in self.parts.items() if m is node), history[-1].tensor, states)

    def fire(self, name: str, x: Any, states: dict[str, Any]) -> _Value:
        module: Any = self.parts[name]
        if self.recipe.style != "loop":
            return _Value(module(x), 0)
        count = 2 if isinstance(module, snntorch.Synaptic) else 1
        key = f"{name} {tuple(x.shape)}"
        given = states.get(key, (torch.zeros_like(x),) * count)
        spikes, *states[key] = module(x, *given)
        return _Value(spikes, 0)

    def _add(self, name, history, states, distance):
        a, b = history[-1], self.back(history, distance)
        return _Value(a.tensor + b.tensor, max(a.depth, b.depth)) if a.tensor.shape == b.tensor.shape else None

    def _add_in_place(self, name, history, states, distance):
        a, b = history[-1], self.back(history, distance)
        if a.tensor.shape != b.tensor.shape or a is history[0]:
            return None
        tensor = a.tensor
        tensor += b.tensor
        a.depth = max(a.depth, b.depth)
        return _Value(tensor, a.depth)

    def _mul(self, name, history, states, distance):
        a, b = history[-1], self.back(history, distance)
        small = a.tensor.shape == b.tensor.shape and a.depth + b.depth == 0
        return _Value(a.tensor * b.tensor, 1) if small else None

    def _iand(self, name, history, states, distance):
        a, b = history[-1], self.back(history, distance)
        small = a.tensor.shape == b.tensor.shape and a.depth + b.depth == 0
        return _Value(a.tensor * (1 - b.tensor), 1) if small else None

    def _cat(self, name, history, states, distance, dim):
        a, b = history[-1], self.back(history, distance)
        dim = self.lead - 1 + dim if dim > 0 else dim
        if a.tensor.dim() != b.tensor.dim() or dim >= a.tensor.dim() or a.tensor.numel() > 20_000:
            return None
        rest = [[s for d, s in enumerate(v.tensor.shape) if d != dim % v.tensor.dim()] for v in (a, b)]
        return _Value(torch.cat([a.tensor, b.tensor], dim), max(a.depth, b.depth)) if rest[0] == rest[1] else None

    def _pool(self, name, history, states, kind):
        x = history[-1].tensor
        if x.dim() != self.lead + 3 or x.shape[-1] % 2 or x.shape[-2] % 2:
            return None
        if kind[:2] == "F.":
            function = {"F.max": F.max_pool2d, "F.avg": F.avg_pool2d}[kind]
            flat = x.flatten(0, 1) if self.lead == 2 else x
            y = function(flat, 2)
            return _Value(y.unflatten(0, x.shape[:2]) if self.lead == 2 else y, history[-1].depth)
        base: Any = layer if self.lead == 2 else nn
        mode = {"step_mode": "m"} if self.lead == 2 else {}
        make = {"max": base.MaxPool2d, "avg": base.AvgPool2d, "adaptive": base.AdaptiveAvgPool2d}[kind]
        argument = (x.shape[-2] // 2, x.shape[-1] // 2) if kind == "adaptive" else 2
        return _Value(self.part(name, lambda: make(argument, **mode))(x), history[-1].depth)

    def _view(self, name, history, states, kind):
        return _Value(VIEWS[kind](history[-1].tensor), history[-1].depth)

    def _island(self, name, history, states, kind):
        return _Value(ISLANDS[kind](history[-1].tensor), history[-1].depth)

    def _write(self, name, history, states, kind, distance):
        value = self.back(history, distance)
        if value is not history[0]:
            WRITES[kind](value.tensor)

    def _flatten(self, name, history, states):
        x = history[-1].tensor
        if x.dim() != self.lead + 3 or x[..., 0].numel() * x.shape[-1] > 20_000:
            return None
        return _Value(x.flatten(self.lead), history[-1].depth)

    def _back(self, name, history, states, distance):
        """Go on from an earlier value."""
        return self.back(history, distance)
