"""The specification of `pool_norm`."""

import jax.numpy as jnp

from funnel_kernels.norm import rms_norm, widened
from funnel_kernels.shapes import Mask, Rows, Vector


def pool_norm(x: Rows, real: Mask, weight: Vector, *, stride: int, pool: str, eps: float) -> tuple[Rows, Rows]:
    windows = widened(x).reshape(-1, stride, x.shape[1])
    is_real = real.reshape(-1, stride, 1)
    if pool == "max":
        pooled = jnp.where(is_real, windows, -jnp.inf).max(axis=1)
    elif pool == "mean":
        pooled = jnp.where(is_real, windows, 0.0).sum(axis=1) / jnp.maximum(is_real.sum(axis=1), 1)
    else:
        first = jnp.argmax(is_real, axis=1, keepdims=True)
        pooled = jnp.take_along_axis(windows, first, axis=1)[:, 0]
    pooled = jnp.where(is_real.any(axis=1), pooled, 0.0)
    return pooled.astype(x.dtype), rms_norm(pooled, weight, eps).astype(x.dtype)
