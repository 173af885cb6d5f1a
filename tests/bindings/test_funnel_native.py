"""Where the kernels in C++ cannot run, the package says why, and everything else runs without them."""

import importlib.metadata
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import transformers
from click.testing import CliRunner

import funnel_native
from funnel_engine import Engine, HeadConfig, convert
from funnel_engine.cli import main
from funnel_engine.weights import random_weights
from funnel_kernels import BackendUnavailable, Target, native_calls
from funnel_kernels.target import Unsupported
from hugging_face_models import build, gemma
from tiny_models import CONFIG, make_engine

CACHES = (
    funnel_native.problem,
    funnel_native.handlers,
    native_calls.problem,
    native_calls.warn_without_kernels,
)
REASON = Path(funnel_native.__file__).with_name("not_built.txt")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def forgetful():
    """What was found out before is forgotten, and what is found out here is too."""
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


@pytest.fixture
def unbuilt(forgetful, monkeypatch):
    monkeypatch.setitem(sys.modules, "funnel_native._handlers", None)


def test_here_they_run():
    assert funnel_native.problem() is None


def test_a_module_that_was_not_built(unbuilt):
    assert "the compiled module was not built (it is not there); install a C++17 compiler" in funnel_native.problem()
    assert not native_calls.multiplies_bfloat16()
    REASON.write_text("No CMAKE_CXX_COMPILER\n  could be found.\n")
    try:
        for cache in CACHES:
            cache.cache_clear()
        assert "was not built (No CMAKE_CXX_COMPILER could be found.)" in funnel_native.problem()
    finally:
        REASON.unlink()


def test_without_them_an_engine_warns_once_in_a_process(unbuilt, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_engine(backend="xla")  # does not want them
        with monkeypatch.context() as other:
            other.setattr("platform.machine", lambda: "aarch64")
            make_engine()
    native_calls.warn_without_kernels.cache_clear()
    with pytest.warns(UserWarning, match=r"without the kernels for CPUs.* was not built .*pip install --no-cache-dir"):
        make_engine()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_engine()


def test_the_warning_names_the_line_that_made_the_engine(unbuilt, tmp_path):
    build(transformers.GemmaModel, gemma()).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "model")
    weights = random_weights(CONFIG, HeadConfig(), "float32", seed=7)
    for make in (lambda: Engine(CONFIG, HeadConfig(), weights), lambda: Engine.load(tmp_path / "model")):
        native_calls.warn_without_kernels.cache_clear()
        with pytest.warns(UserWarning, match="without the kernels for CPUs") as caught:
            make()
        assert [(found.filename, found.lineno) for found in caught] == [(__file__, make.__code__.co_firstlineno)]


@pytest.mark.filterwarnings("ignore:models run without the kernels")
def test_without_them_auto_runs_on_xla_and_doctor_says_why(unbuilt):
    engine = make_engine()
    assert engine.embed([[1, 2, 3]]).shape == (1, 24)
    for line in ("project_heads", "attention", "gated_linear", "linear_add_norm", "add_norm"):
        assert re.search(f"^{line} +xla$", engine.describe(), re.MULTILINE)
    with pytest.raises(BackendUnavailable, match="cpu: the compiled module was not built"):
        make_engine(backend="cpu")
    facts = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).output)
    assert facts["attention"] == "xla"
    assert facts["not cpu"].startswith("the compiled module was not built")


def test_onednn_is_missing(forgetful, monkeypatch):
    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    assert "oneDNN is not installed; run: pip install onednn-cpu-gomp" in funnel_native.problem()
    funnel_native.problem.cache_clear()
    funnel_native.handlers.cache_clear()
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    assert "holds no libdnnl.so.3; install it again" in funnel_native.problem()


def test_a_machine_of_another_kind(forgetful, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert funnel_native.problem() == "the kernels are for Linux on x86-64, and this is linux on aarch64"


def test_a_processor_without_avx2(forgetful, monkeypatch):
    monkeypatch.setattr(funnel_native.handlers(), "instruction_set", lambda: "none")
    assert funnel_native.problem() == "this processor has no AVX2"


def test_on_another_platform_they_refuse():
    with pytest.raises(Unsupported, match="JAX runs on gpu"):
        native_calls.check(Target("cpu", "gpu"))


KERNELS = ROOT / "kernels" / "funnel_kernels"
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
FLAGS = {"avx2": (), "avx512_vnni": AVX512, "avx512_bf16": (*AVX512, "-mavx512bf16")}


@pytest.mark.parametrize(
    ("source", "instruction_set"),
    [
        *((path, "avx2") for path in sorted(KERNELS.glob("*/*_kernels.cc"))),
        (KERNELS / "cpu" / "product_int8.cc", "avx2"),
        (KERNELS / "cpu" / "product_int8.cc", "avx512_vnni"),
        (KERNELS / "cpu" / "product_avx512_bf16.cc", "avx512_bf16"),
    ],
    ids=lambda value: str(value.relative_to(KERNELS)) if isinstance(value, Path) else value,
)
def test_no_kernel_brings_functions_of_the_standard_library(source, instruction_set, tmp_path):
    """The linker keeps one copy of an inline function: were it one of a kernel's, older machines could not run it."""
    built = tmp_path / "kernels.o"
    flags = ["-std=c++17", "-O2", f"-I{KERNELS}", "-mavx2", "-mfma", f"-DFUNNEL_INSTRUCTION_SET={instruction_set}"]
    flags += FLAGS[instruction_set]
    subprocess.run(["g++", *flags, "-c", source, "-o", built], check=True)
    symbols = subprocess.run(["nm", "-C", built], capture_output=True, text=True, check=True).stdout.splitlines()
    assert any(f"T funnel::{instruction_set}::" in line for line in symbols)
    assert not [line for line in symbols if re.search(r" [WwVvu] ", line)]
