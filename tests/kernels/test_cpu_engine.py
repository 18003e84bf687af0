"""The native engine's kernels against the float64 oracle, for every instruction set this machine has."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflow.kernels.base import ConvCall, LinearCall
from sparseflow.kernels.cpu import engine, loader
from sparseflow.kernels.cpu.records import Structure
from sparseflow.kernels.reference import excess

pytestmark = pytest.mark.skipif(not engine.available(), reason="no native engine on this machine")

DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
SEEDS = st.integers(0, 2**31 - 1)
DENSITIES = st.sampled_from([0.0, 0.01, 0.05, 0.2, 0.6, 1.0])
VALUES = st.sampled_from(["binary", "binary", "integer", "graded"])


@pytest.fixture(params=["avx512vbmi", "avx512", "avx2", "portable"], scope="module")
def isa(request):
    try:
        engine.select_isa(request.param)
    except loader.EngineUnavailableError as error:
        pytest.skip(str(error))
    yield request.param
    engine.select_isa("")


def poison_workspace():
    """Scratch memory of this thread becomes NaN, so that a sum that starts from it shows."""
    engine.library().sf_poison_workspace(0xFF)


def randn(*shape, seed, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def events(shape, density, values, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(shape, generator=generator) < density).to(dtype)
    if values == "graded":
        return mask * torch.randn(shape, generator=generator).to(dtype)
    if values == "integer":
        return mask * torch.randint(1, 4, shape, generator=generator).to(dtype)
    return mask


def to_layout(x, layout):
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        return torch.stack([x, x], dim=-1)[..., 0]
    return x.contiguous()


@st.composite
def convolutions(draw):
    """x shape, weight shape and the call's arguments, of which the output has at least one pixel."""
    rank = draw(st.sampled_from([1, 2, 2, 2, 3]))
    groups, channels = draw(
        st.sampled_from([(1, 1), (1, 2), (1, 31), (1, 64), (1, 70), (1, 130), (2, 20), (3, 33), (2, 65)])
    )
    outputs = draw(st.sampled_from([1, 10, 16, 33, 64, 96, 130]))
    if draw(st.integers(0, 5)) == 0:  # depthwise
        groups, channels, outputs = draw(st.sampled_from([2, 5, 64, 70, 129])), 1, 1
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    stride = [draw(st.sampled_from([1, 1, 2, 3])) for _ in range(rank)]
    dilation = [draw(st.sampled_from([1, 1, 2])) for _ in range(rank)]
    padding = [(draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(rank)]
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [draw(st.integers(max(1, e - sum(p)), e + 6)) for e, p in zip(extent, padding, strict=True)]
    if rank < 3 and channels < 64 and draw(st.integers(0, 3)) == 0:
        size[-1] = draw(st.integers(100, 270))
    x_shape = (draw(st.integers(1, 3)), groups * channels, *size)
    w_shape = (groups * outputs, channels, *kernel)
    return x_shape, w_shape, stride, padding, dilation, groups


@st.composite
def walks(draw):
    """A fixed way to walk the weights, or ``None`` for the variants the engine proposes."""
    if draw(st.booleans()):
        return None
    block = draw(st.sampled_from([32, 64, 128]))
    width = block * draw(st.sampled_from([1, 2, 4]))
    structure = draw(st.sampled_from([Structure.PIXELS, Structure.OUTPUTS]))
    return engine.Variant(structure, block, width, draw(st.integers(0, 3)), draw(st.sampled_from([1, 7, 40, 112])))


@settings(max_examples=500, deadline=None)
@given(
    case=convolutions(),
    walk=walks(),
    density=DENSITIES,
    values=VALUES,
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
    channels_last=st.booleans(),
    biased=st.booleans(),
    seed=SEEDS,
)
def test_conv_stays_inside_the_error_budget(
    isa, case, walk, density, values, dtype, layout, channels_last, biased, seed
):
    x_shape, w_shape, stride, padding, dilation, groups = case
    x = to_layout(events(x_shape, density, values, seed, dtype), layout)
    weight = randn(*w_shape, seed=seed, dtype=dtype)
    bias = randn(w_shape[0], seed=seed + 1, dtype=dtype) if biased else None
    geometry = engine.ConvGeometry.from_call(x_shape, w_shape, stride, padding, dilation, groups)
    assert engine.conv_supported(geometry, dtype) is None
    scan = engine.prescan_conv(x, geometry)
    call = ConvCall(tuple(stride), tuple(padding), tuple(dilation), groups)
    proposed = engine.conv_variants(geometry, dtype)
    for variant in proposed if walk is None or geometry.depthwise else [walk]:
        packed = engine.pack_conv_weight(weight, groups, variant)
        poison_workspace()
        y = engine.conv(x, scan, packed, bias, geometry, variant, channels_last=channels_last)
        assert engine._is_channels_last(y) if channels_last else y.is_contiguous()
        assert excess(y, x, weight, bias, call) <= 1.0, variant.name


@settings(max_examples=250, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 7, 33]),
    features=st.sampled_from([1, 7, 64, 130, 515]),
    outputs=st.sampled_from([1, 10, 64, 100, 600]),
    density=DENSITIES,
    values=VALUES,
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
    seed=SEEDS,
)
def test_linear_stays_inside_the_error_budget(isa, rows, features, outputs, density, values, dtype, biased, seed):
    x = events((rows, features), density, values, seed, dtype)
    weight = randn(outputs, features, seed=seed, dtype=dtype)
    bias = randn(outputs, seed=seed + 1, dtype=dtype) if biased else None
    scan = engine.prescan_linear(x)
    for variant in engine.linear_variants(rows, features, outputs, dtype):
        packed = engine.pack_linear_weight(weight, variant)
        out = torch.empty(rows, outputs, dtype=dtype)
        poison_workspace()
        assert engine.linear(x, scan, packed, bias, variant, out=out) is out
        assert excess(out, x, weight, bias, LinearCall()) <= 1.0, variant.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [1, 3, 63, 64, 65, 200])
