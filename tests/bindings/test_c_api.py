"""The C API, built, installed, moved and used as its documentation says.

Most of it is called from here through ctypes, which makes this process a host that already runs Python. What only a
host without Python can show is in the programs of `c_api/`, which print what they found or exit with 1.
"""

import ctypes
import gc
import json
import os
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

import tiny_models
from funnel_benchmarks import c_api
from funnel_engine import Engine, FunnelConfig, FunnelError, HeadConfig, InputError, c_host
from funnel_engine.checkpoints.native import write_checkpoint
from funnel_engine.checkpoints.source import SourceModel
from funnel_engine.text import TextConfig
from funnel_engine.weights import random_weights

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "bindings" / "include" / "funnel.h"
PROGRAMS = Path(__file__).parent / "c_api"
SERVER = ROOT / "examples" / "cpp_server"
STATUSES = {
    name: int(value) for name, value in re.findall(r"^  FUNNEL_(\w+) = (\d+)", HEADER.read_text(), re.MULTILINE)
}
HEADS = {
    "plain": HeadConfig(),
    "classifier": HeadConfig(task="classify", labels=("no", "yes", "maybe")),
    "tagger": HeadConfig(task="tag", labels=("O", "B", "I", "E"), classifier_bias=True),
}
WIDTH = tiny_models.CONFIG.hidden_size
IDS = np.array([2, 17, 93, 5, 2, 40, 41, 42, 43, 2, 99, 7], np.int32)
OFFSETS = np.array([0, 4, 9, 12], np.int32)
OPTIONS = '{"max_batch_tokens": 16}'  # one bucket, so little to compile


# ------------------------------------------------------------------------------------------------------- what is tested


def write_model(directory: Path, head: HeadConfig) -> None:
    """A checkpoint of the tiny model with random weights."""
    config = tiny_models.CONFIG
    weights = {
        name: (SimpleNamespace(tensor=SimpleNamespace(path=directory / "none"), pieces=lambda array=array: [array]),)
        for name, array in random_weights(config, head, "float32", seed=7).items()
    }
    write_checkpoint(
        directory, SourceModel("funnel", config, head, weights, {}, TextConfig(), None, directory), "float32"
    )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("checkpoints")
    for name, head in HEADS.items():
        write_model(directory / name, head)
    return {name: directory / name for name in HEADS}


@pytest.fixture(scope="module")
def engines(checkpoints) -> dict[str, Engine]:
    return {name: Engine.load(path, max_batch_tokens=16) for name, path in checkpoints.items()}


class Built(NamedTuple):
    prefix: Path  # where libfunnel is installed, moved after the installation
    programs: Path
    server: Path
    call_time: Path


def run(*command: Any, **options: Any) -> str:
    """What a command prints; a failure shows all it said."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory) -> Iterator[None]:
    """The processes that are started here share what they compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


def configure(source: Path, build: Path, *options: str) -> Path:
    strict = "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON", "-DCMAKE_BUILD_TYPE=Release"
    run("cmake", "-S", source, "-B", build, "-G", "Ninja", *strict, *options)
    return build


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """The library, the programs and the example server. Warnings are errors."""
    directory = tmp_path_factory.mktemp("build")
    library = configure(ROOT / "bindings" / "c_api", directory / "library", f"-DPython_EXECUTABLE={sys.executable}")
    run("cmake", "--build", library, "--target", "funnel", "funnel_call_time")
    run("cmake", "--install", library, "--prefix", directory / "first")
    prefix = directory / "installed"
    (directory / "first").rename(prefix)
    found = f"-DCMAKE_PREFIX_PATH={prefix}"
    example = re.search(r"```c\n(.*?)```", (ROOT / "docs" / "c-api.md").read_text(encoding="utf-8"), re.DOTALL)
    (directory / "documented.c").write_text(example[1])
    names = f"-DDOCUMENTED={directory / 'documented.c'}", f"-DSERVER={SERVER}"
    programs = configure(PROGRAMS, directory / "programs", found, *names)
    run("cmake", "--build", programs)
    server = configure(SERVER, directory / "server", found)
    run("cmake", "--build", server)
    return Built(prefix, programs, server / "funnel_server", library / "funnel_call_time")


class Options(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("checkpoint", ctypes.c_char_p),
        ("python", ctypes.c_char_p),
        ("options", ctypes.c_char_p),
    )


class Info(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        *((name, ctypes.c_int32) for name in ("embedding_size", "labels", "max_length", "vocabulary_size", "task")),
    )


