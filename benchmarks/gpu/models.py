"""Whole networks of the SpikingJelly zoo: dense eager, dense compiled and graphed, and accelerated.

In float16, where layers run on their own, and in float32, where blocks are fused. Fused plans are timed as
``accelerate`` leaves them, replayed as CUDA graphs by themselves, and launched kernel by kernel.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import sparseflow
from sparseflow.bench.suites import nets

from .layers import STEPS
from .records import Gate, ModelRow, RedGate, Row, Skipped
from .runner import Cell
from .timing import Sampler, Timer, alternate

_SIDE = 224
_INPUTS = 4
_REPEATS = 9


@dataclasses.dataclass(frozen=True)
class Model:
    """A network of the zoo at one batch size; ``compiled`` adds ``torch.compile``, which takes long for deep ones."""

    name: str
    batch: int
    compiled: bool
    side: int = _SIDE

    @property
    def title(self) -> str:
        """Unique name of the cell."""
        return f"models: {self.name} @{self.side}, T {STEPS}, batch {self.batch}"

    @property
    def fused_title(self) -> str:
        """The same of the cell that runs fused blocks."""
        return f"{self.title}, fused"

    @property
    def density(self) -> float:
        """Share of its neurons that fire, as in trained networks of the kind."""
        return nets.IF_DENSITY if self.name.startswith("sew") else nets.LIF_DENSITY

    @property
    def activity(self) -> str:
        """What its rows say of its weights."""
        return nets.activity(self.density)

    def build(self) -> nn.Module:
        """The network in multi-step mode, float32, on the CPU, with weights from a fixed seed."""
        from spikingjelly.activation_based import functional, neuron, surrogate
        from spikingjelly.activation_based.model import sew_resnet, spiking_resnet

        torch.manual_seed(0)
        options: dict[str, Any] = {"surrogate_function": surrogate.ATan(), "detach_reset": True}
        if self.name.startswith("sew"):
            net = getattr(sew_resnet, self.name)(cnf="ADD", spiking_neuron=neuron.IFNode, **options)
        else:
            net = getattr(spiking_resnet, self.name)(spiking_neuron=neuron.LIFNode, **options)
        functional.set_step_mode(net, "m")
        return net


def smooth_images(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """``[T, N, 3, H, W]``: one smooth random image a sample, the same in each of the T steps."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(shape[1], shape[2], shape[3] // 8, shape[4] // 8, generator=generator)
    images = nn.functional.interpolate(coarse.to(device), size=shape[3:], mode="bilinear")
    return images.expand(shape).contiguous()


def stand_in(model: Model, shape: tuple[int, ...], device: torch.device) -> nn.Module:
    """The network, firing like a trained one on smooth images."""
    from sparseflow.bench.suites.stand_ins import fire_like_trained

    return fire_like_trained(model.build().to(device), smooth_images(shape, 100, device), model.density)


def _reset(net: nn.Module) -> None:
    from spikingjelly.activation_based import functional

    functional.reset_net(net)


def answers(net: Callable[[Tensor], Tensor], owner: nn.Module, xs: list[Tensor]) -> Callable[[int], Tensor]:
    """Runs a network on input ``i`` from rest."""

    def run(i: int) -> Tensor:
        _reset(owner)
        return net(xs[i])

    return run


def run(model: Model, timer: Timer, device: torch.device) -> list[Row]:
    """All rows of one network, or why there are none."""
    if importlib.util.find_spec("spikingjelly") is None:
        return [Skipped("models", model.title, "SpikingJelly is not installed")]
    shape = (STEPS, model.batch, 3, model.side, model.side)
    with torch.no_grad():
        net = stand_in(model, (STEPS, min(model.batch, 8), *shape[2:]), device)
        images = [smooth_images(shape, seed, device) for seed in range(_INPUTS)]
        half = copy.deepcopy(net).half().to(memory_format=torch.channels_last)
        xs = [x.half() for x in images]
        sparse = sparseflow.accelerate(copy.deepcopy(half), xs[0])
        gate, agreement = check(sparse, xs)
        samplers = prepared(model, net, images, half, sparse, xs, timer)
        times = alternate(samplers, _REPEATS)
    return list(rows_of(model, "float16", times, gate, agreement))


def run_fused(model: Model, timer: Timer, device: torch.device) -> list[Row]:
    """All rows of the fused plan of one network in float32, or why there are none."""
    if importlib.util.find_spec("spikingjelly") is None:
        return [Skipped("models", model.fused_title, "SpikingJelly is not installed")]
    shape = (STEPS, model.batch, 3, model.side, model.side)
    with torch.no_grad():
        net = stand_in(model, (STEPS, min(model.batch, 8), *shape[2:]), device)
        return fused_rows(model, net, [smooth_images(shape, seed, device) for seed in range(_INPUTS)], timer)


