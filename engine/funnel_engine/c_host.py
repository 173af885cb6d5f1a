"""The Python half of the C library, libfunnel, which calls these functions. Python programs use `Engine`.

The library checks pointers, offsets and buffer sizes, and passes buffers as memoryviews of bytes. The values of ids and
options are checked here, by the engine. The semantics are in bindings/include/funnel.h.
"""

import functools
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funnel_engine.config import FunnelConfig, parse_funnel
from funnel_engine.engine import Engine
from funnel_engine.inputs import Ragged
from funnel_engine.jax_settings import default_settings
from funnel_kernels.errors import BackendUnavailable, CheckpointError, ConfigError, InputError

API_VERSION = 3  # FUNNEL_API_VERSION of the libraries that this module supports


class Cancelled(Exception):
    """The host stopped the warm-up."""


STATUSES = {InputError: 4, ConfigError: 5, CheckpointError: 6, BackendUnavailable: 7, Cancelled: 10}  # funnel_status
INTERNAL = 9
TASKS = {None: 0, "classify": 1, "tag": 2, "answer": 3}  # of funnel_task

# The valid names in "options". A mesh consists of Python objects, so it cannot be given; the path has its own field.
ENGINE_OPTIONS = tuple(name for name in inspect.signature(Engine.load).parameters if name not in ("path", "mesh"))
FUNNEL_OPTIONS = tuple(field.name for field in fields(FunnelConfig))


def open_engine(checkpoint: bytes, options: bytes | None) -> tuple[Engine, tuple[int, ...]]:
    """Loads an engine; returns it with the values of funnel_info, in the order of its fields."""
    engine = Engine.load(os.fsdecode(checkpoint), **read_options(b"{}" if options is None else options))
    compile_first_program()
    head, config = engine.head, engine.config
    return engine, (
        engine.embedding_size,
        len(head.labels),
        engine.max_length,
        config.vocab_size,
        TASKS[head.task],
    )


@functools.cache
def compile_first_program() -> None:
    """Makes XLA create the objects that are destroyed at `exit`, before the library registers its own exit handler."""
    with default_settings():
        jax.jit(lambda x: jnp.exp(x @ x))(np.ones((8, 8), np.float32)).block_until_ready()


def read_options(text: bytes) -> dict[str, Any]:
    """The keyword arguments for `Engine.load` from a JSON object.

    Raises:
        ConfigError: the text is not a JSON object, or contains an unknown option.
    """
    try:
        options = json.loads(text.decode())
    except (ValueError, RecursionError) as error:  # malformed, not UTF-8, or nested too deeply
        remedy = 'give an object such as {"backend": "xla"}, or NULL for the defaults'
        raise ConfigError(f"options are not JSON: {error}; {remedy}") from None
    check_names("options", options, ENGINE_OPTIONS)
    if isinstance(options.get("funnel"), str):
        options["funnel"] = parse_funnel(options["funnel"])
    elif options.get("funnel") is not None and not isinstance(options["funnel"], list):
        check_names("funnel", options["funnel"], FUNNEL_OPTIONS)
        options["funnel"] = FunnelConfig(**options["funnel"])
    return options


def check_names(where: str, value: Any, known: Iterable[str]) -> None:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a JSON object with some of {', '.join(known)}; it is {json.dumps(value)}")
    unknown = [name for name in value if name not in known]
    if unknown:
        raise ConfigError(f"{where} has the unknown name {unknown[0]!r}; choose from {', '.join(known)}")


def warmup(engine: Engine, buckets: memoryview | None, report: Callable[[int, int], bool]) -> None:
    """Compiles the buckets for these numbers of rows, or all buckets; `report(done, total)` returns whether to stop."""

    def progress(done: int, total: int) -> None:
        if report(done, total):
            raise Cancelled(f"the warm-up was stopped after {done} of {total} programs; call it again to go on")

    engine.warmup(progress=progress, buckets=None if buckets is None else np.frombuffer(buckets, np.int32).tolist())


def embed(
    engine: Engine,
    ids: memoryview,
    types: memoryview | None,
    offsets: memoryview,
    normalize: int,
    truncate_dim: int,
    out: memoryview,
) -> None:
    inputs = ragged(ids, types, offsets)
    write(engine.embed(inputs, normalize=bool(normalize), truncate_dim=truncate_dim or None), out)


def embed_texts(
    engine: Engine,
    texts: list[bytes],
    prompt_name: bytes | None,
    truncate: int,
    normalize: int,
    truncate_dim: int,
    out: memoryview,
) -> None:
    vectors = engine.embed(
        [decode(f"input {index}", text) for index, text in enumerate(texts)],
        normalize=bool(normalize),
        truncate_dim=truncate_dim or None,
        prompt_name=None if prompt_name is None else decode("prompt_name", prompt_name),
        truncate=bool(truncate),
    )
    write(vectors, out)


def decode(name: str, text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8: {error.reason} at byte {error.start}; encode it as UTF-8") from None


def classify(engine: Engine, ids: memoryview, types: memoryview | None, offsets: memoryview, out: memoryview) -> None:
    write(engine.classify(ragged(ids, types, offsets)), out)


def tag(engine: Engine, ids: memoryview, types: memoryview | None, offsets: memoryview, out: memoryview) -> None:
    write(np.concatenate(engine.tag(ragged(ids, types, offsets))), out)


def answer(engine: Engine, ids: memoryview, types: memoryview | None, offsets: memoryview, out: memoryview) -> None:
    write(np.concatenate(engine.answer(ragged(ids, types, offsets))), out)


def stats(engine: Engine) -> bytes:
    return json.dumps(engine.stats()).encode()


def describe(engine: Engine) -> bytes:
    return engine.describe().encode()


class HostLog(logging.Handler):
    """Passes log records to the host."""

    def __init__(self, write: Callable[[int, bytes], None]):
        super().__init__()
        self.write = write

    def emit(self, record: logging.LogRecord) -> None:
        self.write(record.levelno, self.format(record).replace("\0", "\\0").encode(errors="replace"))


def log_to(write: Callable[[int, bytes], None] | None) -> None:
    """Sends log messages to `write(level, message)` instead of standard error; None restores standard error."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, HostLog)]:
        root.removeHandler(handler)
    if write is not None:
        root.addHandler(HostLog(write))
    logging.captureWarnings(write is not None)


def ragged(ids: memoryview, types: memoryview | None, offsets: memoryview) -> Ragged:
    """The caller's arrays without a copy: ids and types [total], offsets [count + 1]."""
    numbers = None if types is None else np.frombuffer(types, np.int32)
    return Ragged(np.frombuffer(ids, np.int32), np.frombuffer(offsets, np.int32), numbers)


def write(result: np.ndarray, out: memoryview) -> None:
    """Copies a result into the caller's buffer, which has exactly the right size."""
    np.copyto(np.frombuffer(out, np.float32).reshape(result.shape), result)


def explain(error: BaseException) -> tuple[int, bytes]:
    """The status and the message of an exception that reached the library."""
    status = next((STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES), INTERNAL)
    message = str(error) if status != INTERNAL else f"{type(error).__name__}: {error}"
    return status, message.encode(errors="replace")
