"""libfunnel for tests: how it is built, and called through ctypes in a process that already runs Python."""

import ctypes
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_models

ROOT = Path(__file__).resolve().parents[1]
HEADER = ROOT / "bindings" / "include" / "funnel.h"
PROGRAMS = ROOT / "tests" / "bindings" / "c_api" / "programs"
STATUSES = {
    name: int(value) for name, value in re.findall(r"^  FUNNEL_(\w+) = (\d+)", HEADER.read_text(), re.MULTILINE)
}
WIDTH = tiny_models.CONFIG.hidden_size
IDS = np.array([2, 17, 93, 5, 2, 40, 41, 42, 43, 2, 99, 7], np.int32)
TYPES = np.array([2, 0, 0, 1, 2, 0, 0, 1, 1, 2, 1, 1], np.int32)
OFFSETS = np.array([0, 4, 9, 12], np.int32)
OPTIONS = '{"max_batch_tokens": 16}'  # one bucket, so little to compile


def run(*command: Any, **options: Any) -> str:
    """What a command prints; a failure shows all it said."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900, **options)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def configure(source: Path, build: Path, *options: str) -> Path:
    strict = "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON", "-DCMAKE_BUILD_TYPE=Release"
    run("cmake", "-S", source, "-B", build, "-G", "Ninja", *strict, *options)
    return build


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


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_char_p, ctypes.c_void_p)
PROGRESS = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p)


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
        fields = {
            "struct_size": ctypes.sizeof(Options),
            "options": None if options is None else options.encode(),
        } | fields
        handle = ctypes.c_void_p(1)
        try:
            given = Options(checkpoint=checkpoint and os.fsencode(checkpoint), **fields)
            self.call("open", ctypes.byref(given), ctypes.byref(handle))
        except Refused:
            assert not handle
            raise
        return handle

    def embed(
        self,
        handle: Any,
        ids=IDS,
        offsets=OFFSETS,
        count: int = 3,
        normalize: int = 1,
        truncate_dim: int = 0,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        out = np.full((count, truncate_dim or WIDTH), np.nan, np.float32) if out is None else out
        self.call("embed", handle, pointer(ids), pointer(offsets), count, normalize, truncate_dim, *floats(out))
        return out

    def embed_texts(
        self,
        handle: Any,
        texts: list[bytes | None],
        *,
        lengths: list[int] | None = None,
        prompt_name: bytes | None = None,
        truncate: int = 0,
        normalize: int = 1,
        truncate_dim: int = 0,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        count = len(texts)
        out = np.full((count, truncate_dim or WIDTH), np.nan, np.float32) if out is None else out
        given = (ctypes.c_char_p * count)(*texts), lengths and (ctypes.c_size_t * count)(*lengths), count
        self.call("embed_texts", handle, *given, prompt_name, truncate, normalize, truncate_dim, *floats(out))
        return out

    def warmup(self, handle: Any, buckets: list[int] | None = None, progress: Any = None) -> None:
        rows = None if buckets is None else np.array(buckets, np.int32)
        self.call("warmup_buckets", handle, pointer(rows), len(buckets or ()), PROGRESS(progress or 0), None)

    def label(self, function: str, handle: Any, out: np.ndarray, ids=IDS, offsets=OFFSETS) -> np.ndarray:
        self.call(function, handle, pointer(ids), pointer(offsets), len(offsets) - 1, *floats(out))
        return out

    def typed(self, function: str, handle: Any, out: np.ndarray, types: Any = TYPES) -> np.ndarray:
        """`function` of the ids and offsets above with types; an `embed` is not normalised."""
        options = (0, 0) if function == "embed_typed" else ()
        arguments = pointer(IDS), pointer(types), pointer(OFFSETS), 3, *options
        self.call(function, handle, *arguments, *floats(out))
        return out

    def stats(self, handle: Any) -> dict[str, float]:
        return json.loads(self.text("stats", handle))

    def text(self, function: str, handle: Any) -> str:
        text, needed = ctypes.create_string_buffer(5000), ctypes.c_size_t()
        self.call(function, handle, text, ctypes.c_size_t(len(text)), ctypes.byref(needed))
        assert needed.value == len(text.value) + 1
        return text.value.decode()

    def close(self, handle: Any) -> None:
        self.call("close", handle)


def pointer(array: Any) -> Any:
    return array.ctypes.data_as(ctypes.c_void_p) if isinstance(array, np.ndarray) else array


def floats(out: np.ndarray) -> tuple[Any, ctypes.c_size_t]:
    return pointer(out), ctypes.c_size_t(out.size)
