"""Another commit against this tree: the same cases, in alternation, each commit in a process of its own.

The other commit is checked out into a temporary git worktree. Both processes live through the comparison and take
turns (A B A B ...), so that a drift of the machine hits both alike; every crossover is measured by each for itself.
Only public functions of the package are used (:mod:`sparseflow.bench.worker`), so that BASE may be older than that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from sparseflow.errors import SparseflowError

from .compare import quantiles
from .records import Quantiles
from .suites import Options, models, nets
from .suites.baselines import reset_spikingjelly
from .suites.shapes import SHAPES

SUITES = ("layers", "models")
DENSITY = 0.05
_ROUNDS, _CALLS = 15, 8
_WORKER = Path(__file__).with_name("worker.py")
_SHAPES = ("3x3 256@14", "1x1 256->64@56", "linear 4096->4096, T*N 1")
_NETWORKS = {  # with the modules of examples/ that have load_checkpoint()
    "digits resnet18 @32, batch 1": "digits.net",
    "snnTorch convnet @28, T = 25, batch 1": "snntorch_digits.net",
}


class CompareError(SparseflowError):
    """The two commits cannot be compared."""


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A case: ms of both, and how often faster this tree is, by round. Without figures where an answer was wrong."""

    case: str
    base_ms: Quantiles | None
    ms: Quantiles | None
    ratio: Quantiles | None
    why: tuple[str, ...] = ()


def compare(
    base: str, options: Options, *, suites: Sequence[str] | None = None, only: str = "", as_json: bool = False
) -> int:
    """Print the ratio of every case. Returns 0, or 1 where a commit gave a wrong answer.

    Raises:
        CompareError: there is no checkout or no such commit, another suite was asked for, or a process failed.
    """
    if others := set(suites or ()) - set(SUITES):
        raise CompareError(f"--compare runs {' and '.join(SUITES)}, not {', '.join(sorted(others))}")
    root = toplevel(Path(__file__).parent)
    with tempfile.TemporaryDirectory(prefix="sparseflow-compare-") as folder, contextlib.ExitStack() as stack:
        scratch = Path(folder)
        tree = stack.enter_context(worktree(root, base, scratch))
        theirs, ours = (stack.enter_context(Side(source, options, scratch)) for source in (tree, root))
        ratios = [ratio_of(case, theirs, ours) for case in cases(scratch, suites or SUITES, only)]
    if as_json:
        print(json.dumps([dataclasses.asdict(ratio) for ratio in ratios], indent=1))
    else:
        Console().print(table(base, ratios))
    return int(any(ratio.why for ratio in ratios))


# ---- git


def toplevel(folder: Path) -> Path:
    """Root of the checkout that holds this package. Raises :class:`CompareError` outside of one."""
    try:
        root = Path(_git(folder, "rev-parse", "--show-toplevel"))
    except CompareError as error:
        raise CompareError(f"--compare needs a git checkout of sparseflow, and {folder} is in none") from error
    if not folder.is_relative_to(root / "src"):
        raise CompareError(f"--compare needs a git checkout of sparseflow; {folder} only lies in {root}")
    return root


