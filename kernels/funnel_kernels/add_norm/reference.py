"""The specification of `add_norm`."""

import jax.numpy as jnp

from funnel_kernels.norm import rms_norm, rounded
from funnel_kernels.shapes import Rows, Vector


def add_norm(
    x: Rows, update: Rows | None, weight: Vector, update_weight: Vector | None, *, eps: float
) -> tuple[Rows, Rows]:
    if update is not None:
        added = update.astype(jnp.float32) if update_weight is None else rms_norm(update, update_weight, eps)
        x = rounded(x.astype(jnp.float32) + added, x.dtype)
    return x, rms_norm(x, weight, eps).astype(x.dtype)
