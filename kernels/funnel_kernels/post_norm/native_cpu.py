"""`post_norm` for CPUs, in C++ (native_cpu_kernels.h): each row and its update are read from memory once."""

import jax
import jax.numpy as jnp

from funnel_kernels import native_calls
from funnel_kernels.shapes import Rows
from funnel_kernels.target import Target


def post_norm(x: Rows, update: Rows | None, weight: jax.Array, *, eps: float, target: Target) -> Rows:
    """See `funnel_kernels.post_norm`."""
    return native_calls.call(
        "funnel_post_norm",
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        x,
        weight[0],
        weight[1].astype(jnp.float32),
        *(() if update is None else (update,)),
        eps=float(eps),
        target=target,
    )