@contextlib.contextmanager
def worktree(root: Path, commit: str, scratch: Path) -> Iterator[Path]:
    """``commit`` checked out below ``scratch``, for as long as the block runs. Raises :class:`CompareError`."""
    try:
        found = _git(root, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    except CompareError as error:
        raise CompareError(f"there is no commit {commit!r} in {root}") from error
    tree = scratch / "base"
    try:
        _git(root, "worktree", "add", "--detach", "--force", str(tree), found)
        yield tree
    finally:
        try:
            _git(root, "worktree", "remove", "--force", str(tree))
        except CompareError:  # it was never complete; its folder goes with ``scratch``
            shutil.rmtree(tree, ignore_errors=True)
            _git(root, "worktree", "prune")


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise CompareError("--compare needs git, and there is none on the path") from error
    except subprocess.CalledProcessError as error:
        raise CompareError(f"git {arguments[0]}: {error.stderr.strip()}") from error
    return done.stdout.strip()


# ---- cases


def cases(scratch: Path, suites: Iterable[str], only: str = "") -> Iterator[dict[str, Any]]:
    """What the workers are asked to run, of names with ``only`` in them; inputs are saved below ``scratch``."""
    if "layers" in suites:
        yield from (_layer(shape) for shape in SHAPES if shape.name in _SHAPES and only in shape.name)
    if "models" in suites and nets.checkout() is not None:
        made = dict(models.everything())
        for name, module in _NETWORKS.items():
            if only in name:
                yield _network(name, module, made[name](), scratch / f"{module}.pt")


def _layer(shape: Any) -> dict[str, Any]:
    fields = dataclasses.asdict(shape) | {"options": dict(shape.options), "density": DENSITY}
    return fields | {"name": f"layers: {shape.name}, {DENSITY:.0%}"}


def _network(name: str, module: str, workload: Any, path: Path) -> dict[str, Any]:
    torch.save(workload.inputs, path)
    resets = workload.reset is reset_spikingjelly
    return {"name": f"models: {name}", "module": module, "path": str(path), "resets": resets}


# ---- running


class Side:
    """One commit's process."""

    def __init__(self, tree: Path, options: Options, scratch: Path):
        self.tree = tree
        root = nets.checkout()
        examples = [str(root / "examples")] if root is not None else []
        cache = tempfile.mkdtemp(dir=scratch)
        path = os.pathsep.join([str(tree / "src"), *examples])
        # -P: the folder of the script, which holds modules of this tree, stays off the path.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(options.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "SPARSEFLOW_CACHE_DIR": cache},
        )

    def __enter__(self) -> Side:
        try:
            package = Path(self._receive()["package"])
            if not package.is_relative_to(self.tree):
                raise CompareError(f"{package} was imported instead of the package in {self.tree / 'src'}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request. Raises :class:`CompareError` where the process ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, errors = self._process.communicate()
            last = (errors.strip().splitlines() or ["no output"])[-1]
            raise CompareError(f"the process of {self.tree} ended with exit code {self._process.returncode}: {last}")
        return json.loads(line)


def ratio_of(case: dict[str, Any], theirs: Side, ours: Side) -> Ratio:
    """Both commits on one case, in turns."""
    loaded = {"base": theirs.ask(do="load", case=case), "this tree": ours.ask(do="load", case=case)}
    why = tuple(f"{name}: {text}" for name, found in loaded.items() if (text := found.get("error") or found.get("why")))
    if why:
        return Ratio(case["name"], None, None, None, why)
    before, now = [], []
    for _ in range(_ROUNDS):
        before.append(statistics.median(theirs.ask(do="time", calls=_CALLS)["ms"]))
        now.append(statistics.median(ours.ask(do="time", calls=_CALLS)["ms"]))
    ratios = [base / mine for base, mine in zip(before, now, strict=True)]
    return Ratio(case["name"], quantiles(before), quantiles(now), quantiles(ratios))


def table(base: str, ratios: Iterable[Ratio]) -> Table:
    """One row a case: ms of both, and the ratio with its 20 % and 80 % quantiles over the rounds."""
    found = Table(
        title=f"{base} over this tree: above 1, this tree is faster", box=box.SIMPLE_HEAD, title_justify="left"
    )
    for name in ("case", f"{base}, ms", "this tree, ms", "ratio", "20 % to 80 %"):
        found.add_column(name, justify="left" if name == "case" else "right")
    for ratio in ratios:
        if ratio.base_ms is None or ratio.ms is None or ratio.ratio is None:
            found.add_row(ratio.case, "-", "-", "-", "; ".join(ratio.why), style="red")
            continue
        low, middle, high = ratio.ratio
        spread = f"{low:.3f} to {high:.3f}"
        found.add_row(ratio.case, f"{ratio.base_ms[1]:.3f}", f"{ratio.ms[1]:.3f}", f"{middle:.3f}", spread)
    return found