class Refused(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(f"{next(name for name, value in STATUSES.items() if value == status)}: {message}")


def refusal(pattern: str) -> Any:
    """Expects a status other than OK: "NAME: message", of which `pattern` is the beginning."""
    return pytest.raises(Refused, match="^" + pattern)


class Library:
    """libfunnel through ctypes. A status other than OK is raised as `Refused`, whose text begins with its name."""

    def __init__(self, path: Path):
        self.functions = ctypes.CDLL(str(path))
        self.functions.funnel_version.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        error = ctypes.create_string_buffer(b"x" * 1000)
        status = getattr(self.functions, f"funnel_{name}")(*arguments, error, ctypes.c_size_t(len(error)))
        if status:
            raise Refused(status, error.value.decode())
        assert error.value == b""

    def open(self, checkpoint: Any = None, options: str | None = OPTIONS, **fields: Any) -> ctypes.c_void_p:
        fields = {"struct_size": ctypes.sizeof(Options), "options": options and options.encode()} | fields
        handle = ctypes.c_void_p(1)
        try:
            given = Options(checkpoint=checkpoint and os.fsencode(checkpoint), **fields)
            self.call("open", ctypes.byref(given), ctypes.byref(handle))
        except Refused:
            assert not handle
            raise
        return handle

    def embed(
        self, handle: Any, ids=IDS, offsets=OFFSETS, count: int = 3, normalize: int = 1, truncate_dim: int = 0,
        out: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        out = np.full((count, truncate_dim or WIDTH), np.nan, np.float32) if out is None else out
        self.call("embed", handle, pointer(ids), pointer(offsets), count, normalize, truncate_dim, *floats(out))
        return out

    def label(self, function: str, handle: Any, out: np.ndarray, ids=IDS, offsets=OFFSETS) -> np.ndarray:
        self.call(function, handle, pointer(ids), pointer(offsets), len(offsets) - 1, *floats(out))
        return out

    def stats(self, handle: Any) -> dict[str, float]:
        text, needed = ctypes.create_string_buffer(1000), ctypes.c_size_t()
        self.call("stats", handle, text, ctypes.c_size_t(len(text)), ctypes.byref(needed))
        assert needed.value == len(text.value) + 1
        return json.loads(text.value)

    def close(self, handle: Any) -> None:
        self.call("close", handle)


def pointer(array: Any) -> Any:
    return array.ctypes.data_as(ctypes.c_void_p) if isinstance(array, np.ndarray) else array


def floats(out: np.ndarray) -> tuple[Any, ctypes.c_size_t]:
    return pointer(out), ctypes.c_size_t(out.size)


@pytest.fixture(scope="module")
def library(built) -> Library:
    return Library(built.prefix / "lib" / "libfunnel.so")


@pytest.fixture(scope="module")
def plain(library, checkpoints) -> ctypes.c_void_p:
    return library.open(checkpoints["plain"])


@pytest.fixture(scope="module")
def classifier(library, checkpoints) -> ctypes.c_void_p:
    return library.open(checkpoints["classifier"])


@pytest.fixture(scope="module")
def tagger(library, checkpoints) -> ctypes.c_void_p:
    return library.open(checkpoints["tagger"])


# ---------------------------------------------------------------------------------------------------- names and numbers


def test_versions_agree(library):
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert library.functions.funnel_version().decode() == version
    declared = int(re.search(r"#define FUNNEL_API_VERSION (\d+)", HEADER.read_text())[1])
    assert library.functions.funnel_api_version() == declared == c_host.API_VERSION


def test_every_error_of_the_project_has_a_status_of_its_own():
    assert set(c_host.STATUSES) == set(FunnelError.__subclasses__())
    assert {kind.__name__: status for kind, status in c_host.STATUSES.items()} == {
        "InputError": STATUSES["INPUT"],
        "ConfigError": STATUSES["CONFIG"],
        "CheckpointError": STATUSES["CHECKPOINT"],
        "BackendUnavailable": STATUSES["BACKEND_UNAVAILABLE"],
    }
    assert STATUSES["INTERNAL"] == c_host.INTERNAL


def test_only_the_functions_of_the_header_are_exported(built):
    lines = run("nm", "-D", "--defined-only", built.prefix / "lib" / "libfunnel.so").splitlines()
    declared = re.findall(r"^FUNNEL_API .*?(funnel_\w+)\(", HEADER.read_text(), re.MULTILINE)
    assert len(declared) == 10
    assert sorted(line.split()[-1] for line in lines) == sorted(declared)


# -------------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize(("normalize", "truncate_dim"), [(1, 0), (0, 0), (1, 7), (0, WIDTH)])
def test_embed_is_the_engines(library, plain, engines, normalize, truncate_dim):
    expected = engines["plain"].embed((IDS, OFFSETS), bool(normalize), truncate_dim or None)
    found = library.embed(plain, normalize=normalize, truncate_dim=truncate_dim)
    np.testing.assert_array_equal(found, expected)


def test_classify_and_tag_are_the_engines(library, classifier, tagger, engines):
    logits = library.label("classify", classifier, np.empty((3, 3), np.float32))
    np.testing.assert_array_equal(logits, engines["classifier"].classify((IDS, OFFSETS)))
    logits = library.label("tag", tagger, np.empty((12, 4), np.float32))
    np.testing.assert_array_equal(logits, np.concatenate(engines["tagger"].tag((IDS, OFFSETS))))


def test_a_larger_buffer_is_written_only_as_far_as_the_result_goes(library, plain, engines):
    out = np.full(3 * WIDTH + 5, 123, np.float32)
    library.embed(plain, out=out)
    np.testing.assert_array_equal(out[: 3 * WIDTH].reshape(3, WIDTH), engines["plain"].embed((IDS, OFFSETS)))
    np.testing.assert_array_equal(out[3 * WIDTH :], 123)


def test_options_reach_the_engine(library, checkpoints):
    options = {
        "dtype": "bfloat16",
        "attention": "causal",
        "pooling": "last",
        "max_batch_tokens": 14,
        "backend": "xla",
        "verify": True,
        "funnel": {"strides": [1, 2], "pool": "mean", "positions": "last", "keep_first": True},
    }
    handle = library.open(checkpoints["plain"], json.dumps(options))
    funnel = FunnelConfig((1, 2), pool="mean", positions="last", keep_first=True)
    engine = Engine.load(checkpoints["plain"], **(options | {"funnel": funnel}))
    np.testing.assert_array_equal(library.embed(handle), engine.embed((IDS, OFFSETS)))
    info = Info(ctypes.sizeof(Info))
    library.call("get_info", handle, ctypes.byref(info))
    assert info.max_length == 14
    library.close(handle)


def test_info(library, plain, classifier, tagger):
    for handle, labels, task in ((plain, 0, 0), (classifier, 3, 1), (tagger, 4, 2)):
        info = Info(ctypes.sizeof(Info))
        library.call("get_info", handle, ctypes.byref(info))
        found = info.embedding_size, info.labels, info.max_length, info.vocabulary_size, info.task
        assert found == (WIDTH, labels, 16, 101, task)
        assert info.struct_size == ctypes.sizeof(Info)


def test_warmup_compiles_all_and_stats_say_so(library, checkpoints):
    handle = library.open(checkpoints["plain"])
    library.call("warmup", handle)
    before = library.stats(handle)
    assert before["compilations"] >= 2
    library.embed(handle)
    after = library.stats(handle)
    assert after["compilations"] == before["compilations"]
    assert (after["calls"], after["sequences"], after["tokens"]) == (1, 3, 12)
    library.close(handle)


def test_a_checkpoint_whose_path_is_not_ascii(library, checkpoints, tmp_path):
    name = os.fsdecode("über-\N{SNOWMAN}".encode() + b"-\xff")  # its last byte is not UTF-8
    shutil.copytree(checkpoints["plain"], tmp_path / name)
    library.close(library.open(tmp_path / name))


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": None}, "INVALID_ARGUMENT: offsets is NULL"),
        ({"ids": None}, "INVALID_ARGUMENT: ids is NULL"),
        ({"count": 0}, "INVALID_ARGUMENT: count is 0"),
        ({"count": -3}, "INVALID_ARGUMENT: count is -3"),
        ({"offsets": [1, 4, 9, 12]}, r"INVALID_ARGUMENT: offsets\[0\] is 1; it must be 0"),
        ({"offsets": [-1, 4, 9, 12]}, r"INVALID_ARGUMENT: offsets\[0\] is -1"),
        ({"offsets": [0, 4, 3, 12]}, r"INVALID_ARGUMENT: offsets\[2\] is 3, less than the 4 before it"),
        ({"offsets": [0, 4, 9, -12]}, r"INVALID_ARGUMENT: offsets\[3\] is -12"),
        ({"offsets": [0, -(2**31), 9, 12]}, r"INVALID_ARGUMENT: offsets\[1\] is -2147483648"),
        ({"offsets": [0, 4, 9, 2**31 - 1]}, "INPUT: sequence 2 has 2147483638 tokens, more than the limit of 16"),
        ({"offsets": [0, 4, 4, 12]}, "INPUT: sequence 1 is empty"),
        ({"truncate_dim": -1}, f"INVALID_ARGUMENT: truncate_dim is -1; give 1 ... {WIDTH}, or 0"),
        ({"truncate_dim": WIDTH + 1}, f"INVALID_ARGUMENT: truncate_dim is {WIDTH + 1}"),
    ],
)
def test_malformed_sequences_are_refused_before_an_id_is_read(library, plain, change, message):
    """The ids lie at an address that cannot be read."""
    out = np.full((3, WIDTH + 1), 123, np.float32)
    arguments = {"ids": ctypes.c_void_p(64), "out": out} | change
    if isinstance(arguments.get("offsets"), list):
        arguments["offsets"] = np.array(arguments["offsets"], np.int32)
    with refusal(message):
        library.embed(plain, **arguments)
    np.testing.assert_array_equal(out, 123)


