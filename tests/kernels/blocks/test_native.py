"""The native operations against the reference, bit for bit, for every instruction set this machine has.

Weights are multiples of 2^-8, so that sums are exact whatever their order, and so are spikes and membranes that follow
from them. Results are written over memory that holds ones in every bit.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflow.kernels.base import ConvCall
from sparseflow.kernels.blocks import reference
from sparseflow.kernels.blocks.buffers import BufferPool
from sparseflow.kernels.blocks.records import Dynamics, Epilogue, State, pooled_size
from sparseflow.kernels.blocks.spikes import PackedSpikes, as_tensor, channels_last, pack, spatial, unpack
from sparseflow.kernels.cpu import blocks, engine, loader
from sparseflow.kernels.geometry import ConvGeometry
from sparseflow.kernels.reference import excess
from sparseflow.kernels.weight_blocks import present_blocks, spread
from sparseflow.neuron import Charge, Reset, ResetTiming

pytestmark = pytest.mark.skipif(not engine.available(), reason="no native engine on this machine")

SEEDS = st.integers(0, 2**31 - 1)
DENSITIES = st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0])
CHANNELS = st.sampled_from([1, 2, 15, 16, 17, 48, 63, 64, 65, 70, 129, 200])
LEADS = st.tuples(st.integers(1, 4), st.integers(1, 3))  # T, N
SIZES = st.lists(st.integers(1, 7), max_size=3)
MOSTS = st.sampled_from([1, 1, 3])
WINDOWS = st.sampled_from([(1, 1, 0), (2, 2, 0), (3, 2, 1), (3, 1, 1), (2, 3, 1), (3, 3, 0)])  # kernel, stride, padding
CASES = settings(max_examples=60, deadline=None)


class SpoiledPool(BufferPool):
    """Every buffer, new or used, comes with ones in all bits: NaN, -1 or 255."""

    def take(self, shape, dtype):
        tensor = super().take(shape, dtype)
        tensor.view(torch.uint8).fill_(0xFF)
        return tensor


def ops():
    engine.library().sf_poison_workspace(0xFF)
    return blocks.NativeBlockOps(SpoiledPool())


@pytest.fixture(params=["avx512vbmi", "avx512", "avx2", "portable"], scope="module")
def isa(request):
    try:
        engine.select_isa(request.param)
    except loader.EngineUnavailableError as error:
        pytest.skip(str(error))
    yield request.param
    engine.select_isa("")


@pytest.fixture(params=[1, 2], scope="module")
def threads(request):
    """With two, every call uses both, however little there is to do."""
    patch, before = pytest.MonkeyPatch(), torch.get_num_threads()
    torch.set_num_threads(request.param)
    if request.param > 1:
        patch.setattr(engine, "MIN_PARALLEL_WORK", 0)
        patch.setattr(blocks, "_MIN_PARALLEL_NEURONS", 0)
    yield request.param
    patch.undo()
    torch.set_num_threads(before)


pytestmark = [pytestmark, pytest.mark.usefixtures("isa", "threads")]


# ---- drawn arguments -----------------------------------------------------------------------------------------------


def generator(seed):
    return torch.Generator().manual_seed(seed)


def spikes(shape, density, most=1, seed=0):
    """Dense spikes, and counts up to ``most``."""
    events = torch.rand(shape, generator=generator(seed)) < density
    return events * torch.randint(1, most + 1, shape, generator=generator(seed + 1)).float()


def packed(shape, density, most=1, seed=0, lead=2):
    """Packed spikes; with counts, even where none is above one, if ``most`` is."""
    x = spikes(shape, density, most, seed)
    found = pack(x, lead)
    if most > 1:
        return dataclasses.replace(found, counts=channels_last(x, lead).to(torch.uint8))
    return found


def grid(shape, seed, step=2.0**-8, most=1.0):
    """Multiples of ``step`` up to ``most``."""
    whole = int(most / step)
    return torch.randint(-whole, whole + 1, shape, generator=generator(seed)) * step


@st.composite
def neurons(draw, channels):
    """A neuron with constants on the grid, where sums meet the threshold, or odd ones; some of them one a channel."""
    odd, seed = draw(st.booleans()), draw(SEEDS)

    def constant(even, uneven):
        if draw(st.integers(0, 3)) == 0:
            return grid((channels,), seed, 2.0**-3, 2.0) + (3.0 if even == 2.0 else 0.0)
        return uneven if odd else even

    charge = draw(st.sampled_from(Charge))
    divides = charge in (Charge.LEAK, Charge.LEAK_INPUT)
    reset = draw(st.sampled_from(Reset))
    return Dynamics(
        charge,
        draw(st.sampled_from([">=", ">"])),
        reset,
        draw(st.sampled_from(ResetTiming)),
        reset_value=draw(st.sampled_from([0.0, 0.25, -0.3])) if reset is Reset.HARD else 0.0,
        threshold=constant(1.0, 0.7),
        decay=constant(2.0, draw(st.sampled_from([1.7, 4.0, 3.3]))) if divides else constant(0.5, 0.9),
        input_gains=(constant(1.0, 1.3), constant(0.5, 0.7), constant(1.0, 1.1)),
        synapse_decay=constant(0.5, 0.6),
    )


@st.composite
def epilogues(draw, lead, channels, size):
    """Scale, shift and residual for a layer whose output is ``[*lead, channels, *size]``."""
    images, pixels, seed = lead[0] * lead[1], torch.Size(size).numel(), draw(SEEDS)
    random = draw(st.booleans())

    def vector(offset):
        if not draw(st.booleans()):
            return None
        return torch.randn(channels, generator=generator(seed)) if random else grid((channels,), seed + offset, 0.25)

    kind = draw(st.sampled_from(["none", "none", "dense", "spikes", "counts"]))
    residual = None
    if kind == "dense":
        residual = torch.randn(images, pixels, channels, generator=generator(seed))
    elif kind != "none":
        residual = packed((*lead, channels, *size), 0.3, 255 if kind == "counts" else 1, seed)
    return Epilogue(vector(0), vector(1), residual)


@st.composite
def states(draw, neuron, shape, steps):
    """Memory that is carried over, or blank with NaN where nothing may read."""
    fresh, seed = draw(st.booleans()), draw(SEEDS)

    def memory(offset):
        nan = torch.full(shape, float("nan"))
        return nan if fresh else grid(shape, seed + offset, 0.125, 2.0)

    v_seq = torch.full((steps, *shape), float("nan")) if draw(st.booleans()) else None
    start = draw(st.sampled_from([0.0, 0.5, -0.3]))
    return State(memory(0), memory(1) if neuron.synaptic else None, fresh, start, v_seq)


def copied(state):
    tensors = {name: getattr(state, name) for name in ("v", "syn", "v_seq")}
    return dataclasses.replace(state, **{name: None if t is None else t.clone() for name, t in tensors.items()})


def assert_spikes(found: PackedSpikes, wanted: PackedSpikes):
    """Equal in every field; counts may be there for spikes that need none."""
    assert isinstance(found, PackedSpikes)
    assert (found.lead, found.channels) == (wanted.lead, wanted.channels)
    assert (found.size, found.dims) == (wanted.size, wanted.dims)
    assert torch.equal(found.bits, wanted.bits)
    assert torch.equal(found.row_counts, wanted.row_counts)
    assert found.row_counts.dtype is torch.int32
    assert found.nonzero.tolist() == wanted.nonzero.tolist()
    assert torch.equal(unpack(found), unpack(wanted))


def assert_states(found, wanted):
    for name in ("v", "syn", "v_seq"):
        a, b = getattr(found, name), getattr(wanted, name)
        assert a is b is None or torch.equal(a, b), name


# ---- without arithmetic --------------------------------------------------------------------------------------------


@CASES
@given(lead=LEADS, channels=CHANNELS, size=SIZES, density=DENSITIES, layout=st.booleans(), seed=SEEDS)
def test_pack(lead, channels, size, density, layout, seed):
    x = spikes((*lead, channels, *size), density, seed=seed)
    if layout:
        x = as_tensor(channels_last(x, 2), tuple(x.shape), 2)
    for leading in (2, 1):
        view = x if leading == 2 else x.flatten(0, 1)
        assert_spikes(ops().pack(view, leading), pack(view, leading))


@pytest.mark.parametrize("value", [2.0, 0.5, -1.0, float("nan"), float("inf")])
def test_what_is_no_spike_is_not_packed(value):
    x = spikes((2, 3, 70, 4), 0.3)
    x[1, 2, 69, 3] = value
    assert ops().pack(x, 2) is None


@CASES
@given(lead=LEADS, channels=CHANNELS, size=SIZES, density=DENSITIES, most=st.sampled_from([1, 3, 255]), seed=SEEDS)
def test_unpack(lead, channels, size, density, most, seed):
    x = packed((*lead, channels, *size), density, most, seed)
    assert torch.equal(ops().unpack(x), unpack(x))


@CASES
@given(lead=LEADS, channels=CHANNELS, size=SIZES, density=DENSITIES, mosts=st.tuples(MOSTS, MOSTS), seed=SEEDS)
def test_add(lead, channels, size, density, mosts, seed):
    shape = (*lead, channels, *size)
    a, b = packed(shape, density, mosts[0], seed), packed(shape, 0.4, mosts[1], seed + 2)
    assert_spikes(ops().add(a, b), pack(unpack(a) + unpack(b), 2))


def test_sums_end_at_255():
    x = torch.tensor([[200.0, 255.0, 100.0, 0.0, 255.0]])
    y = torch.tensor([[100.0, 255.0, 155.0, 0.0, 0.0]])
    assert unpack(ops().add(pack(x, 1), pack(y, 1))).tolist() == [[255.0, 255.0, 255.0, 0.0, 255.0]]


@CASES
@given(lead=LEADS, channels=CHANNELS, size=SIZES, densities=st.tuples(DENSITIES, DENSITIES), seed=SEEDS)
def test_logical(lead, channels, size, densities, seed):
    a, b = (packed((*lead, channels, *size), density, seed=seed + i) for i, density in enumerate(densities))
    x, y = unpack(a), unpack(b)
    for op, expected in (("and", x * y), ("and_not", x * (1 - y)), ("or", torch.maximum(x, y))):
        assert_spikes(ops().logical(a, b, op), pack(expected, 2))


@CASES
@given(lead=LEADS, channels=st.lists(CHANNELS, min_size=1, max_size=4), size=SIZES, density=DENSITIES, seed=SEEDS)
def test_concat(lead, channels, size, density, seed):
    parts = tuple(packed((*lead, c, *size), density, seed=seed + i) for i, c in enumerate(channels))
    assert_spikes(ops().concat(parts), pack(torch.cat([unpack(part) for part in parts], 2), 2))


@st.composite
def pools(draw, dilated):
    """Size, at least that of the window, and (D, H, W) triples of a pooling."""
    dims = draw(st.integers(1, 3))
    windows = [draw(WINDOWS) for _ in range(dims)]
    dilation = [draw(st.sampled_from([1, 1, 2])) if dilated else 1 for _ in range(dims)]
    extent = [d * (k - 1) + 1 for (k, _, _), d in zip(windows, dilation, strict=True)]
    size = [draw(st.integers(e, e + 5)) for e in extent]
    missing = 3 - dims
    kernel, stride, padding = zip(*[(1, 1, 0)] * missing, *windows, strict=True)
    return size, kernel, stride, padding, (*[1] * missing, *dilation)


@CASES
@given(lead=LEADS, channels=CHANNELS, pool=pools(dilated=True), density=DENSITIES, seed=SEEDS)
def test_max_pool(lead, channels, pool, density, seed):
    size, kernel, stride, padding, dilation = pool
    x = packed((*lead, channels, *size), density, seed=seed)
    dense = unpack(x).reshape(x.images, channels, *x.size)
    expected = F.max_pool3d(dense, kernel, stride, padding, dilation)
    shape = (*lead, channels, *expected.shape[5 - len(size) :])
    assert_spikes(ops().max_pool(x, kernel, stride, padding, dilation), pack(expected.reshape(shape), 2))


@CASES
@given(
    lead=LEADS,
    channels=CHANNELS,
    pool=pools(dilated=False),
    density=DENSITIES,
    most=st.sampled_from([1, 3, 255]),
    include=st.booleans(),
    seed=SEEDS,
)
def test_avg_pool(lead, channels, pool, density, most, include, seed):
    size, kernel, stride, padding, _ = pool
    x = packed((*lead, channels, *size), density, most, seed)
    dense = unpack(x).reshape(x.images, channels, *x.size)
    expected = F.avg_pool3d(dense, kernel, stride, padding, False, include)
    found = ops().avg_pool(x, kernel, stride, padding, include)
    assert torch.equal(found, expected.reshape(*lead, channels, *expected.shape[5 - len(size) :]))


# ---- neurons and layers --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data(), lead=LEADS, channels=CHANNELS, size=SIZES, seed=SEEDS)
def test_affine(data, lead, channels, size, seed):
    epilogue = data.draw(epilogues(lead, channels, size))
    currents = torch.randn(lead[0] * lead[1], torch.Size(size).numel(), channels, generator=generator(seed))
    expected = reference.affine(currents, epilogue)
    assert torch.equal(ops().affine(currents.clone(), epilogue), expected)


@settings(max_examples=250, deadline=None)
@given(
    data=st.data(), lead=LEADS, channels=CHANNELS, size=SIZES, odd=st.booleans(), invariant=st.booleans(), seed=SEEDS
)
def test_neuron(data, lead, channels, size, odd, invariant, seed):
    steps, batch = lead
    epilogue, neuron = data.draw(epilogues(lead, channels, size)), data.draw(neurons(channels))
    shape = (batch, torch.Size(size).numel(), channels)
    state = data.draw(states(neuron, shape, steps))
    currents = (batch if invariant else steps * batch, *shape[1:])
    x = 2 * torch.randn(currents, generator=generator(seed)) if odd else grid(currents, seed, 0.25, 3.0)
    wanted = copied(state)
    repeated = x.repeat(steps, 1, 1) if invariant else x
    dense = reference.run_neuron(reference.affine(repeated, epilogue), neuron, wanted, steps)
    expected = reference.packed_like(dense, spatial(tuple(size)), len(size))
    found = ops().neuron(x.clone(), spatial(tuple(size)), len(size), epilogue, neuron, state, steps)
    assert_spikes(found, expected)
    assert_states(state, wanted)


@pytest.mark.parametrize("timing", ResetTiming)
@pytest.mark.parametrize("reset", Reset)
@pytest.mark.parametrize("charge", Charge)
def test_extreme_membranes(charge, reset, timing):
    """What overflows, underflows or is not a number does what it does in PyTorch."""
    values = [0.0, -0.0, 1e-45, -1e-39, 1.0, 1e30, 3e38, -3e38, float("inf"), -float("inf"), float("nan"), 16777217.0]
    picked = torch.randint(0, len(values), (5 * 2, 3, 37), generator=generator(1))
    currents = torch.where(torch.rand(picked.shape) < 0.5, torch.randn(picked.shape), torch.tensor(values)[picked])
    for comparator in (">=", ">"):
        neuron = Dynamics(charge, comparator, reset, timing, 0.25, 1.0, 1.7, (1.3, 0.7, 1.1), 0.9)
        state, wanted = (State(torch.empty(2, 3, 37), torch.empty(2, 3, 37)) for _ in range(2))
        expected = reference.packed_like(reference.run_neuron(currents, neuron, wanted, 5), (1, 1, 3), 1)
        assert 0 < expected.nonzero.item() < expected.numel
        assert_spikes(ops().neuron(currents.clone(), (1, 1, 3), 1, Epilogue(), neuron, state, 5), expected)
        assert torch.equal(state.v.nan_to_num(7.0), wanted.v.nan_to_num(7.0))


@st.composite
def windows(draw, size):
    """Windows (D, H, W) of a pooling in front of the neuron that fit into maps of ``size``."""
    return tuple(draw(st.integers(1, min(3, extent))) for extent in size)


@settings(max_examples=120, deadline=None)
@given(
    data=st.data(), lead=LEADS, channels=CHANNELS, size=SIZES, odd=st.booleans(), invariant=st.booleans(), seed=SEEDS
)
def test_neuron_behind_pooling(data, lead, channels, size, odd, invariant, seed):
    (steps, batch), maps = lead, spatial(tuple(size))
    window = data.draw(windows(maps))
    epilogue = dataclasses.replace(data.draw(epilogues(lead, channels, size)), window=window)
    neuron, left = data.draw(neurons(channels)), pooled_size(maps, window)
    shape = (batch, torch.Size(left).numel(), channels)
    state = data.draw(states(neuron, shape, steps))
    currents = (batch if invariant else steps * batch, torch.Size(size).numel(), channels)
    x = 2 * torch.randn(currents, generator=generator(seed)) if odd else grid(currents, seed, 0.25, 3.0)
    wanted = copied(state)
    affine = reference.affine(x.repeat(steps, 1, 1) if invariant else x, epilogue)
    dense = reference.run_neuron(reference.pooled(affine, maps, window), neuron, wanted, steps)
    expected = reference.packed_like(dense, left, len(size))
    found = ops().neuron(x.clone(), maps, len(size), epilogue, neuron, state, steps)
    assert_spikes(found, expected)
    assert_states(state, wanted)


@pytest.mark.parametrize("channels", [5, 12, 16, 30, 37])
def test_maxima_of_what_is_no_number(channels):
    """NaN wins, infinities are numbers, and of zeros the first of a window stays, sign and all."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan")])
    picked = values[torch.randint(0, len(values), (3 * 2, 7 * 5, channels), generator=generator(channels))]
    rare = torch.rand(picked.shape, generator=generator(1)) < 0.2
    currents = torch.where(picked.isnan() & ~rare, torch.tensor(0.5), picked)
    for window in ((1, 2, 2), (1, 3, 1), (1, 3, 3), (1, 1, 2)):
        x = reference.pooled(currents, (1, 7, 5), window)
        pixels = x.shape[1]
        # Without charge and reset the membrane after the first step is the input, plus a zero that keeps its sign.
        neuron = Dynamics(Charge.DECAY, ">", Reset.NONE, ResetTiming.NEXT_STEP, 0.0, 0.5, decay=0.0)
        state, wanted = (State(torch.empty(2, pixels, channels), start=-1.0) for _ in range(2))
        state.v_seq, wanted.v_seq = (torch.empty(3, 2, pixels, channels) for _ in range(2))
        dense = reference.run_neuron(x, neuron, wanted, 3)
        expected = reference.packed_like(dense, pooled_size((1, 7, 5), window), 2)
        found = ops().neuron(currents.clone(), (1, 7, 5), 2, Epilogue(window=window), neuron, state, 3)
        assert_spikes(found, expected)
        first, signs = x[:2].nan_to_num(7.0), x[:2].signbit() & ~x[:2].isnan()
        assert torch.equal(state.v_seq[0].nan_to_num(7.0), first)
        assert torch.equal(state.v_seq[0].signbit() & ~x[:2].isnan(), signs)
        assert torch.equal(state.v_seq.nan_to_num(7.0), wanted.v_seq.nan_to_num(7.0))


