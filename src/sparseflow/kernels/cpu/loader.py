"""Finds the native engine: the library installed with the package, else one compiled now into a user cache."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import filelock
import platformdirs
import torch  # noqa: F401  (must be loaded first: the engine then shares torch's OpenMP runtime and its threads)

from . import build

ABI_VERSION = 5
_log = logging.getLogger("sparseflow")


class EngineUnavailableError(RuntimeError):
    """There is no native engine on this machine; the message says why and what to do."""


def load() -> ctypes.CDLL:
    """The engine's library, ready to call. Raises :class:`EngineUnavailableError`.

    ``SPARSEFLOW_NATIVE=0`` disables the engine, ``SPARSEFLOW_ISA`` (``avx512vbmi``, ``avx512``, ``avx2`` or
    ``portable``) forces an instruction set.
    """
    if os.environ.get("SPARSEFLOW_NATIVE", "1") == "0":
        raise EngineUnavailableError("the native engine is disabled by SPARSEFLOW_NATIVE=0")
    installed = Path(__file__).parent / build.LIBRARY_NAME
    library = open_library(installed) if installed.exists() else None
    if library is None:
        library = open_library(_compiled())
    if library is None:
        raise EngineUnavailableError("the native engine was compiled but cannot be loaded by this Python")
    select(library, os.environ.get("SPARSEFLOW_ISA", ""))
    return library


def select(library: ctypes.CDLL, isa: str) -> str:
    """Make ``library`` use an instruction set, the best one for ``""``. Raises :class:`EngineUnavailableError`."""
    chosen = library.sf_select(isa.encode())
    if chosen is None:
        raise EngineUnavailableError(
            f"this processor cannot run SPARSEFLOW_ISA={isa!r} (avx512vbmi, avx512, avx2 or portable)"
        )
    return chosen.decode()


def _compiled() -> Path:
    try:
        compiler = build.find_compiler()
        folder = Path(platformdirs.user_cache_dir("sparseflow"), "cpu", build.fingerprint(compiler))
        path = folder / build.LIBRARY_NAME
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / "build.lock"):
            if not path.exists():
                _log.info("compiling the native CPU engine (once, about a minute) into %s", folder)
                build.build(path, compiler)
    except (build.BuildError, OSError) as error:
        raise EngineUnavailableError(
            f"no native engine: {error}. Install a C++ compiler (g++ or clang++) and run again"
        ) from error
    return path


def open_library(path: Path) -> ctypes.CDLL | None:
    """The engine at ``path``, ready to :func:`select`; ``None`` if it is foreign or of another version."""
    try:
        library = ctypes.CDLL(str(path))
        if library.sf_abi_version() != ABI_VERSION:
            return None
    except (OSError, AttributeError):
        return None
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    signatures: dict[str, tuple[object, Sequence[object]]] = {
        "sf_select": (ctypes.c_char_p, [ctypes.c_char_p]),
        "sf_isa": (ctypes.c_char_p, []),
        "sf_prescan": (None, [pointer] * 5 + [integer]),
        "sf_conv": (integer, [pointer] * 8 + [integer, integer]),
        "sf_linear": (integer, [pointer] * 8 + [integer, integer]),
        "sf_block_conv": (integer, [pointer] * 7 + [integer]),
        "sf_chain": (size, [pointer, size, integer, size]),
        "sf_watch": (None, [pointer, size]),
        "sf_watched_hold": (integer, [pointer, size, size]),
        "sf_block_dense": (integer, [pointer] * 2 + [integer]),
        "sf_unpack": (None, [pointer] * 2 + [size, size, pointer, integer]),
        "sf_add": (None, [pointer] * 4 + [size] * 3 + [pointer] * 4 + [integer]),
        "sf_logical": (None, [pointer] * 2 + [integer, size, size] + [pointer] * 3 + [integer]),
        "sf_max_pool": (None, [pointer] * 5 + [integer]),
        "sf_avg_pool": (None, [pointer] * 4 + [integer]),
        "sf_concat": (None, [integer] + [pointer] * 2 + [size] * 2 + [pointer] * 3 + [integer]),
        "sf_pack": (None, [pointer] * 3 + [size, size, integer, pointer, integer]),
        "sf_match": (integer, [pointer] * 3 + [size, size, integer, pointer, pointer, size, size]),
        "sf_poison_workspace": (None, [integer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
