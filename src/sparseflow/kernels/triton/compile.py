"""Compile recorded launches for a GPU that need not be there, and read what the compiler made of them.

    python -m sparseflow.kernels.triton.compile [--target sm_90]... [--cover sm_80]... [--sample sm_100]... [--json]

compiles the kernels and variants that can ship for the layers of :mod:`.catalogue`: all of them (about a thousand) for
``--target``, a covering subset (:func:`covering`) for ``--cover``, and the start of that subset for ``--sample``.
Run it without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import math
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from .launch import Argument, Launch, interpreting

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_VENDORS = {"cuda": "nvidia", "hip": "amd"}
_INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "mma.sync": r"\bmma\.sync",
    "tcgen05.mma": r"tcgen05\.mma\.",
    "cp.async": r"cp\.async\.c[ag]\.",
    "ld.global.v4": r"ld\.global[\w.:]*\.v[48]\.",
    "mfma": r"\bv_mfma",
}
_SAMPLE = 24
_FUSED_SAMPLE = 6
_LABEL = re.compile(r"^\s*([$.]?\w+):")
_BRANCH = re.compile(r"\b(?:bra|s_cbranch|s_branch)\S*\s+([$.]?\w+)")
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one launch costs on one target.

    Sizes are bytes: ``shared`` per block, ``stack`` and ``local`` per thread. A spilled register lives on the stack, so
    no stack means no spill. ``registers`` are per thread. ``counts`` are instructions in the assembly, ``in_loop`` the
    same within loops only.
    """

    kernel: str
    target: str
    warps: int
    stages: int
    dtypes: tuple[str, ...]
    constants: dict[str, Any]
    registers: int
    stack: int
    local: int
    shared: int
    counts: dict[str, int]
    in_loop: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Failure:
    """A launch that does not compile, and what the compiler said."""

    kernel: str
    target: str
    constants: dict[str, Any]
    error: str


class _AbsentGpu:
    """The three answers of a driver that Triton's launcher needs to specialise and compile, without the GPU."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_device(self) -> str:
        # Kernels are cached per device, and every target is one.
        return str(self.target)

    def get_current_stream(self, device: str) -> int:  # noqa: ARG002
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextlib.contextmanager
def _pretending(target: GPUTarget) -> Iterator[None]:
    driver.set_active(_AbsentGpu(target))  # type: ignore[arg-type]
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # on a machine without a GPU there is nothing to go back to
            driver.reset_active()


def unsupported(target: str) -> str | None:
    """Why this Triton cannot compile for ``target``; ``None`` where it can.

    >>> unsupported("sm_90")
    """
    vendor = _VENDORS[TARGETS[target].backend]
    if vendor not in backends:
        return f"this Triton has no {vendor} backend"
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if target == "sm_100" and release < (3, 3):
        return f"Triton {triton.__version__} does not know sm_100; 3.3 does"
    return None


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compile ``launch`` for ``target`` (a key of :data:`TARGETS`) exactly as launching it there would.

    Triton's own launcher does the specialisation (pointer types, divisibility, constants, 64-bit integers), so what is
    compiled here is what ships, in every version of Triton.

    Raises:
        RuntimeError: under ``TRITON_INTERPRET=1``, where nothing can be compiled, or when Triton lacks the target.
    """
    if interpreting():
        raise RuntimeError("kernels were loaded under TRITON_INTERPRET=1; compile in a process without it")
    reason = unsupported(target)
    if reason is not None:
        raise RuntimeError(reason)
    with _pretending(TARGETS[target]):
        built = launch.kernel.warmup(
            **launch.arguments,
            **launch.constants,
            grid=launch.grid,
            num_warps=launch.warps,
            num_stages=launch.stages,
            enable_fp_fusion=launch.fp_fusion,
        )
    text = built.asm["ptx" if "ptx" in built.asm else "amdgcn"]
    usage = _nvidia_usage(built.asm["cubin"]) if "cubin" in built.asm else _amd_usage(text)
    return Compiled(
        kernel=launch.kernel.__name__,
        target=target,
        warps=launch.warps,
        stages=launch.stages,
        dtypes=tuple(str(a.dtype).removeprefix("torch.") for a in launch.arguments.values() if isinstance(a, Tensor)),
        constants=dict(launch.constants),
        shared=built.metadata.shared,
        counts=_counts(text),
        in_loop=_counts("\n".join(loop_lines(text))),
        **usage,
    )


