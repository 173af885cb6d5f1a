"""Calling the C++ kernels for CPUs through XLA's foreign function interface, and whether that is possible here."""

import functools
import os
import platform
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from funnel_kernels.errors import ConfigError
from funnel_kernels.target import Target, Unsupported


def check(target: Target) -> None:
    """Raises `Unsupported` unless the target is a CPU for which the kernels were built.

    Raises:
        ConfigError: FUNNEL_CPU_ISA names no instruction set.
    """
    if target.platform != "cpu":
        raise Unsupported(f"JAX runs on {target.platform}")
    if found := problem():
        raise Unsupported(found)


@functools.cache
def problem() -> str | None:
    """Why the kernels cannot run on this machine; None if they can.

    Raises:
        ConfigError: FUNNEL_CPU_ISA names no instruction set.
    """
    try:
        import funnel_native
    except ImportError:
        return "the package funnel_native is not installed"
    try:
        return funnel_native.problem()
    except ValueError as error:
        raise ConfigError(str(error)) from error


@functools.cache
def warn_without_kernels() -> None:
    """Warns once in a process on a machine for which the kernels were made, where they are not installed.

    Raises:
        ConfigError: FUNNEL_CPU_ISA names no instruction set.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
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
    if problem():
        return None
    import funnel_native

    found, limit = funnel_native.handlers().processor(), funnel_native.limit()
    return f"{found}, limited by {funnel_native.LIMIT}={limit}" if limit else found


def count_threads(target: Target) -> int:
    """How many threads a kernel uses there at most."""
    return target.threads or len(os.sched_getaffinity(0))


def check_product(dtype: np.dtype, target: Target) -> None:
    """Raises `Unsupported` unless the kernels have a fast product of this dtype there."""
    check(target)
    if found := product_problem(str(dtype)):
        raise Unsupported(found)


@functools.cache
def product_problem(dtype: str) -> str | None:
    """Why the kernels have no fast product of a dtype on this machine; None if they have."""
    if found := problem():
        return found
    import funnel_native

    is_bfloat16, no_product = dtype == "bfloat16", funnel_native.handlers().no_product
    if not (found := no_product(is_bfloat16)):
        return None
    limit = funnel_native.limit()
    limited = f", with {funnel_native.LIMIT}={limit}" if limit else ""
    other = "; dtype='float32' has one" if is_bfloat16 and not no_product(False) else ""
    return f"{found}{limited}{other}"


def call(
    handler: str,
    out_shape: Any,
    *arrays: jax.Array,
    target: Target,
    **attributes: int | float | bool | tuple[int, ...],
) -> Any:
    """Runs a handler of the kernels in C++ on arrays.

    Args:
        handler: the name that it is registered under.
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
    run: Callable[..., Any] = jax.ffi.ffi_call(handler, out_shape)
    return run(*arrays, **typed, threads=np.int64(count_threads(target)))