def fused_rows(model: Model, net: nn.Module, images: list[Tensor], timer: Timer) -> list[Row]:
    """Rows of ``net``: the fused plan replayed and launched, against the network itself."""
    replayed = sparseflow.accelerate(copy.deepcopy(net), images[0])
    gate, agreement = check(replayed, images)
    notes = sparseflow.report(replayed).notes
    if not any("blocks fused" in note for note in notes):
        return [Skipped("models", model.fused_title, "; ".join(notes) or "nothing is fused")]
    launched = sparseflow.accelerate(copy.deepcopy(net), images[0], cuda_graph=False)
    ready = functools.partial(timer.prepare, inputs=len(images))
    runs = {"replayed": answers(replayed, replayed, images), "launched": answers(launched, launched, images)}
    check_replays(runs["replayed"], runs["launched"], len(images))
    samplers = {
        "eager float32": ready(answers(net, net, images), graphed=False),
        "dense float32 graphed": ready(answers(net, net, images)),
        **{f"sparseflow float32 fused, {how}": ready(run, graphed=False) for how, run in runs.items()},
    }
    return list(rows_of(model, "float32", alternate(samplers, _REPEATS), gate, agreement))


def check_replays(replayed: Callable[[int], Tensor], launched: Callable[[int], Tensor], inputs: int) -> None:
    """Compare replays with the kernels launched one by one, after two calls by which graphs are captured.

    Raises:
        RedGate: they differ in a bit.
    """
    for i in (0, 0, *range(inputs)):
        if not torch.equal(replayed(i), launched(i)):
            raise RedGate(f"the replay of input {i} is not what its kernels compute")


def check(net: nn.Module, xs: list[Tensor]) -> tuple[Gate, float]:
    """Every sparse layer inside its float64 budget, and the share of equal top-1 classes with sparse layers off.

    Raises:
        RedGate: a layer is wrong.
    """
    answer = answers(net, net, xs)
    with sparseflow.verify(net) as watch:
        answer(0)
    gate = Gate(watch.worst, f"{watch.checked} sparse layer calls")
    if not gate.green:
        raise RedGate(f"a layer is {watch.worst:.3g} budgets off")
    ours = [_classes(answer(i)) for i in range(len(xs))]
    with sparseflow.disabled(net):
        dense = [_classes(answer(i)) for i in range(len(xs))]
    return gate, float((torch.cat(ours) == torch.cat(dense)).float().mean())


def _classes(y: Tensor) -> Tensor:
    return y.mean(0).argmax(1)


def prepared(
    model: Model,
    net: nn.Module,
    images: list[Tensor],
    half: nn.Module,
    sparse: nn.Module,
    xs: list[Tensor],
    timer: Timer,
) -> dict[str, Sampler]:
    """Everything that takes turns, graphed except for the eager float32 network."""
    ready = functools.partial(timer.prepare, inputs=len(xs))
    samplers = {
        "eager float32": ready(answers(net, net, images), graphed=False),
        "dense float16 graphed": ready(answers(half, half, xs)),
        "sparseflow float16 graphed": ready(answers(sparse, sparse, xs)),
    }
    if model.compiled:
        samplers["dense float16 compiled, graphed"] = ready(answers(compiled(half), half, xs))
        samplers["sparseflow float16 compiled, graphed"] = ready(answers(compiled(sparse), sparse, xs))
    return samplers


def compiled(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """``torch.compile`` for one input shape."""
    torch._dynamo.reset()
    return torch.compile(net, dynamic=False)


def rows_of(model: Model, dtype: str, times: dict[str, Any], gate: Gate, agreement: float) -> Iterator[ModelRow]:
    """Each accelerated run over the strongest dense one, and over the eager one, labelled."""
    strongest = min((name for name in times if name.startswith("dense")), key=lambda name: times[name][1])
    for name in (name for name in times if name.startswith("sparseflow")):
        for baseline in (strongest, "eager float32"):
            yield ModelRow(
                stage="models",
                model=f"{model.name} @{model.side}",
                weights=model.activity,
                dtype=dtype,
                steps=STEPS,
                batch=model.batch,
                run=name,
                ms=times[name],
                baseline=baseline,
                baseline_ms=times[baseline],
                speedup=times[baseline][1] / times[name][1],
                agreement=agreement,
                gate=gate,
            )


def cells(timer: Timer, device: torch.device) -> Iterator[Cell]:
    """All networks, the small ones first."""
    plan = (
        (3, "spiking_resnet18", (32, 1, 8), True),
        (5, "sew_resnet18", (32, 1, 8), False),
        (5, "spiking_resnet50", (32, 1, 8), False),
        (7, "spiking_resnet34", (32, 1, 8), False),
        (7, "sew_resnet50", (32, 1, 8), False),
        (9, "spiking_resnet101", (8, 1, 32), False),
        (9, "spiking_resnet152", (8, 1, 32), False),
    )
    for priority, name, batches, compile_it in plan:
        for batch in batches:
            model = Model(name, batch, compile_it and batch == batches[0])
            seconds = 60.0 if model.compiled else 12.0
            yield Cell(model.title, priority, seconds, functools.partial(run, model, timer, device))
            yield Cell(model.fused_title, priority, 20.0, functools.partial(run_fused, model, timer, device))