@pytest.mark.parametrize("bad", [-1, 101, 2**31 - 1])
def test_ids_out_of_vocabulary(library, plain, bad):
    ids = IDS.copy()
    ids[5] = bad
    with refusal(f"INPUT: input 1 holds token id {bad}; ids lie in 0 ... 100"):
        library.embed(plain, ids)


def test_short_buffers_are_refused_and_not_written(library, plain, classifier, tagger):
    for function, handle, size, needed in (
        ("embed", plain, 3 * WIDTH - 1, f"3 x {WIDTH} = {3 * WIDTH};"),
        ("classify", classifier, 8, "3 x 3 = 9;"),
        ("tag", tagger, 47, "12 x 4 = 48;"),
    ):
        out = np.full(size, 123, np.float32)
        before = library.stats(handle)
        with refusal(rf"BUFFER_TOO_SMALL: out has room for {size} floats, .* {needed}"):
            library.embed(handle, out=out) if function == "embed" else library.label(function, handle, out)
        np.testing.assert_array_equal(out, 123)
        assert library.stats(handle) == before


def test_short_memory_for_stats(library, plain):
    size = ctypes.c_size_t
    needed = size()
    with refusal("BUFFER_TOO_SMALL: json has room for 0 bytes, but the text needs "):
        library.call("stats", plain, None, size(0), ctypes.byref(needed))
    text = ctypes.create_string_buffer(b"x" * 999)
    with refusal(f"BUFFER_TOO_SMALL: .*needs {needed.value};"):
        library.call("stats", plain, text, size(needed.value - 1), None)
    assert text.value == b"x" * 999
    with refusal("INVALID_ARGUMENT: json is NULL but json_size is 5"):
        library.call("stats", plain, None, size(5), None)
    library.call("stats", plain, text, needed, None)
    assert len(text.value) + 1 == needed.value


