"""The native engine under AddressSanitizer and UndefinedBehaviorSanitizer, in a program of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sparseflow.kernels.cpu import build

FLAGS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
DRIVER = Path(__file__).with_name("sanitizer_driver.cpp")


def can_sanitize(compiler: str, folder: Path) -> bool:
    probe = folder / "probe.cpp"
    probe.write_text("int main() { _Float16 h = 1; return h != 1; }\n")
    command = [compiler, *FLAGS, str(probe), "-o", str(folder / "probe")]
    try:
        return all(
            subprocess.run(c, capture_output=True, check=False).returncode == 0 for c in (command, [command[-1]])
        )
    except OSError:
        return False


@pytest.mark.timeout(1200)
def test_odd_shapes_touch_only_their_own_memory(tmp_path):
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    if not can_sanitize(compiler, tmp_path):
        pytest.skip("the compiler has no sanitizer runtime")
    library, program = tmp_path / "libengine.so", tmp_path / "driver"
    build.build(library, compiler, [*FLAGS, "-O0"])  # compiling is what takes long
    sources = ["-std=c++17", "-O1", f"-I{build.SOURCE_DIR}", str(DRIVER), str(library), f"-Wl,-rpath,{tmp_path}"]
    subprocess.run([compiler, *FLAGS, *sources, "-o", str(program)], check=True)
    environment = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "OMP_NUM_THREADS": "3"}
    result = subprocess.run([str(program)], capture_output=True, text=True, env=environment, timeout=500, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert result.stdout.endswith(" cases\n")
