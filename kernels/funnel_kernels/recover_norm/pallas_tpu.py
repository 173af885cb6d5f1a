"""`recover_norm` for TPUs, in Pallas: one read of `short` and of `full`, one write of the result.

The short rows of a block are converted to float32. For each position in a window, a strided store copies them there.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from funnel_kernels import pallas_calls
from funnel_kernels.pallas_rows import GROUP, LANES, check_width, rms_norm, windows_per_block
from funnel_kernels.shapes import Rows, Vector
from funnel_kernels.target import Target


def recover_norm(
    short: Rows, full: Rows | None, weight: Vector, *, stride: int, mode: str, site: str, eps: float, target: Target
) -> Rows:
    """See `funnel_kernels.recover_norm`."""
    windows, width = short.shape
    check_width(width)
    size, full_size = short.dtype.itemsize, 0 if full is None else full.dtype.itemsize
    # Two buffers of short, of full and of the result, and the float32 rows.
    block = windows_per_block(windows, width * (2 * (size + stride * (full_size + size)) + 4 * stride))
    per_window = pl.BlockSpec((block, width), lambda i: (i, 0))
    per_row = pl.BlockSpec((block * stride, width), lambda i: (i, 0))
    operands = [short, weight.reshape(1, width)]
    in_specs = [per_window, pl.BlockSpec((1, width), lambda i: (0, 0))]
    if full is not None:
        operands.append(full)
        in_specs.append(per_row)
    norm_first = mode == "tile" or site == "after_norm"  # tiling and the norm commute
    return pallas_calls.call(
        partial(recover_norm_kernel, stride=stride, mode=mode, norm_first=norm_first, eps=eps),
        target=target,
        semantics=("parallel",),
        grid=(pl.cdiv(windows, block),),
        in_specs=in_specs,
        out_specs=per_row,
        out_shape=jax.ShapeDtypeStruct((windows * stride, width), short.dtype),
        scratch_shapes=[pltpu.VMEM((width // LANES, block * stride, LANES), jnp.float32)],
        cost_estimate=pl.CostEstimate(
            flops=windows * width * 6 * stride,
            bytes_accessed=windows * width * (size + stride * (full_size + size)),
            transcendentals=windows * stride,
        ),
        name="recover_norm",
    )(*operands)


def recover_norm_kernel(
    short_ref: Any,  # [n, D]
    weight_ref: Any,  # [1, D]
    *refs: Any,  # full [s * n, D], unless the mode is "tile"; the result [s * n, D]; rows [D / 128, s * n, 128] float32
    stride: int,
    mode: str,
    norm_first: bool,
    eps: float,
) -> None:
    """One block of `n` short rows. Rows after the end of `short` are undefined; their results are not written back."""
    *full_ref, out_ref, rows_ref = refs
    windows, width = short_ref.shape
    columns = range(width // LANES)
    for start in range(0, windows, GROUP):
        full_rows = slice(start * stride, (start + GROUP) * stride)
        short = short_ref[start : start + GROUP].astype(jnp.float32)
        if norm_first:
            short = rms_norm(short, weight_ref, eps)
        for c in columns:
            for j in range(stride):
                tiled = pl.ds(start * stride + j, GROUP, stride=stride)
                rows_ref.at[c][tiled] = short[:, c * LANES : (c + 1) * LANES]
        rows = jnp.concatenate([rows_ref[c, full_rows] for c in columns], axis=1)
        if mode != "tile":
            full = full_ref[0][full_rows].astype(jnp.float32)
            if norm_first:
                full = rms_norm(full, weight_ref, eps)
            rows = jnp.maximum(rows, full) if mode == "max" else rows + full
            if mode == "mean":
                rows *= 0.5
            if not norm_first:
                rows = rms_norm(rows, weight_ref, eps)
        out_ref[full_rows] = rows.astype(out_ref.dtype)
