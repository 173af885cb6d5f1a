"""The kernels in C++, built with AddressSanitizer and UndefinedBehaviorSanitizer: most of the grid, and wrong calls.

Whatever a sanitizer finds ends the process, so that the tests which run inside it fail.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GRID = ("linear", "attention", "relative_attention", "pool_norm", "recover_norm", "add_norm", "post_norm")
# The tests of the kernels in C++ go through every instruction set, stride, mode and dtype on whole rows; the grid adds
# widths. Left out is what starts processes of its own, or looks at values alone.
CHOSEN = "(native or cpu and (linear or attention or pool_norm or width))"
LEFT_OUT = "(a_program or whatever_the_limit or a_row_reads or same_bits)"


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A folder with a package funnel_native whose kernels are built with sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized")
    package = folder / "funnel_native"
    shutil.copytree(ROOT / "bindings" / "funnel_native", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    configure = [
        "cmake",
        "-S",
        ROOT,
        "-B",
        folder / "build",
        "-G",
        "Ninja",
        "-DFUNNEL_SANITIZE=ON",
        "-DCMAKE_BUILD_TYPE=None",
        "-DCMAKE_CXX_FLAGS=-O0",
        "-DCMAKE_UNITY_BUILD=ON",  # half of the time goes into headers, which each file would compile again
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}",
    ]
    for command in (configure, ["cmake", "--build", folder / "build"]):
        subprocess.run(command, check=True, capture_output=True, text=True)
    return folder


def run_sanitized(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    # The sanitizer must be there before everything else, and with it the library whose exceptions it watches.
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "tests")]),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # Python itself leaks at exit
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_grid_and_the_wrong_calls(sanitized):
    files = [f"tests/kernels/test_{op}.py" for op in GRID]
    files += sorted(str(path) for path in (ROOT / "tests" / "bindings").glob("test_native_*.py"))
    done = run_sanitized(
        sanitized, "-m", "pytest", "-x", "-s", "-p", "no:cacheprovider", "-k", f"{CHOSEN} and not {LEFT_OUT}", *files
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_the_sanitizer_is_there(sanitized):
    """A weight that is smaller than it is said to be, given to the very function that packs it, is found."""
    code = """
import numpy as np, funnel_native
module = funnel_native.handlers()
assert str(funnel_native.__file__).startswith({folder!r})
weight, packed = np.ones((1, 100), np.float32), np.empty(64 * 256, np.float32)
module.pack(weight.ctypes.data, 0, 1, 256, "float32", packed.ctypes.data)
"""
    done = run_sanitized(sanitized, "-c", code.format(folder=str(sanitized)))
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