def test_prescan_packs_every_event(isa, dtype, layout, channels):
    x = to_layout(events((2, channels, 3, 23), 0.2, "binary", channels, dtype), layout)
    geometry = engine.ConvGeometry.from_call(x.shape, (4, channels, 1, 1), (1, 1), (0, 0), (1, 1), 1)
    scan = engine.prescan_conv(x, geometry)
    words = -(-channels // 64)
    bits = scan.bits[: scan.words].view(2, 3, 23, words, 1) >> torch.arange(64) & 1
    expected = torch.zeros(2, 3, 23, words * 64)
    expected[..., :channels] = (x != 0).movedim(1, -1)
    assert torch.equal(bits.flatten(-2).float(), expected)
    assert scan.nonzero == int((x != 0).sum())
    assert scan.numel == x.numel()
    assert scan.words == 2 * 3 * 23 * words
    assert scan.occupied == int(expected.view(-1, 64).any(-1).sum())
    assert scan.density == scan.nonzero / scan.numel
    assert scan.occupancy == scan.occupied / scan.words
    assert scan.binary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("value", "event", "binary"),
    [
        (1.0, True, True),
        (0.0, False, True),
        (-0.0, False, True),
        (-1.0, True, False),
        (0.5, True, False),
        (2.0, True, False),
        (math.nan, True, False),
        (-math.inf, True, False),
        ("smallest", True, False),
    ],
)
def test_what_is_an_event(isa, dtype, value, event, binary):
    value = torch.finfo(dtype).smallest_normal / 8 if value == "smallest" else value
    x = torch.zeros(3, 100, dtype=dtype)
    x[1, 70] = value
    scan = engine.prescan_linear(x)
    assert scan.nonzero == event
    assert scan.binary == binary


def test_special_values_stay_where_they_belong(isa):
    """NaN and infinity reach the outputs that read them, and no other: not even by a product with zero."""
    x = torch.zeros(1, 70, 5, 5)
    x[0, 69, 0, 0] = math.nan
    x[0, 3, 4, 4] = 1.0
    weight = torch.randn(40, 70, 3, 3)
    weight[:, 5] = math.inf
    geometry = engine.ConvGeometry.from_call(x.shape, weight.shape, (1, 1), (1, 1), (1, 1), 1)
    variant = engine.conv_variants(geometry, x.dtype)[0]
    packed = engine.pack_conv_weight(weight, 1, variant)
    y = engine.conv(x, engine.prescan_conv(x, geometry), packed, None, geometry, variant, channels_last=False)
    reads_nan = torch.zeros(5, 5, dtype=torch.bool)
    reads_nan[:2, :2] = True
    assert torch.equal(y.isnan(), reads_nan.expand_as(y))
    assert not y.isinf().any()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("groups", [1, 40])
