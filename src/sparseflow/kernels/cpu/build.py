"""Compiles the native CPU engine: one shared library, one translation unit per instruction set.

Standard library only, because ``setup.py`` runs this file before anything is installed. The library has a C ABI and
no torch headers, so one build serves every torch version.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE_DIR = Path(__file__).parent / "csrc"
LIBRARY_NAME = "libsparseflow_cpu.so"

# No -ffast-math: NaN and infinities must survive. No contraction: fused multiply-adds are written where they are meant,
# so that every instruction set rounds a binary input the same way.
COMMON_FLAGS = (
    "-std=c++17",
    "-O2",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-fno-exceptions",
    "-fno-rtti",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
    "-Wno-unknown-pragmas",
    # GCC 12 sees the deliberately undefined lanes inside its own AVX-512 intrinsics.
    "-Wno-maybe-uninitialized",
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
X86_UNITS: dict[str, tuple[str, ...]] = {
    "portable": (),
    "avx2": ("-DSF_AVX2", *_AVX2),
    "avx512": ("-DSF_AVX512", *_AVX2, *_AVX512),
    "avx512vbmi": ("-DSF_AVX512", "-DSF_VBMI", *_AVX2, *_AVX512, "-mavx512vbmi", "-mavx512vbmi2"),
}


class BuildError(RuntimeError):
    """The native engine could not be compiled; the message holds the compiler's output."""


def find_compiler() -> str:
    """Path of the C++ compiler: ``$CXX``, else g++, clang++ or c++. Raises :class:`BuildError` if there is none."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise BuildError("no C++ compiler found (looked for $CXX, g++, clang++, c++)")


def units() -> dict[str, tuple[str, ...]]:
    """Instruction sets to compile for on this processor family, with their compiler flags."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32
    return X86_UNITS if is_x86 else {"portable": ()}


def fingerprint(compiler: str) -> str:
    """Hash of everything the library depends on: sources, flags and compiler version."""
    digest = hashlib.sha256()
    for path in sorted(SOURCE_DIR.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    version = _run([compiler, "--version"])
    digest.update(repr((COMMON_FLAGS, units(), version)).encode())
    return digest.hexdigest()[:16]


def build(output: Path, compiler: str | None = None, extra_flags: Sequence[str] = ()) -> None:
    """Compile the engine to ``output``, replacing it atomically. Raises :class:`BuildError`."""
    compiler = compiler or find_compiler()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        flags = [*COMMON_FLAGS, *_openmp_flags(compiler, Path(scratch)), *extra_flags]
        commands = {
            isa: [compiler, *flags, *isa_flags, "-c", str(SOURCE_DIR / "kernels.cpp"), "-o", f"{scratch}/{isa}.o"]
            for isa, isa_flags in units().items()
        }
        commands["engine"] = [compiler, *flags, "-c", str(SOURCE_DIR / "engine.cpp"), "-o", f"{scratch}/engine.o"]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands.values()))
        library = Path(scratch, LIBRARY_NAME)
        _run([compiler, *flags, "-shared", *(command[-1] for command in commands.values()), "-o", str(library)])
        os.replace(library, output)


def _openmp_flags(compiler: str, scratch: Path) -> list[str]:
    probe = scratch / "probe.cpp"
    probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    try:
        _run([compiler, "-fopenmp", str(probe), "-o", str(scratch / "probe")])
    except BuildError:
        return []
    return ["-fopenmp"]


def _run(command: Sequence[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if result.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{result.stderr.strip()}")
    return result.stdout
