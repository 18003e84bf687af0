"""Packed weights, records, build and loading of the native engine."""

from __future__ import annotations

import copy
import doctest
import pickle
import subprocess

import pytest
import torch

from sparseflow.kernels import geometry
from sparseflow.kernels.cpu import build, engine, loader, schedule

needs_engine = pytest.mark.skipif(not engine.available(), reason="no native engine on this machine")


def geometries():
    call = engine.ConvGeometry.from_call
    yield call((1, 64, 56, 56), (64, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    yield call((4, 512, 7, 7), (512, 512, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    yield call((1, 3, 9), (10, 3, 3), (2,), ((0, 1),), (1,), 1)
    yield call((2, 6, 4, 5, 6), (4, 3, 1, 2, 3), (1, 1, 1), (0, 1, 2), (1, 1, 2), 2)
    yield call((1, 48, 8, 8), (48, 1, 3, 3), (1, 1), (1, 1), (1, 1), 48)


def test_geometry_doctests():
    assert doctest.testmod(geometry).failed == 0


def test_geometry_of_asymmetric_padding():
    g = engine.ConvGeometry.from_call((1, 2, 5), (4, 2, 4), (1,), ((1, 2),), (1,), 1)
    assert (g.in_size, g.kernel, g.padding, g.out_size) == ((1, 1, 5), (1, 1, 4), (0, 0, 1), (1, 1, 5))


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "groups", "message"),
    [
        ((1, 4, 5, 5), (8, 3, 3, 3), 1, "do not fit"),
        ((1, 4, 5, 5), (7, 2, 3, 3), 2, "do not fit"),
        ((1, 4, 2, 2), (8, 4, 3, 3), 1, "does not fit input"),
        ((1, 4), (8, 4), 1, "1 to 3 dimensions"),
    ],
)
def test_impossible_geometry_is_an_error(x_shape, w_shape, groups, message):
    rank = len(x_shape) - 2
    with pytest.raises(ValueError, match=message):
        engine.ConvGeometry.from_call(x_shape, w_shape, (1,) * rank, (0,) * rank, (1,) * rank, groups)


@needs_engine
def test_geometry_copies_without_its_pointers():
    g = next(geometries())
    engine.prescan_conv(torch.zeros(1, 64, 56, 56), g)
    assert g._structs
    for other in (copy.deepcopy(g), pickle.loads(pickle.dumps(g))):
        assert other == g
        assert not other._structs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_variant_names_round_trip(dtype):
    proposed = [v for g in geometries() for v in engine.conv_variants(g, dtype)]
    proposed += engine.linear_variants(1, 4096, 1000, dtype) + engine.linear_variants(32, 10, 10, dtype)
    for variant in proposed:
        assert engine.Variant.from_name(variant.name) == variant
    for name in ("", "pixels", "pixels-b32-w0-s0-t0 ", "tiles-b32-w0-s0-t0"):
        with pytest.raises(ValueError, match="not a kernel variant"):
            engine.Variant.from_name(name)


def test_adaptive_variants_become_fixed_at_every_density():
    for g in geometries():
        for variant in engine.conv_variants(g, torch.float32):
            for density in (0.0, 0.01, 0.1, 0.5, 1.0):
                fixed = schedule.resolve(variant, g, torch.float32, density)
                assert fixed.block == variant.block
                assert fixed.width >= fixed.block
                assert fixed.tile > 0


def test_slabs_only_where_they_save_reads():
    """512 channels, whose weights are larger than L2: a slab pays where it is met several times, not where each row of
    weights is read once anyway."""

    def slab(batch, size, density):
        g = engine.ConvGeometry.from_call((4 * batch, 512, size, size), (512, 512, 3, 3), (1, 1), (1, 1), (1, 1), 1)
        return schedule.resolve(engine.Variant.from_name("outputs-b64-w0-s0-t0"), g, torch.float32, density).slab

    assert slab(batch=8, size=2, density=0.1) > 0
    assert slab(batch=1, size=5, density=0.05) > 0
    assert slab(batch=1, size=2, density=0.05) == 0
    assert slab(batch=8, size=2, density=0.005) == 0


def test_unsupported_dtypes_have_a_reason():
    g = next(geometries())
    assert engine.conv_supported(g, torch.float32) is None
    assert "float8" in engine.conv_supported(g, torch.float8_e5m2)
    wide = engine.ConvGeometry.from_call((1, 10**5, 9, 999), (1, 10**5, 9, 9), (3, 3), (0, 0), (1, 1), 1)
    assert "GiB" in engine.conv_supported(wide, torch.float64)


@needs_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"), [((128, 64, 3, 3), 1), ((40, 7, 3), 2), ((70, 1, 3, 3), 70), ((64, 16, 1, 2, 3), 1)]
)
def test_packed_weights_are_a_permutation_with_padding(dtype, shape, groups):
    weight = torch.arange(1, 1 + torch.Size(shape).numel()).view(shape).remainder(255).add(1).to(dtype)
    rank = len(shape) - 2
    size = tuple(shape[2:])
    g = engine.ConvGeometry.from_call(
        (1, shape[1] * groups, *size), shape, (1,) * rank, (0,) * rank, (1,) * rank, groups
    )
    for variant in engine.conv_variants(g, dtype):
        packed = engine.pack_conv_weight(weight, groups, variant)
        assert packed.dtype == dtype
        kept = packed[packed != 0]
        assert torch.equal(kept.sort().values, weight.flatten().sort().values)
        pack_groups = 1 if g.depthwise else groups
        padded = -(-shape[0] // pack_groups // variant.block) * variant.block * pack_groups
        assert packed.numel() == padded * weight[0].numel()


@needs_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_match_sees_a_stale_copy(dtype):
    weight = torch.randn(48, 20, 3, 3).to(dtype).to(memory_format=torch.channels_last)
    g = engine.ConvGeometry.from_call((1, 40, 8, 8), weight.shape, (1, 1), (1, 1), (1, 1), 2)
    for variant in engine.conv_variants(g, dtype):
        packed = engine.pack_conv_weight(weight, 2, variant)
        assert all(engine.weights_match(weight, packed, 2, variant, offset) for offset in range(100))
        changed = weight + 1
        assert not engine.weights_match(changed, packed, 2, variant, 0)
        one = weight.clone()
        one.data[17, 11, 2, 1] += 1
        assert not all(engine.weights_match(one, packed, 2, variant, offset) for offset in range(5000))


def test_environment_can_disable_the_engine(monkeypatch):
    monkeypatch.setenv("SPARSEFLOW_NATIVE", "0")
    with pytest.raises(loader.EngineUnavailableError, match="SPARSEFLOW_NATIVE=0"):
        loader.load()


@needs_engine
def test_environment_can_force_an_instruction_set(monkeypatch):
    monkeypatch.setenv("SPARSEFLOW_ISA", "portable")
    assert loader.load().sf_isa() == b"portable"
    assert engine.isa() == "portable"  # one library per process
    monkeypatch.setenv("SPARSEFLOW_ISA", "sse9")
    with pytest.raises(loader.EngineUnavailableError, match="sse9"):
        loader.load()
    monkeypatch.delenv("SPARSEFLOW_ISA")
    engine.select_isa("")
    assert engine.isa() != "sse9"


def test_no_compiler_is_a_reason_not_a_crash(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "LIBRARY_NAME", "missing.so")
    with pytest.raises(loader.EngineUnavailableError, match="no C\\+\\+ compiler found"):
        loader.load()


def test_a_failing_compiler_is_quoted(tmp_path):
    with pytest.raises(build.BuildError, match=r"compiler: \[Errno 2\]"):
        build.build(tmp_path / "x.so", str(tmp_path / "compiler"))


def test_foreign_libraries_are_refused(tmp_path):
    path = tmp_path / "foreign.so"
    path.write_bytes(b"not a library")
    assert loader.open_library(path) is None


def test_units_share_no_weak_symbols(tmp_path):
    """An inline function compiled for AVX-512 and kept by the linker for all would crash older processors."""
    try:
        compiler = build.find_compiler()
        symbols = subprocess.run(["nm", "--version"], capture_output=True, check=True)
    except (build.BuildError, OSError):
        pytest.skip("needs a compiler and nm")
    assert symbols.returncode == 0
    defined = {}
    for unit, flags in build.units().items():
        target = tmp_path / f"{unit}.o"
        command = [compiler, *build.COMMON_FLAGS, "-O0", *flags, "-c", str(build.SOURCE_DIR / "kernels.cpp")]
        subprocess.run([*command, "-o", str(target)], check=True)
        listing = subprocess.run(["nm", "--defined-only", str(target)], capture_output=True, text=True, check=True)
        names = {line.split()[-1] for line in listing.stdout.splitlines() if line.split()[-2] in "WVuT"}
        defined[unit] = {name for name in names if not name.startswith("DW.ref")}
    units = list(defined)
    assert all(defined[unit] for unit in units)
    for i, first in enumerate(units):
        for second in units[i + 1 :]:
            assert not defined[first] & defined[second]
