"""Calling the C++ kernels for CPUs through XLA's foreign function interface, and whether that is possible here."""

import contextlib
import contextvars
import functools
import importlib
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from funnel_kernels.errors import ConfigError

THREADS = contextvars.ContextVar("threads", default=0)


@contextlib.contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Kernels that are traced inside run on at most `count` threads; 0 stands for one for each core of the process."""
    token = THREADS.set(count)
    try:
        yield
    finally:
        THREADS.reset(token)


def implementation(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of a module, which raises `NotImplementedError` where the kernels cannot run."""

    def served(*arrays: Any, **options: Any) -> Any:
        check_runs()
        return getattr(importlib.import_module(module), name)(*arrays, **options)

    return served


@functools.cache
def check_runs() -> None:
    """Raises `NotImplementedError` unless JAX runs on a CPU for which the kernels were built.

    Raises:
        ConfigError: FUNNEL_CPU_ISA names no instruction set.
    """
    device = jax.devices()[0].platform
    if device != "cpu":
        raise NotImplementedError(f"JAX runs on {device}")
    try:
        import funnel_native
    except ImportError as error:
        raise NotImplementedError("the package funnel_native is not installed") from error
    try:
        problem = funnel_native.problem()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if problem:
        raise NotImplementedError(problem)


@functools.cache
def warn_without_kernels() -> None:
    """Warns once in a process where the kernels were made for this machine, but are not installed.

    Raises:
        ConfigError: FUNNEL_CPU_ISA names no instruction set.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64") or jax.devices()[0].platform != "cpu":
        return
    try:
        import funnel_native

        funnel_native.handlers()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except ImportError as error:
        warnings.warn(f"models run without the kernels for CPUs, several times slower: {error}", stacklevel=4)


def instruction_set() -> str | None:
    """The best that this processor has, e.g. "avx512_bf16", and its limit, for people; None where no kernels run.

    Raises:
        ConfigError: FUNNEL_CPU_ISA names no instruction set.
    """
    try:
        check_runs()
    except NotImplementedError:
        return None
    import funnel_native

    found, limit = funnel_native.handlers().processor(), funnel_native.limit()
    return f"{found}, limited by {funnel_native.LIMIT}={limit}" if limit else found


def threads() -> int:
    """How many threads a kernel that is traced now will run on."""
    return THREADS.get() or len(os.sched_getaffinity(0))


@functools.cache
def check_product(dtype: np.dtype) -> None:
    """Raises `NotImplementedError` unless oneDNN has a fast product of this dtype here."""
    check_runs()
    import funnel_native

    is_bfloat16, no_product = str(dtype) == "bfloat16", funnel_native.handlers().no_product
    if problem := no_product(is_bfloat16):
        limit = funnel_native.limit()
        limited = f", with {funnel_native.LIMIT}={limit}" if limit else ""
        other = "; dtype='float32' has one" if is_bfloat16 and not no_product(False) else ""
        raise NotImplementedError(f"{problem}{limited}{other}")


def call(target: str, out_shape: Any, *arrays: jax.Array, **attributes: int | float | bool | tuple[int, ...]) -> Any:
    """Runs a handler of bindings/native on arrays.

    Args:
        target: the name that it is registered under.
        out_shape: `jax.ShapeDtypeStruct` of the result, or a tuple of them.
        attributes: its numbers; it gets integers as int64, floats as float32, tuples as arrays of int64, and `threads`
            besides.
    """
    kinds: dict[type, Callable[[Any], Any]] = {
        bool: np.bool_,
        int: np.int64,
        float: np.float32,
        tuple: partial(np.array, dtype=np.int64),
    }
    typed = {name: kinds[type(value)](value) for name, value in attributes.items()}
    return jax.ffi.ffi_call(target, out_shape)(*arrays, **typed, threads=np.int64(threads()))
