"""What only a host without Python can show: the programs of `programs/`, which print what they found or exit with 1."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from c_library import HEADER, IDS, OFFSETS, PROGRAMS, ROOT, STATUSES, configure, run
from funnel_benchmarks import c_api
from funnel_engine import Engine, FunnelConfig


def test_a_host_without_python(built, checkpoints, engines):
    """Results, bit for bit; threads that Python has never seen; see embedded.c."""
    arguments = [checkpoints[name] for name in ("plain", "classifier", "tagger")]
    environment = os.environ | {"PYTHONPATH": "/nowhere", "PYTHONHOME": "/nowhere", "LC_ALL": "C"}
    for name in ("TF_CPP_MIN_LOG_LEVEL", "TPU_SKIP_MDS_QUERY"):  # this process's JAX has set them
        environment.pop(name, None)
    lines = run(built.programs / "embedded", *arguments, cwd="/", env=environment).splitlines()
    lines = dict(zip(*[iter(lines)] * 2, strict=True))
    assert set(lines.pop("environment").split()) == {"TF_CPP_MIN_LOG_LEVEL", "TPU_SKIP_MDS_QUERY"}  # as funnel.h says
    found = {name: [float.fromhex(value) for value in values.split()] for name, values in lines.items()}
    inputs = IDS, OFFSETS
    np.testing.assert_array_equal(found["embed"], engines["plain"].embed(inputs).ravel())
    np.testing.assert_array_equal(found["classify"], engines["classifier"].classify(inputs).ravel())
    np.testing.assert_array_equal(found["tag"], np.concatenate(engines["tagger"].tag(inputs)).ravel())


@pytest.mark.slow
def test_sanitizers_find_no_leak_and_no_error(built, checkpoints, tmp_path):
    """The program above, of more than 2,000 calls, and the library with AddressSanitizer, LeakSanitizer and UBSan."""
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g1"
    # Without optimization it compiles four times as fast.
    options = f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CXX_FLAGS={flags}", "-DCMAKE_BUILD_TYPE=None"
    library = configure(ROOT / "bindings" / "c_api", tmp_path, *options)
    run("cmake", "--build", library, "--target", "funnel")
    paths = f"-I{HEADER.parent}", f"-L{library}", f"-Wl,-rpath,{library}"
    run("cc", *flags.split(), PROGRAMS / "embedded.c", "-o", tmp_path / "embedded", *paths, "-lfunnel", "-pthread")
    environment = os.environ | {
        "ASAN_OPTIONS": "detect_leaks=1",
        "LSAN_OPTIONS": f"suppressions={PROGRAMS / 'leaks.supp'}:print_suppressions=0",
    }
    arguments = [checkpoints[name] for name in ("plain", "classifier", "tagger")]
    run(tmp_path / "embedded", *arguments, env=environment)


def test_the_overhead_of_a_call_is_measured(built, tmp_path):
    """The program of the benchmark runs; how long it takes is not looked at."""
    checkpoint = c_api.make_model(tmp_path)
    result = c_api.measure(built.call_time, checkpoint, calls=3, repeats=1)
    assert set(result) == {"main", "thread"}
    for figures in result.values():
        assert figures["c_api_us"] > 1
        assert figures["python_us"] > 1
        assert figures["overhead_us"] == figures["c_api_us"] - figures["python_us"]


def test_the_documented_example(built, checkpoints):
    engine = Engine.load(checkpoints["plain"], funnel=FunnelConfig((1, 2)), max_batch_tokens=16)
    expected = engine.embed([[2, 17, 93, 5], [2, 40]])
    printed = run(built.programs / "documented", checkpoints["plain"]).split()
    np.testing.assert_allclose(np.array(printed, np.float32), expected.ravel(), rtol=1e-7)


def test_the_cpp_wrapper(built, checkpoints):
    run(built.programs / "wrapper", *(checkpoints[name] for name in ("classifier", "tagger", "texts", "answers")))


@pytest.mark.parametrize(
    "case",
    ["stopped_before", "stopped_after", "stopped_under_calls", "pending_exception", "early_log", "subinterpreter"],
)
def test_a_host_that_runs_python_itself(built, checkpoints, case):
    run(built.programs / "python_host", case, sys.executable, checkpoints["plain"])


@pytest.mark.parametrize("work", ["calls", "warmup"])
def test_main_returns_while_threads_call(built, checkpoints, work):
    """Without the wait at exit, most runs with calls crash."""
    for _ in range(3 if work == "calls" else 1):
        run(built.programs / "ending", work, checkpoints["plain"])


def test_a_plugin_out_of_sight_of_the_process(built, checkpoints):
    """Extension modules find Python's symbols although the library was opened with RTLD_LOCAL."""
    library = built.prefix / "lib" / "libfunnel.so"
    assert run(built.programs / "plugin", library, checkpoints["plain"]) == "0 \n"


def test_a_python_without_the_package(built, checkpoints):
    library, bare = built.prefix / "lib" / "libfunnel.so", Path(sys.base_prefix) / "bin" / "python3"
    said = run(built.programs / "plugin", library, checkpoints["plain"], bare)
    assert re.match(rf"{STATUSES['PYTHON']} Python .* cannot import funnel_engine: No module named", said)
    said = run(built.programs / "plugin", library, checkpoints["plain"], "/nowhere/python")
    assert said.startswith(f"{STATUSES['PYTHON']} there is no Python executable at /nowhere/python; set ")
