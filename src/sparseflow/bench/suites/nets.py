"""The networks of the suites: trained where this is a source checkout with their weights, else stand-ins.

A stand-in has random weights and thresholds at which every layer fires as often as in trained networks
(:mod:`sparseflow.bench.suites.stand_ins`). Frameworks are imported when a workload is made.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .baselines import Workload

Made = tuple[str, Callable[[], Workload]]  # its name, and what makes it when it is its turn
TIME_STEPS = 4
IMAGES = 16  # that the gate sees at least
LIF_DENSITY = 0.08  # trained spiking ResNets: 4 % to 12 % by layer
IF_DENSITY = 0.32  # a trained SEW ResNet with IF neurons, whose layers also add spikes up
RESNET18 = "spiking_resnet.spiking_resnet18"
_SNNTORCH_SIZE, _SNNTORCH_STEPS = 28, 25


@functools.cache
def checkout() -> Path | None:
    """Root of the source checkout this package runs from; ``None`` for an installed one."""
    root = Path(__file__).resolve().parents[4]
    return root if (root / "examples" / "digits").is_dir() else None


def from_checkout(name: str) -> ModuleType:
    """A module of the checkout's ``examples`` or ``benchmarks``.

    Raises:
        ModuleNotFoundError: this is an installed package, which has no trained networks.
    """
    root = checkout()
    if root is None:
        raise ModuleNotFoundError(f"{name} and its trained weights are in the source checkout, not in the package")
    for folder in (root / "examples", root):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return importlib.import_module(name)


def count_of(batch: int, images: int = IMAGES) -> int:
    """How many inputs of a batch size a workload has: at least two, for the gate at least ``images`` images.

    >>> count_of(1), count_of(8), count_of(32)
    (16, 2, 2)
    """
    return max(2, -(-images // batch))


def encode(images: Tensor, steps: int = TIME_STEPS) -> Tensor:
    """Direct encoding: ``[N, C, H, W]`` repeated over time to ``[T, N, C, H, W]``."""
    return images.repeat(steps, 1, 1, 1, 1)


def smooth_images(count: int, side: int, channels: int = 3) -> Tensor:
    """``[count, channels, side, side]``: random images in which neighbours are alike, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, channels, max(1, side // 8), max(1, side // 8), generator=generator)
    return nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")


# ---- trained


def digits(batch: int, steps: int = TIME_STEPS, side: int = 32, images: int = IMAGES, name: str = "") -> Workload:
    """The demo's trained net on test images of scikit-learn's digits, ``[T, batch, 1, side, side]``."""
    data, net = from_checkout("digits.data"), from_checkout("digits.net")
    frames = data.load_split()[1].images[: count_of(batch, images) * batch]
    if side != frames.shape[-1]:
        frames = nn.functional.interpolate(frames, size=(side, side), mode="bilinear")
    inputs = tuple(encode(part, steps) for part in frames.split(batch))
    name = name or f"digits resnet18 @{side}, batch {batch}"
    return Workload(name, _config(batch, steps, side), net.load_checkpoint, inputs)


def snntorch_convnet(batch: int, images: int = IMAGES) -> Workload:
    """The tutorial net of snnTorch on test images, its loop over T = 25 steps in the user's forward."""
    net = from_checkout("snntorch_digits.net")
    frames = net.load_split()[1].images[: count_of(batch, images) * batch]
    config = _config(batch, net.TIME_STEPS, net.IMAGE_SIZE)
    name, build = f"snnTorch convnet @28, T = 25, batch {batch}", net.load_checkpoint
    return Workload(name, config, build, frames.split(batch), reset=rests_itself, readout=_mean_of_spikes, freeze=False)


def spiking_resnet18(batch: int, side: int, images: int = IMAGES) -> Workload:
    """The trained ResNet-18 on photographs it has not seen; its stand-in where there is no checkpoint."""
    name = f"spiking_resnet18 @{side}, batch {batch}"
    trained = None if checkout() is None else from_checkout("benchmarks.trained")
    if trained is None or not trained.CHECKPOINT.exists():
        return stand_in(name, RESNET18, LIF_DENSITY, batch, side, images)
    _, inputs = trained.resnet18(side, batch, count_of(batch, images))
    return Workload(name, _config(batch, TIME_STEPS, side), trained.load, inputs)


def _config(batch: int, steps: int, side: int, activity: str = "trained") -> dict[str, Any]:
    return {"batch": batch, "T": steps, "resolution": side, "activity": activity}


def rests_itself(_net: nn.Module) -> None:
    """For networks whose forward starts from silence, as snnTorch's that call ``init_leaky``."""


def _mean_of_spikes(output: tuple[Tensor, Tensor]) -> Tensor:
    return output[0].mean(0)


# ---- stand-ins


def activity(density: float = LIF_DENSITY) -> str:
    """What a table says of a stand-in.

    >>> activity(0.32)
    "random weights, every layer's threshold set so that 32% of it fire"
    """
    return f"random weights, every layer's threshold set so that {density:.0%} of it fire"


def stand_in(
    name: str, model: str, density: float, batch: int, side: int, images: int = IMAGES, steps: int = TIME_STEPS
) -> Workload:
    """A network of SpikingJelly's zoo, ``"module.function"``, at random weights, on smooth random images.

    Every layer fires with ``density``. The SEW family has IF neurons, the others LIF.
    """
    frames = smooth_images(count_of(batch, images) * batch, side)
    inputs = tuple(encode(part, steps) for part in frames.split(batch))
    config = _config(batch, steps, side, "stand-in") | {"density set": density}
    return Workload(name, config, functools.partial(_firing_zoo_net, model, inputs[0], density), inputs)


def _firing_zoo_net(model: str, x: Tensor, density: float) -> nn.Module:
    from .stand_ins import fire_like_trained

    torch.manual_seed(0)
    return fire_like_trained(zoo_net(model), x, density)


def zoo_net(model: str) -> nn.Module:
    """A multi-step network of SpikingJelly's zoo for ten classes, at random weights."""
    from spikingjelly.activation_based import functional, neuron, surrogate

    file, function = model.split(".")
    make = getattr(importlib.import_module(f"spikingjelly.activation_based.model.{file}"), function)
    options: dict[str, Any] = {"surrogate_function": surrogate.ATan(), "detach_reset": True, "num_classes": 10}
    sew = {"cnf": "ADD", "spiking_neuron": neuron.IFNode}
    net = make(**options, **(sew if "sew" in file else {"spiking_neuron": neuron.LIFNode}))
    functional.set_step_mode(net, "m")
    return net


def snntorch_dense(batch: int, width: int = 1000, images: int = IMAGES) -> Workload:
    """The fully connected network of snnTorch's fifth tutorial at random weights, T = 25, on smooth random images.

    https://snntorch.readthedocs.io/en/latest/tutorials/tutorial_5.html
    """
    frames = smooth_images(count_of(batch, images) * batch, _SNNTORCH_SIZE, 1).flatten(1)
    config = _config(batch, _SNNTORCH_STEPS, _SNNTORCH_SIZE, "stand-in") | {"width": width, "density set": LIF_DENSITY}
    build = functools.partial(_firing_snntorch_net, width, frames[:batch])
    name = f"snnTorch dense net, width {width}, T = 25, batch {batch}"
    inputs = frames.split(batch)
    return Workload(name, config, build, inputs, reset=rests_itself, readout=_mean_of_spikes, freeze=False)


def _firing_snntorch_net(width: int, x: Tensor) -> nn.Module:
    from .loops import SnnTorchDense
    from .stand_ins import fire_in_order

    torch.manual_seed(0)
    return fire_in_order(SnnTorchDense(x.shape[-1], width, 10, _SNNTORCH_STEPS), x, LIF_DENSITY, rests_itself)


def fully_connected(
    width: int,
    *,
    recurrent: bool,
    batch: int,
    steps: int,
    density: float,
    depth: int = 2,
    count: int = 4,
    name: str = "",
) -> Workload:
    """``depth`` hidden layers of LIF neurons, ``width`` wide and with or without recurrent weights, on spike trains.

    Inputs ``[T, batch, width]`` are independent spikes of the same ``density`` that every hidden layer is set to.
    """
    generator = torch.Generator().manual_seed(width)
    inputs = tuple((torch.rand(steps, batch, width, generator=generator) < density).float() for _ in range(count))
    kind = "recurrent" if recurrent else "feed-forward"
    config = {"width": width, "batch": batch, "T": steps, "depth": depth, "net": kind}
    build = functools.partial(_firing_dense_net, width, depth, recurrent, inputs[0], density)
    return Workload(name or f"{kind}, width {width}", config | {"activity": "stand-in"}, build, inputs)


def _firing_dense_net(width: int, depth: int, recurrent: bool, x: Tensor, density: float) -> nn.Module:
    from .baselines import reset_spikingjelly
    from .loops import feed_forward, recurrent_net
    from .stand_ins import fire_in_order, fire_like_trained

    torch.manual_seed(0)
    if recurrent:
        return fire_in_order(recurrent_net(width, depth), x, density, reset_spikingjelly)
    return fire_like_trained(feed_forward(width, depth), x, density)
