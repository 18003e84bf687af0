"""Builds the native CPU engine into the package. Everything else about the project is in pyproject.toml.

The engine is optional: without a C++ compiler the installation succeeds, says so, and the engine is compiled at first
use if a compiler has appeared by then.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
PACKAGE = Path("sparseflow", "kernels", "cpu")


def _load_builder():
    spec = importlib.util.spec_from_file_location("_sparseflow_build", ROOT / "src" / PACKAGE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildEngine(build_ext):
    """A plain shared library, loaded by name through ctypes: no Python ABI in the file name, no PyInit function."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")[:-1], _load_builder().LIBRARY_NAME))

    def build_extension(self, ext):
        builder = _load_builder()
        output = Path(self.get_ext_fullpath(ext.name))
        try:
            builder.build(output)
        except builder.BuildError as error:
            raise CompileError(f"sparseflow installs without its native CPU engine: {error}") from error

    def get_source_files(self):
        return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "src" / PACKAGE / "csrc").iterdir())]


def _wheel_command():
    """Tag wheels py3-none-<platform>: the library does not depend on the Python version."""
    try:
        from setuptools.command.bdist_wheel import bdist_wheel
    except ImportError:
        return {}

    class PlatformWheel(bdist_wheel):
        def get_tag(self):
            return "py3", "none", super().get_tag()[2]

    return {"bdist_wheel": PlatformWheel}


skip = os.environ.get("SPARSEFLOW_NATIVE", "1") == "0"
setup(
    ext_modules=[] if skip else [Extension("sparseflow.kernels.cpu._engine", sources=[], optional=True)],
    cmdclass={"build_ext": BuildEngine, **_wheel_command()},
)
