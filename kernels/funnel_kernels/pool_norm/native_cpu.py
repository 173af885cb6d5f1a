"""`pool_norm` for CPUs, in C++ (native_cpu_kernels.h): each window is read once, each result written once."""

import jax

import funnel_native
from funnel_kernels import native_calls
from funnel_kernels.shapes import Mask, Rows, Vector
from funnel_kernels.target import Target


def pool_norm(
    x: Rows, real: Mask, weight: Vector, *, stride: int, pool: str, eps: float, target: Target
) -> tuple[Rows, Rows]:
    """See `funnel_kernels.pool_norm`."""
    result = jax.ShapeDtypeStruct((x.shape[0] // stride, x.shape[1]), x.dtype)
    return native_calls.call(
        "funnel_pool_norm",
        (result, result),
        x,
        real,
        weight,
        stride=stride,
        pooling=funnel_native.handlers().POOLS.index(pool),
        eps=float(eps),
        target=target,
    )