@st.composite
def layers(draw):
    """x shape ``[T, N, C, *size]``, weight shape and the call's arguments, with at least one output pixel."""
    steps, batch = draw(LEADS)
    rank = draw(st.sampled_from([1, 2, 2, 2, 3]))
    groups, channels = draw(st.sampled_from([(1, 1), (1, 2), (1, 31), (1, 64), (1, 70), (1, 130), (2, 20), (3, 33)]))
    outputs = draw(st.sampled_from([1, 10, 16, 33, 64, 96, 130] if groups == 1 else [16, 48, 64]))
    if draw(st.integers(0, 4)) == 0:  # a linear layer, or a point-wise one
        kernel = stride = dilation = [1] * rank
        padding, size = [(0, 0)] * rank, [1] * rank if draw(st.booleans()) else [3] * rank
        return (
            (steps, batch, groups * channels, *size),
            (groups * outputs, channels, *kernel),
            stride,
            padding,
            dilation,
            groups,
        )
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    stride = [draw(st.sampled_from([1, 1, 2, 3])) for _ in range(rank)]
    dilation = [draw(st.sampled_from([1, 1, 2])) for _ in range(rank)]
    padding = [(draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(rank)]
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [draw(st.integers(max(1, e - sum(p)), e + 5)) for e, p in zip(extent, padding, strict=True)]
    if rank < 3 and channels < 64 and draw(st.integers(0, 5)) == 0:
        size[-1] = draw(st.integers(60, 150))
    return (
        (steps, batch, groups * channels, *size),
        (groups * outputs, channels, *kernel),
        stride,
        padding,
        dilation,
        groups,
    )


def geometry_of(layer):
    x_shape, w_shape, stride, padding, dilation, groups = layer
    images = (x_shape[0] * x_shape[1], *x_shape[2:])
    return ConvGeometry.from_call(images, w_shape, stride, padding, dilation, groups)


def five_dims(weight):
    return weight.reshape(*weight.shape[:2], *[1] * (5 - weight.dim()), *weight.shape[2:])


SHARES = st.sampled_from([1.0, 0.7, 0.3, 0.0])  # of weight blocks that are there


def pruned(weight, share, seed):
    """``weight`` without some blocks of 16 x 16 channels."""
    kept = torch.rand(present_blocks(weight).shape, generator=generator(seed)) < share
    return weight * spread(kept, weight.shape)


def variants_for(weight, geometry, steps):
    return ops().variants(geometry, steps, ops().weight_share(five_dims(weight), geometry))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), layer=layers(), density=DENSITIES, share=SHARES, most=MOSTS, seed=SEEDS)