def test_silence_gives_the_bias_exactly(isa, channels_last, groups):
    x = torch.zeros(2, 40, 9, 9)
    weight, bias = torch.full((40, 40 // groups, 3, 3), math.nan), torch.randn(40)
    geometry = engine.ConvGeometry.from_call(x.shape, weight.shape, (2, 2), (1, 1), (1, 1), groups)
    for variant in engine.conv_variants(geometry, x.dtype):
        packed = engine.pack_conv_weight(weight, groups, variant)
        scan = engine.prescan_conv(x, geometry)
        y = engine.conv(x, scan, packed, bias, geometry, variant, channels_last=channels_last)
        assert torch.equal(y, bias.view(1, 40, 1, 1).expand(2, 40, 5, 5))


def test_empty_batch(isa):
    geometry = engine.ConvGeometry.from_call((0, 64, 8, 8), (32, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    variant = engine.conv_variants(geometry, torch.float32)[0]
    packed = engine.pack_conv_weight(torch.randn(32, 64, 3, 3), 1, variant)
    scan = engine.prescan_conv(torch.zeros(0, 64, 8, 8), geometry)
    assert (scan.nonzero, scan.density, scan.occupancy) == (0, 0.0, 0.0)
    y = engine.conv(torch.zeros(0, 64, 8, 8), scan, packed, None, geometry, variant, channels_last=False)
    assert y.shape == (0, 32, 8, 8)
    assert engine.prescan_linear(torch.zeros(0, 5)).nonzero == 0


@pytest.mark.parametrize("values", ["binary", "graded"])
@pytest.mark.parametrize(("channels", "size", "density"), [(64, 30, 0.02), (256, 14, 0.1), (96, 28, 0.3)])
def test_results_do_not_depend_on_the_number_of_threads(isa, channels, size, density, values):
    x = events((3, channels, size, size), density, values, 0, torch.float32)
    weight = torch.randn(128, channels, 3, 3)
    geometry = engine.ConvGeometry.from_call(x.shape, weight.shape, (1, 1), (1, 1), (1, 1), 1)
    before = torch.get_num_threads()
    try:
        for variant in engine.conv_variants(geometry, x.dtype):
            packed, results = engine.pack_conv_weight(weight, 1, variant), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                scan = engine.prescan_conv(x, geometry)
                results.append(engine.conv(x, scan, packed, None, geometry, variant, channels_last=False))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


def test_python_threads_do_not_share_scratch_memory():
    """Layers of different shapes run at the same time, each compared with its own result computed alone."""

    def run(channels, density, seed):
        x = events((2, channels, 20, 20), density, "graded", seed, torch.float32)
        weight = randn(channels, channels, 3, 3, seed=seed, dtype=torch.float32)
        geometry = engine.ConvGeometry.from_call(x.shape, weight.shape, (1, 1), (1, 1), (1, 1), 1)
        variant = engine.conv_variants(geometry, x.dtype)[0]
        packed = engine.pack_conv_weight(weight, 1, variant)
        scan = engine.prescan_conv(x, geometry)
        return engine.conv(x, scan, packed, None, geometry, variant, channels_last=False)

    cases = [(16, 0.5, 1), (64, 0.05, 2), (130, 0.2, 3), (33, 0.9, 4)]
    alone = [run(*case) for case in cases]
    wrong = []

    def repeat(i):
        for _ in range(10):
            if not torch.equal(run(*cases[i]), alone[i]):
                wrong.append(i)

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_outstanding_prescans_keep_their_bits():
    a, b = torch.ones(2, 64), torch.zeros(2, 64)
    variant = engine.linear_variants(2, 64, 8, a.dtype)[0]
    packed, out = engine.pack_linear_weight(torch.ones(8, 64), variant), torch.empty(2, 8)
    first, second = engine.prescan_linear(a), engine.prescan_linear(b)
    assert engine.linear(a, first, packed, None, variant, out=out).eq(64).all()
    assert engine.linear(b, second, packed, None, variant, out=out).eq(0).all()
