"""Environments of the peers' own: made with pip once, kept, and never a dependency of sparseflow.

An environment lies in ``SPARSEFLOW_PEERS_DIR``, or below the platform's user cache. One whose peer computes with
PyTorch reads the PyTorch that runs here instead of installing a second one; a peer that is importable here already
needs none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

import filelock
import torch

from sparseflow.errors import SparseflowError

PEERS_DIR = "SPARSEFLOW_PEERS_DIR"
_PIP_TIMEOUT_S = 1800
_RETRY_S = 3600  # a failed installation is not tried again for every case of a run
_LINES = 6


class InstallError(SparseflowError):
    """A peer's environment could not be made; the message is pip's."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Peers that share an environment.

    Attributes:
        name: of the environment's folder.
        requirements: what pip installs; nothing where the peer is PyTorch itself.
        module: what has to be importable for the environment to be right.
        packages: whose versions are recorded.
        on_torch: whether the peer computes with PyTorch, which it then finds where this process has it.
    """

    name: str
    requirements: tuple[str, ...]
    module: str
    packages: tuple[str, ...] = ()
    on_torch: bool = True


def peers_dir() -> Path:
    """Folder of all environments; ``SPARSEFLOW_PEERS_DIR`` overrides the platform's user cache."""
    override = os.environ.get(PEERS_DIR)
    if override:
        return Path(override)
    import platformdirs

    return Path(platformdirs.user_cache_dir("sparseflow", appauthor=False), "peers")


def python_of(group: Group, *, install: bool) -> Path:
    """The Python that runs the group's workers, after installing its packages if need be.

    Args:
        group: whose environment.
        install: whether to make an environment that is not there, which downloads and takes minutes.

    Raises:
        InstallError: pip failed, or there is no environment and ``install`` is off.
    """
    if group.on_torch and importlib.util.find_spec(group.module) is not None:
        return Path(sys.executable)
    folder = folder_of(group)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if (folder / "complete").exists():
        return python
    if not install:
        raise InstallError(f"not installed in {folder}, and a quick run installs nothing; run once without --quick")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            _make(group, folder, python)
    return python


def folder_of(group: Group) -> Path:
    """Where the group's environment is or would be: another set of requirements or another host has another one."""
    recipe = (*group.requirements, sys.version, torch.__version__, str(_site_packages()))
    return peers_dir() / f"{group.name}-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:10]}"


def _site_packages() -> Path:
    """The folder that PyTorch was imported from."""
    return Path(torch.__file__).resolve().parents[1]


def _make(group: Group, folder: Path, python: Path) -> None:
    failure = folder / "failure"
    if failure.exists() and time.time() - failure.stat().st_mtime < _RETRY_S:
        raise InstallError(failure.read_text())
    try:
        venv.EnvBuilder(with_pip=True, clear=True, symlinks=os.name != "nt").create(folder)
        constraints = _reuse_torch(folder, python) if group.on_torch else []
        _pip(python, "install", *constraints, *group.requirements)
        _run([str(python), "-c", f"import {group.module}"])
    except (InstallError, OSError, subprocess.SubprocessError) as error:
        folder.mkdir(exist_ok=True)
        failure.write_text(str(error))
        raise InstallError(str(error)) from error
    (folder / "complete").write_text("\n".join(group.requirements))


def _reuse_torch(folder: Path, python: Path) -> list[str]:
    """Let the environment see this process's packages behind its own, and keep pip from bringing another PyTorch."""
    own = _run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    Path(own, "host.pth").write_text(f"{_site_packages()}\n")
    constraints = folder / "constraints.txt"
    constraints.write_text(f"torch=={importlib.metadata.version('torch')}\n")
    return ["--constraint", str(constraints)]


def _pip(python: Path, *arguments: str) -> None:
    _run([str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S)
    if done.returncode:
        raise InstallError(what_went_wrong(done.stderr) or f"{command[0]} ended with status {done.returncode}")
    return done.stdout


def what_went_wrong(stderr: str) -> str:
    """The errors among what pip printed; the end of it where none is marked as one.

    >>> what_went_wrong("WARNING: old\\nERROR: No matching distribution found for nothing\\n")
    'ERROR: No matching distribution found for nothing'
    """
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR", "error"))]
    return " ".join((errors or lines)[-_LINES:])
