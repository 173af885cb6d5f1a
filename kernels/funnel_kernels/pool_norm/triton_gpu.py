"""`pool_norm` for NVIDIA GPUs, in Triton: one read of `x`, one write of each result.

A program computes a block of whole windows, so the mean square of a pooled row is a sum over its own registers.
"""

import jax
import triton
import triton.language as tl

from funnel_kernels import triton_calls
from funnel_kernels.shapes import Mask, Rows, Vector
from funnel_kernels.target import Target


def pool_norm(
    x: Rows,
    real: Mask,
    weight: Vector,
    *,
    stride: int,
    pool: str,
    eps: float,
    target: Target,
    sizes: triton_calls.RowSizes | None = None,
) -> tuple[Rows, Rows]:
    """See `funnel_kernels.pool_norm`; `sizes` default to `triton_calls.row_sizes`."""
    sizes = sizes or triton_calls.row_sizes("pool_norm", x.shape[1], x.dtype, target)
    windows, width = x.shape[0] // stride, x.shape[1]
    grid, options = launch(windows, width, stride, pool, eps, sizes)
    results = (jax.ShapeDtypeStruct((windows, width), x.dtype),) * 2
    return triton_calls.call(
        pool_norm_kernel, x, real, weight, windows, out_shape=results, grid=grid, target=target, **options
    )


def launch(
    windows: int, width: int, stride: int, pool: str, eps: float, sizes: triton_calls.RowSizes
) -> triton_calls.Launch:
    """The grid, and the compile-time constants of the kernel."""
    options = {
        "width": width,
        "stride": stride,
        "pool": pool,
        "eps": eps,
        "block_windows": sizes.block_rows,
        "block_width": triton.next_power_of_2(width),
        "num_warps": sizes.warps,
        "num_stages": 1,
    }
    return (triton.cdiv(windows, sizes.block_rows),), options


@triton.jit
def pool_norm_kernel(
    x_ptr,
    real_ptr,
    weight_ptr,
    windows,
    pooled_ptr,
    normed_ptr,
    width: tl.constexpr,
    stride: tl.constexpr,
    pool: tl.constexpr,
    eps: tl.constexpr,
    block_windows: tl.constexpr,
    block_width: tl.constexpr,
):
    window = tl.program_id(0) * block_windows + tl.arange(0, block_windows)
    column = tl.arange(0, block_width)
    in_range = window < windows
    pooled = tl.full([block_windows, block_width], float("-inf") if pool == "max" else 0.0, tl.float32)
    count = tl.zeros([block_windows], tl.int32)
    for i in tl.static_range(stride):
        row = window.to(tl.int64) * stride + i
        real = tl.load(real_ptr + row, mask=in_range, other=0) != 0
        needed = (real & (count == 0) if pool == "first" else real)[:, None] & (column < width)[None, :]
        x = tl.load(x_ptr + row[:, None] * width + column[None, :], mask=needed, other=0.0).to(tl.float32)
        if pool == "max":
            pooled = tl.where(needed, tl.maximum(pooled, x), pooled)
        else:
            pooled += x
        count += real.to(tl.int32)
    if pool == "mean":
        pooled = pooled / tl.maximum(count, 1).to(tl.float32)[:, None]
    pooled = tl.where((count > 0)[:, None] & (column < width)[None, :], pooled, 0.0)

    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    normed = pooled * tl.rsqrt(tl.sum(pooled * pooled, 1) / width + eps)[:, None] * (1.0 + weight)[None, :]
    offset = window.to(tl.int64)[:, None] * width + column[None, :]
    mask = in_range[:, None] & (column < width)[None, :]
    tl.store(pooled_ptr + offset, pooled.to(pooled_ptr.dtype.element_ty), mask=mask)
    tl.store(normed_ptr + offset, normed.to(normed_ptr.dtype.element_ty), mask=mask)
