"""The fused convolution in Triton's interpreter against the reference.

Weights of whole sixteenths make every sum exact in any order, so that spikes have to be equal bit for bit; sums of
other weights have to stay inside the error budget of the float64 oracle.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflow.kernels.blocks import reference
from sparseflow.kernels.blocks.records import Dynamics, Epilogue, State
from sparseflow.kernels.blocks.spikes import PackedSpikes
from sparseflow.kernels.geometry import ConvGeometry
from sparseflow.kernels.triton.blocks.layout import Layout, Variant
from sparseflow.kernels.triton.blocks.ops import TritonBlockOps
from sparseflow.neuron import Charge, Reset, ResetTiming

from ..cases import SEEDS, Case, convolutions
from .cases import IF_AT_ONE, LIF, NEURONS, assert_same, copied, draw, neuron_of, same_state, state_of

OPS = TritonBlockOps()
DENSITIES = st.sampled_from([0.0, 0.05, 0.3, 1.0])
CONFIGURATIONS = tuple(
    map(
        Variant.from_name,
        ("p64-t4-words-n64-w4-s3", "p64-t2-channels-n64-w4-s3", "p16-t4-channels-n64-w4-s3", "p16-t1-words-n64-w4-s3"),
    )
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A convolution with what surrounds it: ``geometry`` of ``steps * batch`` images, and its weight."""

    x: PackedSpikes
    geometry: ConvGeometry
    weight: torch.Tensor
    epilogue: Epilogue
    steps: int

    @property
    def plain_weight(self) -> torch.Tensor:
        return self.weight.reshape(*self.weight.shape[:2], *self.geometry.kernel)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.geometry.batch // self.steps, self.geometry.out_pixels, self.geometry.out_channels

    def run(self, variant: str, neuron: Dynamics | None = None, state: State | None = None) -> Any:
        packed = OPS.pack_weight(self.weight, self.geometry, variant)
        return OPS.conv(self.x, packed, self.geometry, variant, self.epilogue, neuron, state, self.steps)

    def expected(self, neuron: Dynamics, state: State) -> Any:
        return reference.conv(self.x, self.plain_weight, self.geometry, self.epilogue, neuron, state, self.steps)


def block_of(
    case: Case, steps: int, density: float, seed: int, *, dyadic=True, most=1, residual=None, affine=True
) -> Block:
    """A block of ``steps`` time steps of the images of ``case``."""
    torch.manual_seed(seed)
    n, channels, *size = case.x_shape
    x = draw((steps, n), channels, tuple(size), density, most=most, seed=seed)
    c = case.call
    shape = (steps * n, channels, *size)
    geometry = ConvGeometry.from_call(shape, case.w_shape, c.stride, c.padding, c.dilation, c.groups)
    weight, outputs = torch.randn(case.w_shape), case.w_shape[0]
    scale, shift = (torch.randn(outputs) for _ in range(2)) if affine else (None, None)
    if dyadic:
        weight = (weight * 16).round() / 16
    others = {
        None: lambda: None,
        "dense": lambda: torch.randn(geometry.batch, geometry.out_pixels, outputs),
        "spikes": lambda: draw((steps, n), outputs, geometry.out_size, 0.3, seed=seed + 1),
        "counts": lambda: draw((steps, n), outputs, geometry.out_size, 0.5, most=3, seed=seed + 1),
    }
    return Block(x, geometry, weight, Epilogue(scale, shift, others[residual]()), steps)


def check(block: Block, variant: str, neuron: Dynamics, *, fresh: bool, seq: bool = False) -> PackedSpikes:
    state = state_of(neuron, block.state_shape, block.steps, fresh=fresh, seq=seq)
    other = copied(state)
    found = block.run(variant, neuron, state)
    assert_same(found, block.expected(neuron, other))
    assert same_state(state, other)
    return found


def plain(x_shape, w_shape, stride=1, padding=0, dilation=1, groups=1) -> Case:
    from sparseflow.kernels.base import ConvCall

    dims = len(x_shape) - 2
    call = ConvCall((stride,) * dims, ((padding, padding),) * dims, (dilation,) * dims, groups)
    return Case(x_shape, w_shape, call)


@settings(max_examples=24, deadline=None)
@given(
    convolutions(channels=(1, 3, 40), outputs=(1, 5, 33)),
    st.sampled_from(CONFIGURATIONS[:3]),
    st.integers(1, 5),
    DENSITIES,
    st.sampled_from([1, 1, 3]),
    st.sampled_from([None, "dense", "spikes", "counts"]),
    st.sampled_from(NEURONS),
    st.booleans(),
    st.booleans(),
    SEEDS,
)
def test_blocks_are_bit_exact(case, variant, steps, density, most, residual, kind, per_channel, fresh, seed):
    block = block_of(case, steps, density, seed, most=most, residual=residual)
    neuron = neuron_of(*kind, case.w_shape[0] if per_channel else None)
    check(block, variant.name, neuron, fresh=fresh, seq=seed % 2 == 0)


