"""The specification of `recover_norm`."""

import jax.numpy as jnp

from funnel_kernels.norm import rms_norm, widened
from funnel_kernels.shapes import Rows, Vector


def recover_norm(
    short: Rows, full: Rows | None, weight: Vector, *, stride: int, mode: str, site: str, eps: float
) -> Rows:
    if full is None:  # mode "tile": tiling and the norm commute, so the short rows are normalised
        return tile(rms_norm(short, weight, eps).astype(short.dtype), stride)
    if site == "before_norm":
        rows = combine(tile(short, stride), full, mode)
        return rms_norm(rows, weight, eps).astype(short.dtype)
    tiled = tile(rms_norm(short, weight, eps), stride)
    return combine(tiled, rms_norm(full, weight, eps), mode).astype(short.dtype)


def tile(short: Rows, stride: int) -> Rows:
    return jnp.repeat(short, stride, axis=0)


def combine(tiled: Rows, full: Rows, mode: str) -> Rows:  # float32
    tiled = widened(tiled)
    if mode == "max":
        return jnp.maximum(tiled, full)
    return (tiled + full) * (0.5 if mode == "mean" else 1.0)
