"""What the C library, libfunnel, calls in its interpreter: its other half. Python programs use `Engine`.

The library has checked pointers, offsets and the sizes of the caller's buffers, and hands them over as memoryviews of
bytes; what ids and options mean is checked here, by the engine. Semantics: bindings/include/funnel.h.
"""

import inspect
import json
import os
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import numpy as np

from funnel_engine.config import FunnelConfig
from funnel_engine.engine import Engine
from funnel_kernels.errors import BackendUnavailable, CheckpointError, ConfigError, InputError

API_VERSION = 1  # FUNNEL_API_VERSION of the libraries that this module serves
STATUSES = {InputError: 4, ConfigError: 5, CheckpointError: 6, BackendUnavailable: 7}  # of funnel_status
INTERNAL = 9
TASKS = {None: 0, "classify": 1, "tag": 2}  # of funnel_task

# What "options" may name. A mesh is made of Python objects; the path has a field of its own.
ENGINE_OPTIONS = tuple(name for name in inspect.signature(Engine.load).parameters if name not in ("path", "mesh"))
FUNNEL_OPTIONS = tuple(field.name for field in fields(FunnelConfig))


def open_engine(checkpoint: bytes, options: bytes | None) -> tuple[Engine, tuple[int, ...]]:
    """The engine, and what funnel_info says about it, in its order."""
    engine = Engine.load(os.fsdecode(checkpoint), **read_options(options or b"{}"))
    head, config = engine.head, engine.config
    return engine, (
        engine.embedding_size,
        len(head.labels),
        engine.max_length,
        config.vocab_size,
        TASKS[head.task],
    )


def read_options(text: bytes) -> dict[str, Any]:
    """The keyword arguments for `Engine.load` in a JSON object.

    Raises:
        ConfigError: it is not JSON, not an object, or names an unknown option.
    """
    try:
        options = json.loads(text.decode())
    except ValueError as error:  # malformed JSON, or not UTF-8
        raise ConfigError(f'options are no JSON: {error}; give an object such as {{"backend": "xla"}}') from None
    check_names("options", options, ENGINE_OPTIONS)
    if "funnel" in options:
        check_names("funnel", options["funnel"], FUNNEL_OPTIONS)
        options["funnel"] = FunnelConfig(**options["funnel"])
    return options


def check_names(where: str, value: Any, known: Iterable[str]) -> None:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a JSON object with some of {', '.join(known)}; it is {json.dumps(value)}")
    unknown = [name for name in value if name not in known]
    if unknown:
        raise ConfigError(f"{where} has the unknown name {unknown[0]!r}; choose of {', '.join(known)}")


def warmup(engine: Engine) -> None:
    engine.warmup(progress=False)


def embed(
    engine: Engine, ids: memoryview, offsets: memoryview, normalize: int, truncate_dim: int, out: memoryview
) -> None:
    write(engine.embed(ragged(ids, offsets), normalize=bool(normalize), truncate_dim=truncate_dim or None), out)


def classify(engine: Engine, ids: memoryview, offsets: memoryview, out: memoryview) -> None:
    write(engine.classify(ragged(ids, offsets)), out)


def tag(engine: Engine, ids: memoryview, offsets: memoryview, out: memoryview) -> None:
    write(np.concatenate(engine.tag(ragged(ids, offsets))), out)


def stats(engine: Engine) -> bytes:
    return json.dumps(engine.stats()).encode()


def ragged(ids: memoryview, offsets: memoryview) -> tuple[np.ndarray, np.ndarray]:
    """The caller's arrays, not copied: (ids [total], offsets [count + 1])."""
    return np.frombuffer(ids, np.int32), np.frombuffer(offsets, np.int32)


def write(result: np.ndarray, out: memoryview) -> None:
    """Copies a result into the caller's memory, which has exactly its size."""
    np.copyto(np.frombuffer(out, np.float32).reshape(result.shape), result)


def explain(error: BaseException) -> tuple[int, bytes]:
    """The status and the message of an exception that reached the library."""
    status = next((STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES), INTERNAL)
    message = str(error) if status != INTERNAL else f"{type(error).__name__}: {error}"
    return status, message.encode(errors="replace")
