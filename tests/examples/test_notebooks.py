"""The notebooks in examples run from top to bottom, in a kernel with this Python and in a folder of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ipykernel")
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))
_KERNEL = "this-python"
_LIMIT = 300  # seconds a cell may take on a busy machine; the whole is meant to take less than 60


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Name of a kernel that runs this interpreter, whatever kernels are installed for the user."""
    from ipykernel.kernelspec import write_kernel_spec

    write_kernel_spec(tmp_path / "jupyter" / "kernels" / _KERNEL)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return _KERNEL


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_it_runs(self, path, kernel, tmp_path):
        notebook = nbformat.read(path, as_version=4)
        folder = tmp_path / "run"
        folder.mkdir()
        client = nbclient.NotebookClient(
            notebook, timeout=_LIMIT, kernel_name=kernel, resources={"metadata": {"path": str(folder)}}
        )
        client.execute()
        assert any(cell.get("outputs") for cell in notebook.cells)

    def test_it_is_valid_and_has_no_outputs(self, path):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                assert (cell.outputs, cell.execution_count) == ([], None)


def test_there_are_notebooks():
    assert "study" in [path.stem for path in NOTEBOOKS]