def test_null_pointers(library, plain, checkpoints):
    for function, arguments in (
        ("warmup", ()),
        ("get_info", (ctypes.byref(Info(ctypes.sizeof(Info))),)),
        ("embed", (pointer(IDS), pointer(OFFSETS), 3, 1, 0, *floats(np.empty(100, np.float32)))),
        ("classify", (pointer(IDS), pointer(OFFSETS), 3, *floats(np.empty(100, np.float32)))),
        ("tag", (pointer(IDS), pointer(OFFSETS), 3, *floats(np.empty(100, np.float32)))),
        ("stats", (None, ctypes.c_size_t(0), None)),
        ("close", ()),
    ):
        with refusal("INVALID_ARGUMENT: engine is NULL"):
            library.call(function, None, *arguments)
        with refusal("INVALID_ARGUMENT: engine is no handle"):
            library.call(function, ctypes.c_void_p(2**40), *arguments)
    with refusal("INVALID_ARGUMENT: info is NULL"):
        library.call("get_info", plain, None)
    for function in ("embed", "classify", "tag"):
        middle = (3, 1, 0) if function == "embed" else (3,)
        handle = plain if function == "embed" else library.open(checkpoints["classifier"])
        with refusal("INVALID_ARGUMENT: out is NULL; give memory for "):
            library.call(function, handle, pointer(IDS), pointer(OFFSETS), *middle, None, ctypes.c_size_t(100))
    handle = ctypes.c_void_p(1)
    with refusal("INVALID_ARGUMENT: options is NULL"):
        library.call("open", None, ctypes.byref(handle))
    assert not handle
    with refusal("INVALID_ARGUMENT: engine is NULL"):
        library.call("open", ctypes.byref(Options(ctypes.sizeof(Options), b"x")), None)
    with refusal("INVALID_ARGUMENT: checkpoint is NULL"):
        library.open(None)


