"""One call signature of a layer: the kernels bound to it, and how one call chooses between them and dense."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from sparseflow.kernels.base import DENSITY, OCCUPANCY, Counts, HostKernel, Kernel, Refusal, counts
from sparseflow.plan import Crossover, Path, Reason

from .mailbox import Mailbox, capturing
from .packing import PackedWeight
from .policy import HYSTERESIS, BackOff, Policy, probe_interval
from .resident import ResidentWeight, leaves
from .stats import LayerStats

logger = logging.getLogger("sparseflow")
_ALIGNMENT = 16  # bytes; Triton compiles a kernel for pointers that are multiples of it, and another one for others


class Measured(NamedTuple):
    """Crossovers of one kernel: for calls from Python, and inside a CUDA graph, where the host costs nothing.

    On the CPU both are the same object.
    """

    eager: Crossover
    graph: Crossover


@dataclasses.dataclass
class LayerState:
    """What the sites of one layer share. ``forced``: sparse whatever it costs."""

    name: str
    stats: LayerStats
    forced: bool
    packed: PackedWeight = dataclasses.field(default_factory=PackedWeight)
    mailbox: Mailbox = dataclasses.field(default_factory=Mailbox)

    def __post_init__(self) -> None:
        self.resident = ResidentWeight(self.mailbox)
        self._said = False

    def acceptable_gain(self, gain_ms: float) -> float:
        """The gain that packing is weighed against."""
        return float("inf") if self.forced else gain_ms

    def say_captured_dense(self, why: str) -> None:
        """Log once that a CUDA graph is getting the dense layer."""
        if not self._said:
            self._said = True
            logger.warning(
                "%s: runs dense in the CUDA graph that is being captured: %s. Run the model with such an input some "
                "times before capturing.",
                *(self.name, why),
            )


Attempt = tuple[Path, "Tensor | None"]
_DENSE: Attempt = (Path.DENSE, None)


class Site(Protocol):
    """Chooses, call by call, for one signature."""

    @property
    def never(self) -> bool:
        """Whether the measured choice is dense whatever the input."""
        ...

    @property
    def candidates(self) -> tuple[tuple[Kernel, Measured], ...]:
        """The kernels to choose from."""
        ...

    def retune(self, crossover: Crossover) -> None:
        """Choose by ``crossover`` from now on."""
        ...

    def attempt(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Attempt:
        """The sparse result, or ``None`` where dense is to run."""
        ...

    def describe(self) -> dict[str, Any]:
        """Fields of a :class:`~sparseflow.plan.LayerPlan` as they stand now."""
        ...


class DenseSite:
    """A signature that no kernel covers, or an empty input."""

    never = True
    candidates: tuple[tuple[Kernel, Measured], ...] = ()

    def __init__(self, refusal: Refusal | None):
        self.refusal = refusal

    def retune(self, crossover: Crossover) -> None:
        raise ValueError(f"no kernel to choose by {crossover.key}")

    def attempt(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Attempt:  # noqa: ARG002
        return _DENSE

    def describe(self) -> dict[str, Any]:
        if self.refusal is None:
            return {"path": Path.DENSE, "reason": Reason.NOT_MEASURED}
        return {"path": Path.DENSE, "reason": self.refusal.reason, "detail": self.refusal.detail}


class HostSite:
    """A kernel whose prescan has its counts at hand: every call is decided by its own."""

    def __init__(self, kernel: HostKernel, measured: Measured, layer: LayerState):
        self.kernel, self.layer = kernel, layer
        self.policy = Policy(measured.eager)

    @property
    def never(self) -> bool:
        return self.policy.never

    @property
    def candidates(self) -> tuple[tuple[Kernel, Measured], ...]:
        return ((self.kernel, Measured(self.policy.crossover, self.policy.crossover)),)

    def retune(self, crossover: Crossover) -> None:
        self.policy = Policy(crossover)

    def attempt(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Attempt:
        kernel, policy = self.kernel, self.policy
        if policy.skip_scan():
            return _DENSE
        crossover = policy.crossover
        scan = kernel.prescan(x, crossover.variant)
        self.layer.stats.add(scan)
        density = scan.nonzero / scan.numel if scan.numel else 0.0
        if not policy.decide(density):
            return _DENSE
        gain_ms = self.layer.acceptable_gain(policy.gain_ms(density))
        packed = self.layer.packed.get(weight, kernel, crossover.variant, crossover, gain_ms)
        if packed is None:
            return _DENSE
        return kernel.path, kernel.compute(x, scan, packed, bias, crossover.variant)

    def describe(self) -> dict[str, Any]:
        if self.layer.forced:
            return {"path": self.kernel.path, "reason": Reason.FORCED}
        sparse = self.policy.sparse and not self.policy.never
        return {
            "path": self.kernel.path if sparse else Path.DENSE,
            "reason": Reason.SPARSE_WINS if sparse else Reason.DENSE_WINS,
            "detail": pruned_detail(self.kernel.weight_share, self.policy.crossover.variant) if sparse else "",
            "crossover": self.policy.crossover,
        }


def pruned_detail(weight_share: float, variant: str) -> str:
    """What a report says of a layer with zero weight blocks: how many are left, and the variant that won.

    >>> pruned_detail(0.25, "blocks-b16-w16-s0-t112"), pruned_detail(1.0, "pixels-b32-w0-s0-t0")
    ('25% of the weight blocks are left; blocks-b16-w16-s0-t112', '')
    """
    return f"{weight_share:.0%} of the weight blocks are left; {variant}" if weight_share < 1.0 else ""


@dataclasses.dataclass(eq=False)
class _Candidate:
    """A deferred kernel, its policies, and its load (on its own axis) as last seen; ``None`` before that.

    ``loaded`` says with which variants, forms of the weight and alignments of the input it has run: anything else would
    compile or load code, which is not allowed while a graph is captured.
    """

    kernel: Kernel
    eager: Policy
    graph: Policy
    load: float | None = None
    loaded: set[tuple[Any, ...]] = dataclasses.field(default_factory=set)

    def run(self, x: Tensor, packed: Any, bias: Tensor | None, variant: str) -> tuple[Any, Tensor]:
        """What the prescan found, and the result."""
        scan = self.kernel.prescan(x, variant)
        y = self.kernel.compute(x, scan, packed, bias, variant)
        self.loaded.add(_code(x, packed, variant))
        return scan, y

    def policy(self, graphed: bool) -> Policy:
        return self.graph if graphed else self.eager

    @property
    def useful(self) -> bool:
        """Whether there is a load at which it would run."""
        return not (self.eager.never and self.graph.never)

    @property
    def tells_density(self) -> bool:
        """Whether its load is one that every kernel counts."""
        return self.kernel.axis == DENSITY


def _code(x: Tensor, packed: Any, variant: str) -> tuple[Any, ...]:
    """What tells apart, among calls of one signature, those that run other compiled code."""
    weight = leaves(packed)[0]
    return variant, x.data_ptr() % _ALIGNMENT == 0, weight.dtype, weight.shape


class DeferredSite:
    """Kernels whose counts stay on the device: a call is decided by what arrived from earlier ones.

    The kernel that is running sends its counts, ever more rarely while they change nothing. The others are looked at
    in turn, rarely enough that their prescans cost at most 1 % of the dense time. A call that is being captured into a
    CUDA graph runs what is chosen at that moment, and every replay of the graph runs the same.
    """

    def __init__(self, candidates: tuple[tuple[Kernel, Measured], ...], layer: LayerState):
        self.layer = layer
        self._candidates = [_Candidate(kernel, Policy(m.eager), Policy(m.graph)) for kernel, m in candidates]
        self._running: dict[bool, _Candidate | None] = {False: None, True: None}
        self._reports = BackOff(1)
        self._looks = BackOff(max(probe_interval(m.eager) for _, m in candidates))
        self._turn = 0

    @property
    def never(self) -> bool:
        return not any(c.useful for c in self._candidates)

    @property
    def candidates(self) -> tuple[tuple[Kernel, Measured], ...]:
        return tuple((c.kernel, Measured(c.eager.crossover, c.graph.crossover)) for c in self._candidates)

    def retune(self, crossover: Crossover) -> None:
        for candidate in self._candidates:
            if candidate.eager.crossover.key == crossover.key:
                candidate.eager = Policy(crossover)
            if candidate.graph.crossover.key == crossover.key:
                candidate.graph = Policy(crossover)
        self._choose()

    def prime(self, x: Tensor) -> None:
        """Look at all kernels and wait for the counts, so that the first call is already decided by its input."""
        for candidate in self._candidates:
            self._see(candidate, counts(candidate.kernel.prescan(x, candidate.eager.crossover.variant)))
        self._reports.back_off()
        self._looks.back_off()

    def attempt(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Attempt:
        if capturing(x):
            return self._captured(x, weight, bias)
        self.layer.mailbox.poll()
        self.layer.resident.meet(weight)
        candidate = self._running[False]
        packed = None if candidate is None else self._pack(weight, candidate, graphed=False)
        self._look(x, None if packed is None else candidate)
        taken = _DENSE
        if candidate is not None and packed is not None:
            scan, y = candidate.run(x, packed, bias, candidate.eager.crossover.variant)
            taken = candidate.kernel.path, y
            if self._reports.due():
                self._send(candidate, scan)
                self._reports.back_off()
        self._prepare_capture(x, weight, bias)
        return taken

    def _captured(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Attempt:
        candidate = self._running[True]
        if candidate is None:
            return _DENSE
        variant = candidate.graph.crossover.variant
        packed = self.layer.resident.captured(weight, candidate.kernel, variant)
        if packed is None:
            self.layer.say_captured_dense("its weight has changed lately or is not finite")
            return _DENSE
        if _code(x, packed, variant) not in candidate.loaded:
            self.layer.say_captured_dense("its kernel has not run yet")
            return _DENSE
        return candidate.kernel.path, candidate.run(x, packed, bias, variant)[1]

    def _prepare_capture(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Pack for the kernel that a capture would run, and run it once: a capture can neither pack nor load code."""
        candidate = self._running[True]
        if candidate is None or not self.layer.resident.settled:
            return
        packed, variant = self._pack(weight, candidate, graphed=True), candidate.graph.crossover.variant
        if packed is not None and _code(x, packed, variant) not in candidate.loaded:
            candidate.run(x, packed, bias, variant)

    def _pack(self, weight: Tensor, candidate: _Candidate, *, graphed: bool) -> Any:
        policy = candidate.policy(graphed)
        gain_ms = self.layer.acceptable_gain(policy.gain_ms(candidate.load or 0.0))
        return self.layer.resident.get(weight, candidate.kernel, policy.crossover, gain_ms)

    def _look(self, x: Tensor, running: _Candidate | None) -> None:
        """Now and then, send the counts of a kernel whose load the running one does not tell."""
        if not self._looks.due():
            return
        self._looks.back_off()
        unseen = [c for c in self._candidates if c.useful and c is not running and not (running and c.tells_density)]
        if unseen:
            self._turn = (self._turn + 1) % len(unseen)
            candidate = unseen[self._turn]
            self._send(candidate, candidate.kernel.prescan(x, candidate.eager.crossover.variant))

    def _send(self, candidate: _Candidate, scan: Any) -> None:
        numel, words = scan.numel, scan.words

        def receive(nonzero: int, occupied: int) -> None:
            self._see(candidate, Counts(nonzero, numel, occupied, words))

        self.layer.mailbox.send(scan.totals(), receive)

    def _see(self, candidate: _Candidate, seen: Counts) -> None:
        """Take in counts: every kernel learns the density, only the one that counted its own occupancy."""
        self.layer.stats.add(seen)
        for other in self._candidates:
            if other is candidate or other.tells_density:
                other.load = seen.load(other.kernel.axis)
        if self._choose():
            self._reports.reset()
            self._looks.reset()

    def _choose(self) -> bool:
        """Choose anew from the loads last seen; whether that changed anything."""
        before = dict(self._running)
        self._running = {graphed: self._best(graphed) for graphed in (False, True)}
        return self._running != before

    def _best(self, graphed: bool) -> _Candidate | None:
        """The kernel predicted fastest among those ahead of dense; the running one where it is nearly as fast."""

        def time(candidate: _Candidate) -> float:
            return candidate.policy(graphed).relative_time(candidate.load or 0.0)

        ahead = [c for c in self._candidates if c.load is not None and c.policy(graphed).decide(c.load)]
        best, running = min(ahead, key=time, default=None), self._running[graphed]
        if best is not None and running in ahead and time(best) > (1 - HYSTERESIS) * time(running):
            return running
        return best

    def describe(self) -> dict[str, Any]:
        """As it stands after the counts that have arrived; of several kernels the one chosen, or nearest to it."""
        chosen = self._running[False]
        told = chosen or min(self._candidates, key=lambda c: c.eager.relative_time(c.load or 0.0))
        occupancy = {"occupancy": told.load} if told.kernel.axis == OCCUPANCY and told.load is not None else {}
        if self.layer.forced:
            return {"path": told.kernel.path, "reason": Reason.FORCED, **occupancy}
        return {
            "path": Path.DENSE if chosen is None else chosen.kernel.path,
            "reason": Reason.DENSE_WINS if chosen is None else Reason.SPARSE_WINS,
            "crossover": told.eager.crossover,
            **occupancy,
        }