@settings(max_examples=12, deadline=None)
@given(
    convolutions(), st.sampled_from(CONFIGURATIONS[:3]), st.integers(1, 2), DENSITIES, st.sampled_from([1, 200]), SEEDS
)
def test_sums_stay_inside_the_error_budget(case, variant, steps, density, most, seed):
    block = block_of(case, steps, density, seed, dyadic=False, most=most, affine=False)
    assert within_budget(block.run(variant.name), block)


def within_budget(sums: torch.Tensor, block: Block) -> bool:
    """Twice the error of PyTorch's float32 against the oracle, and one rounding band."""
    weight = block.plain_weight
    exact, dense, size = (reference.sums(block.x, w, block.geometry) for w in (weight.double(), weight, weight.abs()))
    return bool(((sums - exact).abs() <= 2 * (dense - exact).abs().max() + 2.0**-23 * size).all())


@pytest.mark.parametrize(
    ("case", "steps", "name"),
    [
        (plain((1, 3, 10, 9), (5, 3, 7, 7), 2, 3), 1, "p16-t1-words-n64-w4-s4"),
        (plain((1, 40, 6, 9), (20, 40, 3, 3), 1, 1), 2, "p64-t1-words-n128-w8-s4"),
        (plain((1, 40, 5, 5), (70, 40, 3, 3), 2, 1), 4, "p64-t4-words-n32-w4-s3"),
        (plain((1, 40, 3, 3), (130, 40, 1, 1), 1, 0), 8, "p16-t8-channels-n128-w4-s4"),
        (plain((2, 70, 3, 5), (33, 70, 1, 1)), 3, "p64-t2-channels-n64-w4-s3"),
        (plain((1, 40, 8, 8), (33, 40, 1, 1)), 1, "p64-t1-channels-n64-w4-s4"),
        (plain((2, 300, 1), (10, 300, 1)), 3, "p4-t4-channels-n64-w4-s4"),
        (plain((2, 2100, 1), (10, 2100, 1)), 4, "p4-t4-words-n64-w4-s4"),
        (plain((1, 5, 2, 3, 3), (5, 5, 2, 3, 3), 1, 1), 2, "p64-t2-words-n64-w4-s4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_kind_of_layer(case, steps, name):
    check(block_of(case, steps, 0.1, 0), name, LIF, fresh=True)


@pytest.mark.parametrize(
    ("groups", "channels", "outputs", "most"),
    [(40, 1, 1, 1), (70, 1, 1, 3), (6, 4, 8, 1), (3, 40, 5, 1), (3, 32, 32, 3)],
)
@pytest.mark.parametrize("variant", CONFIGURATIONS[2:], ids=lambda v: v.name)
def test_groups_and_depthwise(groups, channels, outputs, most, variant):
    case = plain((1, groups * channels, 3, 4), (groups * outputs, channels, 2, 3), 1, 1, groups=groups)
    check(block_of(case, 2, 0.2, groups, most=most), variant.name, LIF, fresh=True)


@pytest.mark.parametrize("variant", CONFIGURATIONS, ids=lambda v: v.name)
def test_state_is_carried_over_calls_and_runs_of_steps(variant):
    case = plain((2, 20, 3, 4), (9, 20, 3, 3), 1, 1)
    neuron = neuron_of(Charge.SYNAPTIC, Reset.HARD, ResetTiming.BOTH, ">")
    whole = block_of(case, 6, 0.2, 0)
    state = state_of(neuron, whole.state_shape, 6, fresh=True)
    together = whole.run(variant.name, neuron, state)
    parts, bits = state_of(neuron, whole.state_shape, 6, fresh=True), []
    for first, last in ((0, 5), (5, 6)):
        images = slice(first * 2, last * 2)
        x = dataclasses.replace(whole.x, bits=whole.x.bits[images].contiguous(), lead=(last - first, 2))
        geometry = dataclasses.replace(whole.geometry, batch=2 * (last - first))
        part = dataclasses.replace(whole, x=x, geometry=geometry, steps=last - first)
        bits.append(part.run(variant.name, neuron, parts).bits)
        parts = dataclasses.replace(parts, fresh=False)
    assert torch.equal(torch.cat(bits), together.bits)
    assert torch.equal(parts.v, state.v)


def test_a_synaptic_current_need_not_be_kept():
    neuron = neuron_of(Charge.SYNAPTIC, Reset.SOFT, ResetTiming.SAME_STEP, ">=")
    block = block_of(plain((1, 20, 4, 4), (9, 20, 3, 3), 1, 1), 5, 0.2, 0)
    for fresh in (True, False):
        state = dataclasses.replace(state_of(neuron, block.state_shape, 5, fresh=fresh), syn=None)
        other = copied(state)
        assert_same(block.run(CONFIGURATIONS[1].name, neuron, state), block.expected(neuron, other))
        assert same_state(state, other)


@pytest.mark.parametrize("variant", CONFIGURATIONS, ids=lambda v: v.name)
def test_silence_reads_no_weight(variant):
    block = block_of(plain((1, 40, 9, 9), (9, 40, 3, 3), 1, 1), 4, 0.0, 0)
    poisoned = dataclasses.replace(block, weight=torch.full_like(block.weight, float("nan")))
    states = [state_of(LIF, block.state_shape, 4, fresh=True) for _ in range(2)]
    assert_same(poisoned.run(variant.name, LIF, states[0]), block.expected(LIF, states[1]))


def test_a_membrane_at_the_threshold_fires_or_not():
    block = block_of(plain((1, 4, 3, 3), (6, 4, 1, 1)), 2, 1.0, 0, affine=False)
    block = dataclasses.replace(block, weight=torch.full_like(block.weight, 0.125))
    for comparator, fired in ((">=", [0, 54]), (">", [0, 0])):
        neuron = dataclasses.replace(IF_AT_ONE, comparator=comparator)
        state = dataclasses.replace(state_of(neuron, block.state_shape, 2, fresh=True), start=0.0)
        found = block.run(CONFIGURATIONS[2].name, neuron, state)
        assert [int(OPS.unpack(found)[t].sum()) for t in range(2)] == fired


def test_weights_that_need_three_parts_and_channels_that_never_exist():
    block = block_of(plain((1, 20, 5, 5), (9, 20, 3, 3), 1, 1), 2, 0.3, 0, affine=False)
    scaled = block.weight * torch.logspace(-30, 20, 20).view(1, -1, 1, 1)
    block = dataclasses.replace(block, weight=scaled)
    assert OPS.pack_weight(scaled, block.geometry, "").parts.shape[0] == 3
    found = block.run(CONFIGURATIONS[1].name)
    assert within_budget(found, block)
    firing = dataclasses.replace(LIF, threshold=-float("inf"))
    spikes = block.run(CONFIGURATIONS[1].name, firing, state_of(firing, block.state_shape, 2, fresh=True))
    assert spikes.nonzero.item() == spikes.numel


@pytest.mark.parametrize("steps", [1, 3, 4, 16])
@pytest.mark.parametrize(
    ("channels", "size", "kernel", "groups"),
    [
        (3, (224, 224), 7, 1),
        (64, (56, 56), 3, 1),
        (512, (7, 7), 3, 1),
        (64, (56, 56), 1, 1),
        (384, (14, 14), 3, 384),
        (64, (1000,), 3, 1),
        (32, (8, 16, 16), 3, 1),
        (4096, (1,), 1, 1),
    ],
)
def test_variants_have_names_and_fit(channels, size, kernel, groups, steps):
    shapes = (2 * steps, channels, *size), (64 * groups, channels // groups, *[kernel] * len(size))
    ones = [1] * len(size)
    geometry = ConvGeometry.from_call(*shapes, ones, [kernel // 2] * len(size), ones, groups)
    names = OPS.variants(geometry, steps)
    assert 1 <= len(names) <= 4
    for variant in map(Variant.from_name, names):
        rows = variant.pixels * variant.steps
        assert variant.name in names
        assert rows >= 16
        assert rows * variant.block_n <= 64 * 32 * variant.warps
        assert variant.steps & (variant.steps - 1) == 0
        assert Layout.of(geometry, steps).tiling(variant.pixels).rows == variant.pixels


def test_what_is_not_covered_has_no_variants():
    def geometry(batch, c, o, size, groups=1):
        return ConvGeometry.from_call((batch, c, *size), (o, c // groups, 1, 1), (1, 1), (0, 0), (1, 1), groups)

    assert OPS.variants(geometry(8, 64, 64, (56, 56)), 4)
    assert not OPS.variants(geometry(9, 64, 64, (56, 56)), 4)
    assert not OPS.variants(geometry(4, 64, 64, (60_000, 60_000)), 4)
    assert not OPS.variants(geometry(4, 33 * 4095, 33 * 4095, (4, 4), groups=33), 4)


def test_layouts_merge_groups_and_rows():
    depthwise = ConvGeometry.from_call((4, 70, 5, 5), (70, 1, 3, 3), (1, 1), (1, 1), (1, 1), 70)
    layout = Layout.of(depthwise, 2)
    assert (layout.merged, layout.geometry.groups, layout.geometry.batch) == (32, 3, 2)
    assert (layout.group_words, layout.group_out_words, layout.most_out_words) == (1, 1, 2)
    linear = ConvGeometry.from_call((8, 600, 1), (10, 600, 1), (1,), (0,), (1,), 1)
    assert Layout.of(linear, 4).geometry.out_size == (1, 1, 2)
    assert Layout.of(linear, 4).geometry.batch == 1


def test_another_name_is_no_variant():
    with pytest.raises(ValueError, match="not a variant"):
        Variant.from_name("tile8-channels-n64-k32-w4-s3")