@pytest.mark.parametrize("size", [0, 8, 12, 23, 33, 40, 2**64 - 1])
def test_unknown_struct_sizes(library, plain, checkpoints, size):
    with refusal(rf"INVALID_ARGUMENT: funnel_options.struct_size is {size}, .* 32 here"):
        library.open(checkpoints["plain"], struct_size=size)
    info = Info(size, 5, 5, 5, 5, 5)
    with refusal(rf"INVALID_ARGUMENT: funnel_info.struct_size is {size}, "):
        library.call("get_info", plain, ctypes.byref(info))
    assert info.embedding_size == info.task == 5


def test_the_options_of_an_older_header_get_defaults(library, checkpoints):
    """What lies beyond their size is not read."""
    handle = library.open(checkpoints["plain"], struct_size=24, options="not JSON")
    library.close(handle)
    library.close(library.open(checkpoints["plain"], struct_size=16, options="not JSON", python=b"no Python"))
    library.close(library.open(checkpoints["plain"], options=None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{", "CONFIG: options are no JSON"),
        ("[]", r"CONFIG: options must be a JSON object with some of funnel, backend, .*; it is \[\]"),
        ('{"beam": 4}', "CONFIG: options has the unknown name 'beam'; choose of funnel, backend, dtype"),
        ('{"path": "x"}', "CONFIG: options has the unknown name 'path'"),
        ('{"mesh": [2]}', "CONFIG: options has the unknown name 'mesh'"),
        ('{"funnel": 2}', "CONFIG: funnel must be a JSON object with some of strides, pool, .*; it is 2"),
        ('{"funnel": {"stride": 2}}', "CONFIG: funnel has the unknown name 'stride'; choose of strides, pool"),
        ('{"funnel": {"strides": [0]}}', r"CONFIG: strides\[0\]=0 must be"),
        ('{"max_batch_tokens": "many"}', "CONFIG: max_batch_tokens='many' must be"),
        ('{"dtype": "float16"}', "CONFIG: dtype 'float16' is refused"),
        ('{"backend": "abacus"}', "BACKEND_UNAVAILABLE: backend 'abacus' does not exist"),
    ],
)
def test_options_that_the_engine_refuses(library, checkpoints, options, message):
    with refusal(f"{message}"):
        library.open(checkpoints["plain"], options)


def test_options_that_are_not_utf8(library, checkpoints):
    given = Options(ctypes.sizeof(Options), os.fsencode(checkpoints["plain"]), None, b'{"\xff": 1}')
    with refusal("CONFIG: options are no JSON: .*utf-8"):
        library.call("open", ctypes.byref(given), ctypes.byref(ctypes.c_void_p()))


def test_checkpoints_that_cannot_be_loaded(library, checkpoints, tmp_path):
    with refusal("CHECKPOINT: .*nowhere.* is not a checkpoint of this engine"):
        library.open(tmp_path / "nowhere")
    shutil.copytree(checkpoints["plain"], tmp_path / "cut")
    weights = tmp_path / "cut" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with refusal("CHECKPOINT: .*weights.safetensors is truncated"):
        library.open(tmp_path / "cut")


def test_tasks_that_the_checkpoint_has_no_head_for(library, plain, classifier):
    out = np.empty(48, np.float32)
    with refusal("CONFIG: classify needs a classifier"):
        library.label("classify", plain, out)
    with refusal("CONFIG: tag needs a classifier"):
        library.label("tag", classifier, out)


def test_a_host_that_runs_python_cannot_be_given_another(library, checkpoints):
    with refusal("INVALID_ARGUMENT: python is /usr/bin/python3, but .* was started by the host"):
        library.open(checkpoints["plain"], python=b"/usr/bin/python3")


def test_a_package_of_another_version(library, checkpoints, monkeypatch):
    monkeypatch.setattr(c_host, "API_VERSION", c_host.API_VERSION + 1)
    with refusal("PYTHON: the Python package funnel-engine is of another version"):
        library.open(checkpoints["plain"])


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, SystemExit, KeyboardInterrupt])
def test_no_exception_gets_out(library, plain, monkeypatch, kind):
    expected = library.embed(plain)

    def embed(*_):
        raise kind("boom")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "embed", embed)
        with refusal(f"INTERNAL: {kind.__name__}: boom"):
            library.embed(plain)
        patch.setattr(c_host, "explain", embed)
        with refusal("INTERNAL: Python raised an error that cannot be described"):
            library.embed(plain)
    np.testing.assert_array_equal(library.embed(plain), expected)


