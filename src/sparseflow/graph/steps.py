"""The steps a traced graph is fused into: pure records, each with the graph nodes it stands for."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from torch import fx

Triple = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a value is seen as images: ``[*lead, channels, *size]``, or with channels and pixels flattened into one.

    ``most`` is the largest number a packed value can hold: 1 for spikes, more for sums of them.
    """

    lead: tuple[int, ...]
    channels: int
    size: tuple[int, ...]
    flat: bool = False
    most: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense tensor.

        >>> Layout((4, 1), 8, (3, 3), flat=True).shape
        (4, 1, 72)
        """
        if self.flat:
            return (*self.lead, self.channels * math.prod(self.size))
        return (*self.lead, self.channels, *self.size)

    @property
    def images(self) -> int:
        """Product of the leading sizes."""
        return math.prod(self.lead)

    @property
    def pixels(self) -> Triple:
        """Spatial sizes as three, ones in front."""
        d, h, w = (*[1] * (3 - len(self.size)), *self.size)
        return d, h, w


@dataclasses.dataclass(frozen=True, eq=False)
class Operand:
    """What a step reads: the value that ``node`` made, packed where it has a layout, else a dense tensor."""

    node: fx.Node
    packed: Layout | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """Something to execute. ``out``: the node whose value it makes; ``nodes``: all that it stands for, in order."""

    out: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Everything the step reads."""
        return ()

    @property
    def makes_packed(self) -> bool:
        """Whether the result is packed."""
        return True


@dataclasses.dataclass(frozen=True, eq=False)
class Eager(Step):
    """One node of the graph as it is, on dense tensors."""

    @property
    def operands(self) -> tuple[Operand, ...]:
        return tuple(Operand(node) for node in self.out.all_input_nodes)

    @property
    def makes_packed(self) -> bool:
        return False


@dataclasses.dataclass(frozen=True)
class Windows:
    """Max pooling of maps of ``size`` over windows that lie side by side, both (D, H, W); floor mode."""

    size: Triple
    window: Triple


@dataclasses.dataclass(frozen=True, eq=False)
class Block(Step):
    """``layer -> norm -> + residual -> max pooling -> neuron``, of which any part but the source may be missing.

    Attributes:
        source: packed spikes (then ``layer`` runs on events or on what they unpack to) or a dense tensor.
        layer, norm, neuron: qualified module names.
        residual: added before the neuron.
        layout: of the result.
        states: initial states that the graph passes to the neuron; else they are the module's own.
        membrane: the node that wants the membrane of every step, if any.
        over_time: whether the first of the leading sizes is T; else the neuron does one step.
        pool: in front of the neuron; only behind a layer.
        repeated: the layer's input has no time, and its sums are the same at every step.
    """

    source: Operand
    layout: Layout
    layer: str | None = None
    norm: str | None = None
    residual: Operand | None = None
    neuron: str | None = None
    states: tuple[fx.Node, ...] = ()
    membrane: fx.Node | None = None
    over_time: bool = True
    pool: Windows | None = None
    repeated: bool = False

    @property
    def operands(self) -> tuple[Operand, ...]:
        residual = () if self.residual is None else (self.residual,)
        return (self.source, *residual, *(Operand(node) for node in self.states))

    @property
    def makes_packed(self) -> bool:
        return self.neuron is not None

    @property
    def steps(self) -> int:
        """T of a block with a neuron."""
        return self.layout.lead[0] if self.neuron is not None and self.over_time else 1

    @property
    def map_size(self) -> Triple:
        """Spatial sizes of the layer's sums: those of the result, unless they are pooled."""
        return self.layout.pixels if self.pool is None else self.pool.size

    @property
    def state_lead(self) -> tuple[int, ...]:
        """Leading sizes of the neuron's state: those of its input without T."""
        return self.layout.lead[1:] if self.over_time else self.layout.lead


@dataclasses.dataclass(frozen=True, eq=False)
class Pool(Step):
    """Max pooling (packed result) or average pooling (dense result) of packed spikes, arguments as (D, H, W)."""

    source: Operand
    layout: Layout
    average: bool
    kernel: Triple
    stride: Triple
    padding: Triple
    dilation: Triple = (1, 1, 1)
    include_pad: bool = True

    @property
    def operands(self) -> tuple[Operand, ...]:
        return (self.source,)

    @property
    def makes_packed(self) -> bool:
        return not self.average


Combination = Literal["add", "and", "and_not", "concat"]


@dataclasses.dataclass(frozen=True, eq=False)
class Combine(Step):
    """Sum, product, ``a * (1 - b)`` or concatenation of packed spikes."""

    parts: tuple[Operand, ...]
    op: Combination

    @property
    def operands(self) -> tuple[Operand, ...]:
        return self.parts


@dataclasses.dataclass(frozen=True, eq=False)
class Unpack(Step):
    """The dense tensor of a packed value; ``out`` is the node by which dense consumers know it."""

    source: Operand

    @property
    def operands(self) -> tuple[Operand, ...]:
        return (self.source,)

    @property
    def makes_packed(self) -> bool:
        return False


@dataclasses.dataclass(frozen=True)
class FusedGraph:
    """Steps in order of execution.

    Attributes:
        refusals: by neuron or layer, why it is not part of a fused block.
        contiguous: nodes whose tensor was contiguous on the example.
        aliased: whether the graph writes into memory that more than one of its tensors share.
    """

    graph: fx.GraphModule
    steps: tuple[Step, ...]
    refusals: dict[str, str]
    contiguous: frozenset[fx.Node] = frozenset()
    aliased: bool = False

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The fused blocks."""
        return tuple(step for step in self.steps if isinstance(step, Block))