def test_conv(data, layer, density, share, most, seed):
    geometry, (steps, batch, *_) = geometry_of(layer), layer[0]
    x, weight = packed(layer[0], density, most, seed), pruned(grid(layer[1], seed), share, seed)
    size = geometry.out_size[3 - x.dims :]
    epilogue = data.draw(epilogues((steps, batch), geometry.out_channels, size))
    neuron = data.draw(st.none() | neurons(geometry.out_channels))
    shape = (batch, geometry.out_pixels, geometry.out_channels)
    state = None if neuron is None else data.draw(states(neuron, shape, steps))
    wanted = None if state is None else copied(state)
    expected = reference.conv(x, five_dims(weight), geometry, epilogue, neuron, wanted, steps)
    variants = variants_for(weight, geometry, steps)
    assert variants
    for variant in variants:
        own = None if state is None else copied(state)
        weights = ops().pack_weight(weight, geometry, variant)
        found = ops().conv(x, weights, geometry, variant, epilogue, neuron, own, steps)
        if neuron is None:
            assert torch.equal(found, expected), variant
        else:
            assert_spikes(found, expected)
            assert_states(own, wanted)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), layer=layers(), density=DENSITIES, most=MOSTS, seed=SEEDS)
def test_conv_pooling_neuron(data, layer, density, most, seed):
    geometry, (steps, batch, *_) = geometry_of(layer), layer[0]
    x, weight = packed(layer[0], density, most, seed), grid(layer[1], seed)
    size, window = geometry.out_size[3 - x.dims :], data.draw(windows(geometry.out_size))
    epilogue = data.draw(epilogues((steps, batch), geometry.out_channels, size))
    epilogue = dataclasses.replace(epilogue, window=window)
    neuron = data.draw(neurons(geometry.out_channels))
    pixels = torch.Size(pooled_size(geometry.out_size, window)).numel()
    state = data.draw(states(neuron, (batch, pixels, geometry.out_channels), steps))
    wanted = copied(state)
    expected = reference.conv(x, five_dims(weight), geometry, epilogue, neuron, wanted, steps)
    for variant in ops().variants(geometry, steps):
        own = copied(state)
        weights = ops().pack_weight(weight, geometry, variant)
        found = ops().conv(x, weights, geometry, variant, epilogue, neuron, own, steps)
        assert_spikes(found, expected)
        assert_states(own, wanted)