def test_the_error_buffer_is_always_terminated(library, monkeypatch, checkpoints):
    """Cut to its size between two characters; bytes behind it stay."""
    monkeypatch.setattr(c_host, "explain", lambda _: (5, "aä€😀".encode()))
    given, handle = Options(ctypes.sizeof(Options), b"/nowhere"), ctypes.c_void_p()
    cuts = {1: "", 2: "a", 3: "a", 4: "aä", 6: "aä", 7: "aä€", 10: "aä€", 11: "aä€😀", 20: "aä€😀"}
    for size, message in cuts.items():
        error = ctypes.create_string_buffer(b"x" * 30)
        status = library.functions.funnel_open(ctypes.byref(given), ctypes.byref(handle), error, ctypes.c_size_t(size))
        assert (status, error.value.decode()) == (STATUSES["CONFIG"], message)
        assert error.raw[size:30] == b"x" * (30 - size)
    for error, size in ((None, 0), (None, 5), (ctypes.create_string_buffer(b"x"), 0)):
        arguments = ctypes.byref(given), ctypes.byref(handle), error, ctypes.c_size_t(size)
        assert library.functions.funnel_open(*arguments) == STATUSES["CONFIG"]
        assert error is None or error.value == b"x"


# --------------------------------------------------------------------------------------------- handles, threads, memory


def test_calls_after_close(library, checkpoints, plain):
    handle = library.open(checkpoints["classifier"])
    library.close(handle)
    for call in (
        lambda: library.close(handle),
        lambda: library.call("warmup", handle),
        lambda: library.call("get_info", handle, ctypes.byref(Info(ctypes.sizeof(Info)))),
        lambda: library.embed(handle),
        lambda: library.label("classify", handle, np.empty(9, np.float32)),
        lambda: library.label("tag", handle, np.empty(36, np.float32)),
        lambda: library.stats(handle),
    ):
        with refusal("CLOSED: the engine was closed"):
            call()
    assert library.open(checkpoints["plain"]).value != handle.value
    library.embed(plain)


@pytest.mark.parametrize("fails", [False, True])
def test_closing_under_a_running_call(library, checkpoints, engines, monkeypatch, fails):
    """The call finishes with its result or its error, later ones are told, and then the engine is freed."""
    handle = library.open(checkpoints["plain"])
    running, closed, alive = threading.Event(), threading.Event(), []
    embed = Engine.embed

    def held_up(engine, *arguments):
        alive.append(weakref.ref(engine))
        running.set()
        assert closed.wait(60)
        if fails:
            raise InputError("too late")
        return embed(engine, *arguments)

    monkeypatch.setattr(Engine, "embed", held_up)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(library.embed, handle)
        assert running.wait(60)
        library.close(handle)
        with refusal("CLOSED"):
            library.stats(handle)
        assert alive[0]() is not None
        closed.set()
        if fails:
            with refusal("INPUT: too late"):
                result.result()
    monkeypatch.undo()
    if not fails:
        np.testing.assert_array_equal(result.result(), engines["plain"].embed((IDS, OFFSETS)))
    del result
    gc.collect()
    assert alive[0]() is None


def test_four_threads_at_once(library, plain, tagger, engines):
    vectors = engines["plain"].embed((IDS, OFFSETS))
    logits = np.concatenate(engines["tagger"].tag((IDS, OFFSETS)))

    def work(index: int) -> None:
        for _ in range(25):
            np.testing.assert_array_equal(library.embed(plain), vectors)
            np.testing.assert_array_equal(library.label("tag", tagger, np.empty((12, 4), np.float32)), logits)
            with refusal("INVALID_ARGUMENT: count is 0"):
                library.embed(plain, count=0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


class MallInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in NAMES.split())


def in_use(shared: list[Any]) -> np.ndarray:
    """Blocks of Python's allocator, references to shared objects, bytes of malloc."""
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallInfo
    info = mallinfo()
    return np.array([sys.getallocatedblocks(), sum(map(sys.getrefcount, shared)), info.uordblks + info.hblkhd])


def engines_alive() -> list[Engine]:
    gc.collect()
    return [item for item in gc.get_objects() if type(item) is Engine]


