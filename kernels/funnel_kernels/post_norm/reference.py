"""The specification of `post_norm`."""

import jax
import jax.numpy as jnp

from funnel_kernels.norm import widened
from funnel_kernels.shapes import Rows


def post_norm(x: Rows, update: Rows | None, weight: jax.Array, *, eps: float) -> Rows:
    total = widened(x) if update is None else widened(x) + widened(update)
    centred = total - total.mean(axis=1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(axis=1, keepdims=True) + eps)
    factor, added = widened(weight)
    return (centred * inverse * (1.0 + factor) + added).astype(x.dtype)
