"""`pool_norm` for TPUs, in Pallas: one read of `x`, one write of each result.

A block of windows is converted to float32, and rows that do not count are replaced by a neutral value. Then, for each
position in a window, a strided load collects the rows at that position of all windows, 8 rows per register.
"""

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from funnel_kernels import pallas_calls
from funnel_kernels.pallas_rows import GROUP, LANES, check_width, rms_norm, widen, windows_per_block
from funnel_kernels.shapes import Mask, Rows, Vector
from funnel_kernels.target import Target


def pool_norm(
    x: Rows, real: Mask, weight: Vector, *, stride: int, pool: str, eps: float, target: Target
) -> tuple[Rows, Rows]:
    """See `funnel_kernels.pool_norm`."""
    rows, width = x.shape
    check_width(width)
    windows, size = rows // stride, x.dtype.itemsize
    # Two buffers of x and of both results, and the float32 rows.
    block = windows_per_block(windows, width * (2 * size * (stride + 2) + 4 * stride))
    steps = pl.cdiv(windows, block)
    values = jnp.pad(row_values(real, stride, pool), (0, (steps * block - windows) * stride))
    per_block = pl.BlockSpec((block, width), lambda i: (i, 0))
    result = jax.ShapeDtypeStruct((windows, width), x.dtype)
    return pallas_calls.call(
        partial(pool_norm_kernel, stride=stride, pool=pool, eps=eps),
        target=target,
        semantics=("parallel",),
        grid=(steps,),
        in_specs=[
            pl.BlockSpec((block * stride, width), lambda i: (i, 0)),
            pl.BlockSpec((1, 1, block * stride), lambda i: (i, 0, 0)),
            pl.BlockSpec((1, width), lambda i: (0, 0)),
        ],
        out_specs=(per_block, per_block),
        out_shape=(result, result),
        scratch_shapes=[pltpu.VMEM((width // LANES, block * stride, LANES), jnp.float32)],
        cost_estimate=pl.CostEstimate(
            flops=windows * width * (2 * stride + 4),
            bytes_accessed=windows * width * (stride + 2) * size + 4 * rows,
            transcendentals=windows,
        ),
        name="pool_norm",
    )(x, values.reshape(steps, 1, block * stride), weight.reshape(1, width))


def row_values(real: jax.Array, stride: int, pool: str) -> jax.Array:
    """One number per row, [N] float32: the positive weight of a row that counts, or the value that replaces it.

    A row that counts has weight 1, or with "mean" 1 / n in a window of n real rows. A row that does not count is
    replaced by 0, or with "max" by -inf if its window has a real row. The counts are made by shifting the row axis,
    because an array with an axis of windows would be padded to 128 columns in memory.
    """
    position = jnp.arange(real.shape[0]) % stride
    before = sum(((position >= k) & jnp.roll(real, k) for k in range(1, stride)), jnp.zeros(real.shape, jnp.int32))
    count = sum(((position < stride - k) & jnp.roll(real, -k) for k in range(1, stride)), before + real)
    if pool == "max":
        return jnp.where(real, 1.0, jnp.where(count > 0, -jnp.inf, 0.0))
    if pool == "mean":
        return jnp.where(real, 1.0 / count, 0.0)
    return jnp.where(real & (before == 0), 1.0, 0.0)


def pool_norm_kernel(
    x_ref: Any,  # [s * n, D]
    values_ref: Any,  # [1, 1, s * n], see `row_values`
    weight_ref: Any,  # [1, D]
    pooled_ref: Any,  # [n, D]
    normed_ref: Any,  # [n, D]
    rows_ref: Any,  # [D / 128, s * n, 128] float32
    *,
    stride: int,
    pool: str,
    eps: float,
) -> None:
    """One block of `n` windows. Rows after the end of `x` are undefined; their windows are not written back."""
    windows, width = pooled_ref.shape
    columns = range(width // LANES)
    values = jnp.broadcast_to(values_ref[0], (LANES, windows * stride)).T  # [s * n, 128]
    for start in range(0, windows, GROUP):
        windows_of_group, rows = pl.ds(start, GROUP), slice(start * stride, (start + GROUP) * stride)
        value = widen(values[rows], width)
        x = x_ref[rows].astype(jnp.float32)
        x = jnp.where(value > 0, x * value if pool == "mean" else x, value)
        for c in columns:
            rows_ref[c, rows] = x[:, c * LANES : (c + 1) * LANES]
        rows_by_position = [
            jnp.concatenate([rows_ref.at[c][pl.ds(start * stride + j, GROUP, stride=stride)] for c in columns], axis=1)
            for j in range(stride)
        ]
        pooled = reduce(jnp.maximum if pool == "max" else jnp.add, rows_by_position)
        pooled_ref[windows_of_group] = pooled.astype(pooled_ref.dtype)
        normed_ref[windows_of_group] = rms_norm(pooled, weight_ref, eps).astype(normed_ref.dtype)