def test_a_thousand_calls_keep_nothing(library, classifier, tagger):
    """Calls of every kind, those that fail too."""
    bad = IDS.copy()
    bad[3] = -1
    vectors, logits = np.empty((3, WIDTH), np.float32), np.empty(48, np.float32)
    info = Info(ctypes.sizeof(Info))
    shared = [c_host, None, True, False, *c_host.STATUSES, *STATUSES.values(), *engines_alive()]

    def refused(call: Any) -> None:
        with pytest.raises(Refused):
            call()

    calls = {
        "embed": lambda: library.embed(classifier, out=vectors),
        "classify": lambda: library.label("classify", classifier, logits),
        "tag": lambda: library.label("tag", tagger, logits),
        "stats": lambda: library.stats(tagger),
        "info": lambda: library.call("get_info", tagger, ctypes.byref(info)),
        "an error of the engine": lambda: refused(lambda: library.embed(classifier, bad, out=vectors)),
        "an error of a task": lambda: refused(lambda: library.label("classify", tagger, logits)),
        "an error of an argument": lambda: refused(lambda: library.embed(classifier, count=0, out=vectors)),
        "an error of opening": lambda: refused(lambda: library.open("/nowhere")),
    }
    limits = np.array([250, 250, 16_000])  # less than one block, one reference or one allocation (32 bytes) a call
    for name, call in calls.items():
        for _ in range(4):  # Python and JAX fill caches of their own during the first thousand calls; a leak goes on
            before = in_use(shared)
            for _ in range(1000):
                call()
            kept = in_use(shared) - before
            if (kept <= limits).all():
                break
        assert (kept <= limits).all(), f"{name}: {kept} blocks, references, bytes"


def test_opening_and_closing_keeps_no_engine(library, checkpoints):
    before, references = len(engines_alive()), sys.getrefcount(c_host)
    for _ in range(20):
        library.close(library.open(checkpoints["plain"]))
        with pytest.raises(Refused):
            library.open(checkpoints["plain"], '{"dtype": "float16"}')
    assert len(engines_alive()) == before
    assert sys.getrefcount(c_host) == references


# ------------------------------------------------------------------------------------------------- hosts without Python


def test_a_host_without_python(built, checkpoints, engines):
    """Results, bit for bit; threads that Python has never seen; see embedded.c."""
    arguments = [checkpoints[name] for name in ("plain", "classifier", "tagger")]
    environment = os.environ | {"PYTHONPATH": "/nowhere", "PYTHONHOME": "/nowhere", "LC_ALL": "C"}
    lines = run(built.programs / "embedded", *arguments, cwd="/", env=environment).splitlines()
    found = {
        name: [float.fromhex(value) for value in values.split()]
        for name, values in zip(*[iter(lines)] * 2, strict=True)
    }
    inputs = IDS, OFFSETS
    np.testing.assert_array_equal(found["embed"], engines["plain"].embed(inputs).ravel())
    np.testing.assert_array_equal(found["classify"], engines["classifier"].classify(inputs).ravel())
    np.testing.assert_array_equal(found["tag"], np.concatenate(engines["tagger"].tag(inputs)).ravel())


@pytest.mark.slow
def test_sanitizers_find_no_leak_and_no_error(built, checkpoints, tmp_path):
    """The program above, of more than 2,000 calls, and the library with AddressSanitizer, LeakSanitizer and UBSan."""
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g1"
    options = f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CXX_FLAGS={flags}"
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
    engine = Engine.load(checkpoints["plain"], FunnelConfig((1, 2)), max_batch_tokens=16)
    expected = engine.embed([[2, 17, 93, 5], [2, 40]])
    printed = run(built.programs / "documented", checkpoints["plain"]).split()
    np.testing.assert_allclose(np.array(printed, np.float32), expected.ravel(), rtol=1e-7)


def test_the_cpp_wrapper(built, checkpoints):
    run(built.programs / "wrapper", checkpoints["classifier"])


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


# --------------------------------------------------------------------------------------------------- the example server


def test_the_batcher(built):
    """Budget, order, overload, a failing batch, and the end: see batcher.cc."""
    run(built.programs / "batcher")


OK, BAD_REQUEST = 0, 1