def test_a_pixel_that_only_sees_padding(isa):
    """One pixel in and one out, as in a linear layer, but not that one."""
    layer = ((2, 1, 64, 1), (33, 64, 1), [3], [(1, 1)], [1], 1)
    geometry = geometry_of(layer)
    assert geometry.out_pixels == 1
    x, weight = packed(layer[0], 1.0, 1, 0), grid(layer[1], 0)
    for variant in ops().variants(geometry, 2):
        weights = ops().pack_weight(weight, geometry, variant)
        assert not ops().conv(x, weights, geometry, variant, Epilogue(), None, None, 2).any(), variant


@settings(max_examples=40, deadline=None)
@given(layer=layers(), density=DENSITIES, most=MOSTS, seed=SEEDS)
def test_sums_stay_inside_the_error_budget(layer, density, most, seed):
    x_shape, w_shape, stride, padding, dilation, groups = layer
    geometry = geometry_of(layer)
    x, weight = packed(x_shape, density, most, seed), torch.randn(w_shape, generator=generator(seed))
    call = ConvCall(tuple(stride), tuple(padding), tuple(dilation), groups)
    for variant in ops().variants(geometry, x_shape[0]):
        weights = ops().pack_weight(weight, geometry, variant)
        sums = ops().conv(x, weights, geometry, variant, Epilogue(), None, None, x_shape[0])
        y = as_tensor(sums, (x.images, geometry.out_channels, *geometry.out_size[3 - x.dims :]), 1)
        assert excess(y, unpack(x).flatten(0, 1), weight, None, call) <= 1.0, variant