def _counts(text: str) -> dict[str, int]:
    return {name: len(re.findall(pattern, text)) for name, pattern in _INSTRUCTIONS.items()}


def loop_lines(assembly: str) -> list[str]:
    """The lines between a label and a later branch back to it.

    >>> loop_lines("$A:\\n add;\\n$B:\\n mul;\\n bra $B;\\n ret;")
    ['$B:', ' mul;', ' bra $B;']
    """
    lines = assembly.splitlines()
    labels: dict[str, int] = {}
    inside: set[int] = set()
    for number, line in enumerate(lines):
        if label := _LABEL.match(line):
            labels[label[1]] = number
        elif (branch := _BRANCH.search(line)) and branch[1] in labels:
            inside.update(range(labels[branch[1]], number + 1))
    return [lines[number] for number in sorted(inside)]


def _nvidia_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        told = subprocess.run([_CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told)}
    return {"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"]}


def _amd_usage(assembly: str) -> dict[str, int]:
    found = {name: int(value) for name, value in re.findall(r"^\s*(?:- )?\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    return {
        "registers": found["vgpr_count"],
        "stack": found["private_segment_fixed_size"],
        "local": 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"]),
    }


def signature(launch: Launch) -> tuple[Any, ...]:
    """What tells two compiled kernels apart; launches of equal signature share one."""
    arguments = tuple((name, _specialised(value)) for name, value in launch.arguments.items())
    return launch.kernel.__name__, launch.warps, launch.stages, tuple(launch.constants.items()), arguments


def _specialised(value: Argument) -> object:
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0, value.untyped_storage().nbytes() < 2**31
    if isinstance(value, int):
        return value if value in (0, 1) else (value % 16 == 0, -(2**31) <= value < 2**31)
    return value if value is None else type(value)


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """One launch of each :func:`signature`."""
    return list({signature(launch): launch for launch in launches}.values())


def covering(launches: Iterable[Launch]) -> list[Launch]:
    """A small subset in which every constant's value, every size of a tile, every specialised argument and every warp
    and stage count of each kernel occurs at least once: greedily, the launch that adds most comes next.

    >>> covering([])
    []
    """
    pool = list(launches)
    features = {index: _features(launch) for index, launch in enumerate(pool)}
    missing = set().union(*features.values())
    kept: list[Launch] = []
    while missing:
        best = max(features, key=lambda index: len(features[index] & missing))
        missing -= features.pop(best)
        kept.append(pool[best])
    return kept


def _features(launch: Launch) -> set[tuple[Any, ...]]:
    name, warps, stages, constants, arguments = signature(launch)
    rows = math.prod(value for constant, value in launch.constants.items() if constant.startswith("TILE_"))
    return {(name, *pair) for pair in (("warps", warps), ("stages", stages), ("rows", rows), *constants, *arguments)}


@dataclasses.dataclass(frozen=True)
class _Job:
    """A launch for another process: a jit function travels as its name."""

    module: str
    launch: Launch
    target: str

    @classmethod
    def of(cls, launch: Launch, target: str) -> _Job:
        return cls(launch.kernel.fn.__module__, dataclasses.replace(launch, kernel=launch.kernel.__name__), target)

    def run(self) -> Compiled | Failure:
        kernel = getattr(importlib.import_module(self.module), self.launch.kernel)
        try:
            return compile_launch(dataclasses.replace(self.launch, kernel=kernel), self.target)
        except Exception as error:  # the compiler has many; every other launch is worth compiling all the same
            return Failure(self.launch.kernel, self.target, dict(self.launch.constants), _said(error))


def _said(error: BaseException) -> str:
    """The end of the compiler's message, and what it goes back to: Triton wraps an error once for each call."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error)[-500:]}"


def compile_all(jobs: Sequence[tuple[Launch, str]], workers: int = 2) -> Iterator[Compiled | Failure]:
    """Compile (launch, target) pairs in ``workers`` processes, in order."""
    packed = [_Job.of(launch, target) for launch, target in jobs]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(_Job.run, packed, chunksize=4)


def _row(built: Compiled | Failure) -> str:
    if isinstance(built, Failure):
        return f"{built.target:7} {built.kernel:22} DOES NOT COMPILE {built.constants}: {built.error}"
    counts = " ".join(f"{name} {count}" for name, count in built.counts.items() if count)
    constants = " ".join(f"{name}={value}" for name, value in built.constants.items())
    return (
        f"{built.target:7} {built.kernel:22} warps {built.warps} stages {built.stages} regs {built.registers:3} "
        f"stack {built.stack} shared {built.shared:6} [{counts}; in loops cp.async {built.in_loop['cp.async']}] "
        f"{'/'.join(built.dtypes)} {constants}"
    )


def _remarkable(built: Compiled | Failure) -> bool:
    return isinstance(built, Failure) or bool(built.stack or built.local)


def _jobs(options: argparse.Namespace, everything: list[Launch]) -> Iterator[tuple[Launch, str]]:
    """Fused blocks, which take long to compile, are covered apart from single layers, and fewer of them sampled."""
    fused = [launch for launch in everything if _is_fused(launch)]
    single = [launch for launch in everything if not _is_fused(launch)]
    for some, sample in ((single, _SAMPLE), (fused, _FUSED_SAMPLE)):
        subset = covering(some) if options.cover or options.sample else []
        wanted = ((options.target, some), (options.cover, subset), (options.sample, subset[:sample]))
        for targets, chosen in wanted:
            yield from ((launch, target) for target in targets for launch in chosen)


def _is_fused(launch: Launch) -> bool:
    return ".blocks." in launch.kernel.fn.__module__


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; ``--target sm_90`` where no target is named. Exit code 1 when a kernel does not compile,
    2 when none can be compiled.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS, default=[], help="compile everything for it")
    parser.add_argument(
        "--cover", action="append", choices=TARGETS, default=[], help="compile a covering subset for it"
    )
    parser.add_argument("--sample", action="append", choices=TARGETS, default=[], help="compile a few for it")
    parser.add_argument("--only", default="", help="substring of the catalogue's layers")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quiet", action="store_true", help="print what does not compile or has a stack frame, only")
    options = parser.parse_args(argv)
    if interpreting():
        print("nothing can be compiled under TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    if not (options.target or options.cover or options.sample):
        options.target = ["sm_90"]
    from .catalogue import launches

    jobs = [job for job in _jobs(options, distinct(launches(options.only))) if unsupported(job[1]) is None]
    rows = []
    for built in compile_all(jobs, options.workers):
        rows.append(built)
        if not options.json and (not options.quiet or _remarkable(built)):
            print(_row(built), flush=True)
    if options.json:
        absent = {target: reason for target in TARGETS if (reason := unsupported(target)) is not None}
        failed = [dataclasses.asdict(row) for row in rows if isinstance(row, Failure)]
        compiled = [dataclasses.asdict(row) for row in rows if isinstance(row, Compiled)]
        print(json.dumps({"compiled": compiled, "failed": failed, "unsupported": absent}))
    else:
        print(f"{len(rows)} launches, {sum(map(_remarkable, rows))} of them do not compile or have a stack frame")
    return int(any(isinstance(row, Failure) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
