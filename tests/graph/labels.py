"""Shared by the tests of the graph package."""

from __future__ import annotations

from torch import nn

from sparseflow.graph import SpikeMap, spike_map


class Opaque(nn.Module):
    """Hides a model from the fx tracer, which cannot follow control flow on values; results are the same."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) if x.isfinite().all() else x


def both_ways(model: nn.Module, x) -> tuple[SpikeMap, SpikeMap]:
    """Spike maps of the model by fx and by dynamic discovery, with equal names."""
    watched = spike_map(Opaque(model), (x,))
    assert watched.method == "dynamic"
    prefix = len("model.")
    renamed = tuple(
        type(site)(**{**vars(site), "name": site.name[prefix:], "detail": site.detail.replace("model.", "")})
        for site in watched.layers
    )
    return spike_map(model, (x,)), SpikeMap(renamed, "dynamic", watched.fallback_detail)


def provenances(model: nn.Module, x) -> dict[str, str]:
    """Provenance by layer name, after checking that both methods say the same."""
    traced, watched = both_ways(model, x)
    assert traced.method == "fx", traced.fallback_detail
    found = {site.name: site.provenance.name for site in traced.layers}
    assert found == {site.name: site.provenance.name for site in watched.layers}
    return found
