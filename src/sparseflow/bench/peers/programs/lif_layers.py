"""Worker program: a linear layer and LIF neurons over T steps, as each framework computes them.

All of them compute ``v = v / 2 + W x``, a spike where v reaches 1, and v = 0 after a spike; none has a bias. Where a
framework scales its input, its weights were multiplied by the inverse, a power of two. The linear layer runs once for
all steps wherever the framework lets it: that is each one's best. Neurons start from rest in every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch_common import OnTorch, compiled, read
from wire import serve

_LEAK = 0.5
_LARGEST_CHUNK = 25  # time steps that are unrolled into one compiled function


class Layer(OnTorch):
    """Spikes ``[T, N, C]`` to spikes, through what ``make`` builds of the weights ``[C, C]``."""

    def __init__(self, make: Callable[[Tensor], Callable[[Tensor], Tensor]], problem: dict[str, Any]):
        super().__init__(problem)
        self.run = make(read(problem["weight"], problem["w"]).to(self.device))

    def result(self, x: Tensor) -> Tensor:
        return self.run(x)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta").eval()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def loop(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Plain PyTorch, in place."""
    layer = _linear(weight)

    def run(x: Tensor) -> Tensor:
        currents = layer(x)
        v = torch.zeros_like(currents[0])
        for current in currents:
            v.mul_(_LEAK).add_(current)
            fired = v >= 1.0
            v.masked_fill_(fired, 0.0)
            current.copy_(fired)
        return currents

    return run


def compiled_loop(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The same under ``torch.compile``: as many steps in one function as it compiles in reasonable time."""
    layer = compiled(_linear(weight))

    def steps(v: Tensor, currents: Tensor) -> tuple[Tensor, Tensor]:
        spikes = []
        for current in currents.unbind():
            v = v * _LEAK + current
            fired = v >= 1.0
            v = torch.where(fired, 0.0, v)
            spikes.append(fired.to(v.dtype))
        return v, torch.stack(spikes)

    fast = compiled(steps)

    def run(x: Tensor) -> Tensor:
        currents = layer(x)
        chunk = next(k for k in range(_LARGEST_CHUNK, 0, -1) if x.shape[0] % k == 0)
        v, spikes = torch.zeros_like(currents[0]), torch.empty_like(currents)
        for start in range(0, x.shape[0], chunk):
            v, spikes[start : start + chunk] = fast(v, currents[start : start + chunk])
        return spikes

    return run


def spikingjelly_net(weight: Tensor) -> nn.Module:
    """Multi-step layers; the implementation is what SpikingJelly picks, or SJ_LIF_CUDA_IMPLEMENTATION names."""
    from spikingjelly.activation_based import layer, neuron  # pyright: ignore[reportMissingImports]

    linear = layer.Linear(weight.shape[1], weight.shape[0], bias=False, step_mode="m")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    lif = neuron.LIFNode(tau=1 / _LEAK, decay_input=False, v_threshold=1.0, v_reset=0.0, step_mode="m")
    return nn.Sequential(linear, lif).eval()


def _reset_first(net: nn.Module) -> Callable[[Tensor], Tensor]:
    from spikingjelly.activation_based import functional  # pyright: ignore[reportMissingImports]

    def run(x: Tensor) -> Tensor:
        functional.reset_net(net)
        return net(x)

    return run


def spikingjelly(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Its multi-step network, eager."""
    return _reset_first(spikingjelly_net(weight))


class SnnTorchNet(nn.Module):
    """snnTorch's loop over time, its reset delayed by default: applied before the next step's decay, it acts alike."""

    def __init__(self, weight: Tensor):
        import snntorch  # pyright: ignore[reportMissingImports]

        super().__init__()
        self.linear = _linear(weight)
        self.lif = snntorch.Leaky(beta=_LEAK, threshold=1.0, reset_mechanism="zero").to(weight.device)

    def forward(self, x: Tensor) -> Tensor:
        currents, mem, spikes = self.linear(x), self.lif.init_leaky(), []
        for step in range(x.shape[0]):
            spike, mem = self.lif(currents[step], mem)
            spikes.append(spike)
        return torch.stack(spikes)


def snntorch(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Its network, eager."""
    return SnnTorchNet(weight).eval()


def norse(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Norse's LIF without a synaptic current, lifted over time; it halves its input, so the weights are doubled."""
    from norse.torch import LIFBoxCell, LIFBoxParameters, Lift  # pyright: ignore[reportMissingImports]

    dt = 2.0**-10
    layer = _linear(weight / _LEAK)
    lif = Lift(LIFBoxCell(LIFBoxParameters(tau_mem_inv=torch.tensor(_LEAK / dt, device=weight.device)), dt=dt))

    def run(x: Tensor) -> Tensor:
        return lif(layer(x))[0]

    return run


class Sinabs(Layer):
    """Its LIF with single spikes and a reset to 0. It wants ``[N, T, C]``, which is how its input lies in memory."""

    def __init__(self, problem: dict[str, Any]):
        super().__init__(self._make, problem)

    def _make(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        from sinabs.activation import MembraneReset, SingleSpike  # pyright: ignore[reportMissingImports]
        from sinabs.layers import LIF  # pyright: ignore[reportMissingImports]

        options = {"spike_fn": SingleSpike, "reset_fn": MembraneReset(), "norm_input": False, "train_alphas": True}
        lif = LIF(tau_mem=1.0, **options).to(weight.device)
        lif.alpha_mem.data.fill_(_LEAK)  # exactly, which exp(-1 / tau) would not be
        layer = _linear(weight)

        def run(x: Tensor) -> Tensor:
            lif.reset_states()
            return lif(layer(x))

        return run

    def prepared(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous()

    def save(self, output: Tensor, file: str) -> list[int]:
        return super().save(output.transpose(0, 1).contiguous(), file)


class Accelerated(OnTorch):
    """sparseflow on a framework's own network, planned with spikes of the density that is measured."""

    def __init__(self, framework: str, problem: dict[str, Any]):
        super().__init__(problem)
        weight = read(problem["weight"], problem["w"]).to(self.device)
        self.net = spikingjelly_net(weight) if framework == "spikingjelly" else SnnTorchNet(weight).eval()
        self.run = _reset_first(self.net) if framework == "spikingjelly" else self.net

    def load(self, files: Any) -> None:
        import sparseflow

        sparseflow.accelerate(sparseflow.restore(self.net), read(files[0], self.shape).to(self.device))
        super().load(files)
        self.note = "; ".join(sparseflow.report(self.net).notes)

    def result(self, x: Tensor) -> Tensor:
        return self.run(x)


_MAKERS = {"loop": loop, "compiled": compiled_loop, "spikingjelly": spikingjelly, "snntorch": snntorch, "norse": norse}


def build(variant: str, problem: dict[str, Any]) -> OnTorch:
    """The contender of that name."""
    if variant == "sinabs":
        return Sinabs(problem)
    if variant.startswith("sparseflow "):
        return Accelerated(variant.removeprefix("sparseflow "), problem)
    return Layer(_MAKERS[variant], problem)


if __name__ == "__main__":
    serve(build)