class Client:
    def __init__(self, path: Path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(str(path))

    def send(self, body: bytes, size: int | None = None) -> None:
        self.socket.sendall(struct.pack("=I", len(body) if size is None else size) + body)

    def answer(self) -> tuple[int, bytes] | None:
        """Code and body, or None if the server has hung up; never half of an answer."""
        head = self.read(8)
        if not head:
            return None
        size, code = struct.unpack("=II", head)
        body = self.read(size)
        assert len(head) == 8
        assert len(body) == size
        return code, body

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size and (piece := self.socket.recv(size - len(data))):
            data += piece
        return data

    def embed(self, ids: np.ndarray) -> np.ndarray:
        self.send(ids.astype(np.int32).tobytes())
        code, body = self.answer()
        assert code == OK, body
        return np.frombuffer(body, np.float32)


class Server(NamedTuple):
    process: subprocess.Popen
    path: Path

    def connect(self) -> Client:
        return Client(self.path)

    def stop(self, number: int = signal.SIGTERM) -> str:
        """Asks it to end, checks that it did so cleanly, and returns what it printed."""
        self.process.send_signal(number)
        printed, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, errors
        assert not self.path.exists()
        return printed


@pytest.fixture(scope="module")
def start_server(built, checkpoints, tmp_path_factory) -> Iterator[Any]:
    processes = []

    def start(*options: str) -> Server:
        path = tmp_path_factory.mktemp("server") / "socket"
        command = [built.server, *options, "--options", OPTIONS, checkpoints["plain"], path]
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == f"listening on {path}\n", process.stderr.read()
        return Server(process, path)

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_the_server_answers_its_clients(start_server, engines):
    """One server for all: it starts an interpreter, which takes seconds."""
    server = start_server("--batch-tokens", "16", "--connections", "6")
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
    sequences = tiny_models.random_ids([1, 5, 16, 9, 15, 2, 11, 8] * 4, seed=3)
    expected = engines["plain"].embed(sequences)

    def client(first: int) -> None:
        connection = server.connect()
        for index in range(first, len(sequences), 4):
            # Company changes the order of sums, and nothing else.
            np.testing.assert_allclose(connection.embed(sequences[index]), expected[index], atol=1e-5)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(client, range(4)))

    good, bad = server.connect(), server.connect()
    for body, size, message in (
        (b"", 0, "a request has 0 bytes; give 4 for each token id, and 1 ... 16 ids"),
        (b"12345", None, "a request has 5 bytes"),
        (bytes(4 * 17), None, "a request has 68 bytes"),
        (bytes(1_000_000), None, "a request has 1000000 bytes"),
        (np.array([5, 101], np.int32).tobytes(), None, "token id 101 is not in 0 ... 100"),
        (np.array([-1], np.int32).tobytes(), None, "token id -1 is not in 0 ... 100"),
    ):
        bad.send(body, size)
        code, said = bad.answer()
        assert (code, said.decode()[: len(message)]) == (BAD_REQUEST, message)
        np.testing.assert_allclose(good.embed(sequences[0]), expected[0], atol=1e-5)
    np.testing.assert_allclose(bad.embed(sequences[1]), expected[1], atol=1e-5)  # its next request is understood

    bad.send(b"1234", size=40)  # leaves in the middle of a request
    bad.socket.close()
    np.testing.assert_allclose(good.embed(sequences[2]), expected[2], atol=1e-5)

    stalled = server.connect()
    stalled.socket.sendall(b"\x08")  # begins a request and falls silent; must not hold up the end
    counters = json.loads(server.stop())
    assert counters["compilations_after_warmup"] == 0
    assert counters["sequences"] == len(sequences) + 8
    assert stalled.answer() is None


def test_the_end_with_requests_in_flight(start_server, engines):
    """All that was sent before the signal is answered, whole and right; a full house and a busy path are refused."""
    server = start_server("--batch-tokens", "16", "--connections", "4")
    again = subprocess.run([*server.process.args[:-1], str(server.path)], capture_output=True, text=True, timeout=60)
    assert again.returncode == 1
    assert again.stderr == f"{server.path} is served already\n"

    ids = tiny_models.random_ids([12], seed=5)[0]
    expected = engines["plain"].embed([ids])[0]
    clients = [server.connect() for _ in range(4)]
    for client in clients:
        np.testing.assert_allclose(client.embed(ids), expected, atol=1e-5)
    assert server.connect().answer() is None  # the fifth
    for client in clients:
        for _ in range(50):
            client.send(ids.tobytes())
    counters = json.loads(server.stop(signal.SIGINT))
    assert counters["sequences"] == 4 + 4 * 50
    for client in clients:
        for _ in range(50):
            code, body = client.answer()
            assert code == OK
            np.testing.assert_allclose(np.frombuffer(body, np.float32), expected, atol=1e-5)
        assert client.answer() is None


def test_a_server_that_cannot_start(built, checkpoints, tmp_path):
    for arguments, message in (
        ([], "usage: funnel_server"),
        (["--queue", "0", "a", "b"], "--queue is 0; give a number of at least 1"),
        (["--batch-tokens", "7x", "a", "b"], "--batch-tokens is 7x"),
        ([tmp_path / "nowhere", tmp_path / "socket"], "nowhere is not a checkpoint"),
    ):
        done = subprocess.run(list(map(str, [built.server, *arguments])), capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert message in done.stderr
