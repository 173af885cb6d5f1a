"""The specification of `pool_norm`."""

import jax
import jax.numpy as jnp

from funnel_kernels.norm import rms_norm, widened
from funnel_kernels.shapes import Mask, Rows, Vector


def pool_norm(x: Rows, real: Mask, weight: Vector, *, stride: int, pool: str, eps: float) -> tuple[Rows, Rows]:
    windows = widened(x).reshape(-1, stride, x.shape[1])
    is_real = real.reshape(-1, stride, 1)
    if pool == "max":
        pooled = window_max(jnp.where(is_real, windows, -jnp.inf))
    elif pool == "mean":
        pooled = jnp.where(is_real, windows, 0.0).sum(axis=1) / jnp.maximum(is_real.sum(axis=1), 1)
    else:
        first = jnp.argmax(is_real, axis=1, keepdims=True)
        pooled = jnp.take_along_axis(windows, first, axis=1)[:, 0]
    pooled = jnp.where(is_real.any(axis=1), pooled, 0.0)
    return pooled.astype(x.dtype), rms_norm(pooled, weight, eps).astype(x.dtype)


@jax.custom_vjp
def window_max(windows: jax.Array) -> jax.Array:  # [N, stride, D] -> [N, D]
    """The maximum of each window; rows that share it share its gradient.

    JAX's own derivative looks for rows that are equal to the maximum. XLA may compute the rows again for that, rounded
    in another way (with `jax.checkpoint`, for example), and then finds none. Rows that are compared with each other
    always have a largest one.
    """
    return windows.max(axis=1)


def window_max_backward(windows: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    is_largest = (windows[:, :, None] >= windows[:, None]).all(axis=2)
    return (jnp.where(is_largest, gradient[:, None] / is_largest.sum(axis=1, keepdims=True), 0.0),)


window_max.defvjp(lambda windows: (window_max(windows), windows), window_max_backward)
