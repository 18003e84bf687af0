"""Two commits in alternation: in a temporary repository with a package of a few lines in place of this one."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from sparseflow.bench import commits
from sparseflow.bench.commits import CompareError, Side
from sparseflow.bench.suites import Options

OPTIONS = Options(threads=1)
CASE = {"name": "small", "kind": "Linear", "arguments": [8, 4], "options": {}, "size": [2, 8], "density": 0.5}
PACKAGE = """
    def register_neuron(cls, overwrite=False):
        pass

    def accelerate(net, example):
        {change}
        return net
"""
NOTHING, WRONG = "print('to be ignored')", "net[1].bias.data += 1"


def git(root, *arguments):
    subprocess.run(["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@t", *arguments], check=True)


def write(root, change):
    package = root / "src" / "sparseflow"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(textwrap.dedent(PACKAGE).format(change=change))


@pytest.fixture
def repository(tmp_path):
    """Two commits; the tree is that of the second."""
    root = tmp_path / "repository"
    root.mkdir()
    git(root, "init", "--quiet")
    for change in (WRONG, NOTHING):
        write(root, change)
        git(root, "add", "-A")
        git(root, "commit", "--quiet", "-m", "any")
    return root


def worktrees(root):
    found = subprocess.run(["git", "-C", str(root), "worktree", "list"], capture_output=True, text=True, check=True)
    return found.stdout.splitlines()


class TestWorktree:
    def test_has_the_commit_and_is_gone_afterwards(self, repository, tmp_path):
        with commits.worktree(repository, "HEAD~1", tmp_path) as tree:
            assert WRONG in (tree / "src/sparseflow/__init__.py").read_text()
            assert len(worktrees(repository)) == 2
        assert len(worktrees(repository)) == 1
        assert not tree.exists()

    def test_is_gone_after_an_error(self, repository, tmp_path):
        with pytest.raises(KeyboardInterrupt), commits.worktree(repository, "HEAD", tmp_path) as tree:
            raise KeyboardInterrupt
        assert len(worktrees(repository)) == 1
        assert not tree.exists()

    def test_no_such_commit(self, repository, tmp_path):
        with pytest.raises(CompareError, match="there is no commit 'v9'"), commits.worktree(repository, "v9", tmp_path):
            pass

    def test_outside_a_checkout(self, tmp_path):
        with pytest.raises(CompareError, match=r"needs a git checkout of sparseflow, and .* is in none"):
            commits.toplevel(tmp_path)

    def test_an_installed_package_inside_somebody_elses_checkout(self, repository):
        folder = repository / ".venv" / "sparseflow"
        folder.mkdir(parents=True)
        with pytest.raises(CompareError, match="only lies in"):
            commits.toplevel(folder)


class TestSides:
    def test_the_ratio_has_its_spread(self, repository, tmp_path):
        with Side(repository, OPTIONS, tmp_path) as theirs, Side(repository, OPTIONS, tmp_path) as ours:
            found = commits.ratio_of(CASE, theirs, ours)
        assert found.why == ()
        low, middle, high = found.ratio
        assert 0 < low <= middle <= high
        assert found.base_ms[1] > 0

    def test_a_commit_that_answers_wrongly_has_no_ratio(self, repository, tmp_path):
        with (
            commits.worktree(repository, "HEAD~1", tmp_path) as tree,
            Side(tree, OPTIONS, tmp_path) as theirs,
            Side(repository, OPTIONS, tmp_path) as ours,
        ):
            found = commits.ratio_of(CASE, theirs, ours)
        assert (found.base_ms, found.ms, found.ratio) == (None, None, None)
        assert len(found.why) == 1
        assert found.why[0].startswith("base: the outputs differ")

    def test_an_error_in_a_case_is_told(self, repository, tmp_path):
        with Side(repository, OPTIONS, tmp_path) as side:
            found = commits.ratio_of(CASE | {"kind": "Conv9d"}, side, side)
        assert "no attribute 'Conv9d'" in found.why[0]

    def test_a_process_that_ends_is_told(self, repository, tmp_path):
        write(repository, "import os; os._exit(3)")
        with Side(repository, OPTIONS, tmp_path) as side, pytest.raises(CompareError, match="ended with exit code 3"):
            side.ask(do="load", case=CASE)

    def test_another_package_than_the_trees_is_refused(self, tmp_path):
        with pytest.raises(CompareError, match=r"was imported instead of|ended with exit code"):
            Side(tmp_path / "empty", OPTIONS, tmp_path).__enter__()


def test_cases_of_both_suites(tmp_path):
    found = {case["name"]: case for case in commits.cases(tmp_path, commits.SUITES)}
    layer = found["layers: 3x3 256@14, 5%"]
    assert isinstance(getattr(nn, layer["kind"])(*layer["arguments"], **layer["options"]), nn.Conv2d)
    network = found["models: digits resnet18 @32, batch 1"]
    assert network["resets"]
    assert torch.load(network["path"], weights_only=True)[0].shape == (4, 1, 1, 32, 32)
    assert [case["name"] for case in commits.cases(tmp_path, commits.SUITES, "conv")] == [
        "models: snnTorch convnet @28, T = 25, batch 1"
    ]


def test_table_shows_losses_and_refusals():
    rows = [
        commits.Ratio("slow", (1, 1, 1), (2, 2, 2), (0.4, 0.5, 0.6)),
        commits.Ratio("bad", None, None, None, ("no",)),
    ]
    found = commits.table("v1", rows)
    cells = [list(column.cells) for column in found.columns]
    assert cells[3] == ["0.500", "-"]
    assert cells[4] == ["0.400 to 0.600", "no"]


def test_the_worker_imports_nothing_of_the_package_but_its_public_names():
    text = (Path(commits.__file__).parent / "worker.py").read_text()
    imports = [line for line in text.splitlines() if "import" in line and "sparseflow" in line]
    assert imports == ["import sparseflow"]
