"""The checks that the ops share. They look at shapes and dtypes only, so they cost nothing in a compiled program."""

import jax
import jax.numpy as jnp

from funnel_kernels.errors import InputError

FLOAT_DTYPES = (jnp.float32, jnp.bfloat16)


def check_float(name: str, array: jax.Array, *, ndim: int, dtype: jnp.dtype | None = None) -> None:
    """Raises `InputError` unless `array` has `ndim` axes and is float32 or bfloat16 (or exactly `dtype`)."""
    if array.ndim != ndim:
        raise InputError(f"{name} has shape {array.shape}; it must have {ndim} axes (packed rows, no batch axis)")
    if array.dtype not in FLOAT_DTYPES:
        raise InputError(
            f"{name} is {array.dtype}; use float32 or bfloat16 (Gemma's residual stream overflows float16)"
        )
    if dtype is not None and array.dtype != dtype:
        raise InputError(f"{name} is {array.dtype}; it must be {jnp.dtype(dtype).name}, so cast it first")


def check_shape(name: str, array: jax.Array, shape: tuple[int, ...]) -> None:
    """Raises `InputError` unless `array` has exactly `shape`."""
    if array.shape != shape:
        raise InputError(f"{name} has shape {array.shape}; it must have shape {shape}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises `InputError` unless `value` is one of `choices`."""
    if value not in choices:
        raise InputError(f"{name}={value!r} must be one of {', '.join(choices)}")


def check_stride(stride: int, rows: int) -> None:
    """Raises `InputError` unless `stride` is a positive divisor of `rows`."""
    if not isinstance(stride, int) or stride < 1 or rows % stride:
        raise InputError(f"stride={stride} must be positive and divide the {rows} rows; pad the rows to a multiple")
