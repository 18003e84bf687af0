"""What :func:`sparseflow.aggregate` did to a network, and what that cost and gained."""

from __future__ import annotations

import dataclasses
import enum

from sparseflow.report import render


class Mode(enum.StrEnum):
    """What becomes of time."""

    EXACT = "exact"
    COLLAPSE = "collapse"
    PRESERVE = "preserve"


@dataclasses.dataclass(frozen=True)
class LayerAggregation:
    """One layer, on the example.

    Attributes:
        name, neuron: of the layer and of the neuron behind it.
        mode, group_size: K is 1 where it is exact, or runs on frames that an earlier layer collapsed.
        note: why it is exact, or what to know about it.
        accuracy: of the network once this layer was chosen, in 0..1; ``None`` without ``validate``.
        spikes: that the neuron fired, exact and as it is now; one after a collapse stands for a whole chunk.
        ms: shortest time of layer and neuron for the whole example in ms, exact (one call for all steps) and now.
    """

    name: str
    neuron: str
    mode: Mode
    group_size: int = 1
    note: str = ""
    accuracy: float | None = None
    spikes: tuple[float, float] | None = None
    ms: tuple[float, float] | None = None

    @property
    def drift(self) -> float | None:
        """Spikes now over spikes before.

        >>> LayerAggregation("conv", "lif", Mode.PRESERVE, 2, spikes=(100.0, 90.0)).drift
        0.9
        """
        return self.spikes[1] / self.spikes[0] if self.spikes and self.spikes[0] else None

    @property
    def speedup(self) -> float | None:
        """Time before over time now."""
        return self.ms[0] / self.ms[1] if self.ms else None


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """The whole network. Lossy: none of this belongs beside exact results.

    Attributes:
        mode: asked for or found; exact where nothing could be aggregated within ``max_drop``.
        time_share: share of the variance between the frames of the first layer's input that is in time
            (:func:`~sparseflow.temporal.time_share`).
        order_drop: accuracy that is lost when the frames of the input are shuffled; ``None`` where that was not asked.
        accuracy: before and after; ``None`` without ``validate``.
        ms: shortest time of a call on the example, before and after.
    """

    mode: Mode
    time_share: float
    order_drop: float | None
    accuracy: tuple[float, float] | None
    ms: tuple[float, float]
    layers: tuple[LayerAggregation, ...]

    def __str__(self) -> str:
        from rich.table import Table

        table = Table("layer", "mode", "K", "spikes", "ms", "speedup", "accuracy", "note")
        for layer in self.layers:
            table.add_row(
                layer.name or layer.neuron,
                layer.mode,
                str(layer.group_size),
                _shown(layer.drift, "{:.2f}x"),
                "" if layer.ms is None else f"{layer.ms[0]:.2f} -> {layer.ms[1]:.2f}",
                _shown(layer.speedup, "{:.2f}x"),
                _shown(layer.accuracy, "{:.1%}"),
                layer.note,
            )
        return render(*self._summary(), table)

    def _summary(self) -> list[str]:
        order = "" if self.order_drop is None else f"; shuffled frames cost {self.order_drop:.1%} accuracy"
        lines = [f"{self.mode} (lossy): {self.time_share:.0%} of what changes between frames is in time{order}"]
        if self.mode is Mode.EXACT:
            lines[0] = lines[0].replace("(lossy)", "(nothing aggregated)")
        if self.accuracy is not None:
            lines.append(f"accuracy {self.accuracy[0]:.1%} -> {self.accuracy[1]:.1%}")
        lines.append(f"{self.ms[0]:.2f} -> {self.ms[1]:.2f} ms a call, {self.ms[0] / self.ms[1]:.2f}x, eager")
        return lines


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
