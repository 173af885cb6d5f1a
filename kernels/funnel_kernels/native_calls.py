"""Calls the C++ kernels for CPUs through XLA's foreign function interface, and checks whether they can run here."""

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
        ConfigError: FUNNEL_CPU_ISA is not the name of an instruction set.
    """
    if target.platform != "cpu":
        raise Unsupported(f"JAX runs on {target.platform}")
    if found := problem():
        raise Unsupported(found)


@functools.cache
def problem() -> str | None:
    """Why the kernels cannot run on this machine; None if they can.

    Raises:
        ConfigError: FUNNEL_CPU_ISA is not the name of an instruction set.
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
    """Warns once per process if the kernels are not installed on a machine that they support.

    Raises:
        ConfigError: FUNNEL_CPU_ISA is not the name of an instruction set.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return
    try:
        import funnel_native

        funnel_native.handlers()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except ImportError as error:
        reason = f"models run without the kernels for CPUs, several times slower: {error}"
        warnings.warn(reason, stacklevel=users_stacklevel())


def users_stacklevel() -> int:
    """The `stacklevel` with which a warning of the caller names the user's line: the first outside of our packages."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals["__name__"].partition(".")[0] in ("funnel_engine", "funnel_kernels"):
        frame, level = frame.f_back, level + 1
    return level


def instruction_set() -> str | None:
    """The best instruction set of this processor, e.g. "avx512_bf16", and the limit that the user has set; for people.

    None if the kernels cannot run here.

    Raises:
        ConfigError: FUNNEL_CPU_ISA is not the name of an instruction set.
    """
    if problem():
        return None
    import funnel_native

    found, limit = funnel_native.handlers().processor(), funnel_native.limit()
    return f"{found}, limited by {funnel_native.LIMIT}={limit}" if limit else found


def multiplies_bfloat16() -> bool:
    """Whether the kernels run here and this processor multiplies bfloat16: from AVX-512-BF16 on."""
    if problem():
        return False
    import funnel_native

    return funnel_native.handlers().instruction_set() in ("avx512_bf16", "amx")


def count_threads(target: Target) -> int:
    """The largest number of threads that a kernel uses on the target."""
    return target.threads or len(os.sched_getaffinity(0))


def check_product(dtype: np.dtype, target: Target) -> None:
    """Raises `Unsupported` unless the kernels have a fast matrix product for this dtype on the target."""
    check(target)
    if found := product_problem(str(dtype)):
        raise Unsupported(found)


@functools.cache
def product_problem(dtype: str) -> str | None:
    """Why the kernels have no fast matrix product for a dtype on this machine; None if they have one."""
    if found := problem():
        return found
    import funnel_native

    if dtype == "int8":
        return "the kernels have no product for int8 weights"
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
    """Runs a handler of the compiled module `funnel_native` on arrays.

    Args:
        handler: the name under which it is registered.
        out_shape: `jax.ShapeDtypeStruct` of the result, or a tuple of them, one for each result.
        attributes: numbers for the handler. It gets integers as int64, floats as float32 and tuples as arrays of
            int64, and also the number of threads.
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