@settings(max_examples=40, deadline=None)
@given(data=st.data(), layer=layers(), density=DENSITIES, share=SHARES, seed=SEEDS)
def test_a_neuron_sees_the_sums_that_the_layer_returns(data, layer, density, share, seed):
    """Fused or not, the order of the additions is the same, so random weights give the same spikes too."""
    geometry, (steps, batch, *_) = geometry_of(layer), layer[0]
    x, weight = packed(layer[0], density, seed=seed), torch.randn(layer[1], generator=generator(seed))
    weight = pruned(weight, share, seed)
    neuron = data.draw(neurons(geometry.out_channels))
    for variant in variants_for(weight, geometry, steps):
        weights = ops().pack_weight(weight, geometry, variant)
        state = State(*(torch.empty(batch, geometry.out_pixels, geometry.out_channels) for _ in range(2)))
        wanted = copied(state)
        sums = ops().conv(x, weights, geometry, variant, Epilogue(), None, None, steps)
        found = ops().conv(x, weights, geometry, variant, Epilogue(), neuron, state, steps)
        dense = reference.run_neuron(sums, neuron, wanted, steps)
        assert_spikes(found, reference.packed_like(dense, geometry.out_size, x.dims))
        assert torch.equal(state.v, wanted.v)


def test_zero_blocks_bring_variants_that_skip_them():
    geometry = ConvGeometry.from_call((4, 64, 5, 5), (48, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    weight = grid((48, 64, 3, 3), 0)
    full = variants_for(weight, geometry, 2)
    half, most = (variants_for(pruned(weight, share, 1), geometry, 2) for share in (0.25, 0.9))
    assert not any(name.startswith("blocks") for name in full)
    assert half[0].startswith("blocks")
    assert most[-1].startswith("blocks")
    assert set(full) < set(half)


@pytest.mark.parametrize("channels", [1, 31, 64])
def test_groups_whose_spikes_would_share_a_byte_are_refused(channels):
    weight = (2 * 8, channels, 3, 3)
    geometry = ConvGeometry.from_call((2, 2 * channels, 5, 5), weight, (1, 1), (1, 1), (1, 1), 2)
    assert ops().variants(geometry, 1) == ()


def test_results_may_go_into_the_buffers_of_results():
    """What a plan does: give back what nobody reads any more, and run again on it with other spikes."""
    native = ops()
    geometry = ConvGeometry.from_call((6, 20, 5, 5), (33, 20, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    weight = grid((33, 20, 3, 3), 0)
    variant = native.variants(geometry, 3)[0]
    weights = native.pack_weight(weight, geometry, variant)
    neuron = Dynamics(Charge.LEAK_INPUT, ">=", Reset.HARD, ResetTiming.SAME_STEP, 0.0, 1.0, 2.0)
    for seed, density in enumerate([0.5, 0.0, 0.1]):
        x = packed((3, 2, 20, 5, 5), density, seed=seed)
        state, wanted = (State(torch.empty(2, 25, 33)) for _ in range(2))
        found = native.conv(x, weights, geometry, variant, Epilogue(), neuron, state, 3)
        assert_spikes(found, reference.conv(x, five_dims(weight), geometry, Epilogue(), neuron, wanted, 3))
        assert_states(state, wanted)
        native.pool.give_spikes(found)
