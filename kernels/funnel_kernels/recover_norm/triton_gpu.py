"""`recover_norm` for NVIDIA GPUs, in Triton: one read of `short` and of `full`, one write of the result.

A program computes all full-length rows of the windows of its short rows, so no short row is read twice.
"""

import jax
import triton
import triton.language as tl

from funnel_kernels import triton_calls
from funnel_kernels.shapes import Rows, Vector
from funnel_kernels.target import Target


def recover_norm(
    short: Rows,
    full: Rows | None,
    weight: Vector,
    *,
    stride: int,
    mode: str,
    site: str,
    eps: float,
    target: Target,
    sizes: triton_calls.RowSizes | None = None,
) -> Rows:
    """See `funnel_kernels.recover_norm`; `sizes` default to `triton_calls.row_sizes`."""
    sizes = sizes or triton_calls.row_sizes("recover_norm", short.shape[1], short.dtype, target)
    rows, width = short.shape
    grid, options = launch(rows, width, stride, mode, site, eps, sizes)
    result = jax.ShapeDtypeStruct((rows * stride, width), short.dtype)
    full = short if full is None else full  # the kernel needs a pointer, but does not read it
    return triton_calls.call(
        recover_norm_kernel, short, full, weight, rows, out_shape=result, grid=grid, target=target, **options
    )


def launch(
    rows: int, width: int, stride: int, mode: str, site: str, eps: float, sizes: triton_calls.RowSizes
) -> triton_calls.Launch:
    """The grid, and the compile-time constants of the kernel."""
    options = {
        "width": width,
        "stride": stride,
        "mode": mode,
        "norm_first": mode == "tile" or site == "after_norm",  # tiling and the norm commute
        "eps": eps,
        "block_rows": sizes.block_rows,
        "block_width": triton.next_power_of_2(width),
        "num_warps": sizes.warps,
        "num_stages": 1,
    }
    return (triton.cdiv(rows, sizes.block_rows),), options


@triton.jit
def recover_norm_kernel(
    short_ptr,
    full_ptr,
    weight_ptr,
    rows,
    out_ptr,
    width: tl.constexpr,
    stride: tl.constexpr,
    mode: tl.constexpr,
    norm_first: tl.constexpr,
    eps: tl.constexpr,
    block_rows: tl.constexpr,
    block_width: tl.constexpr,
):
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    column = tl.arange(0, block_width)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    factor = 1.0 + tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    short = tl.load(short_ptr + row.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    if norm_first:
        short = rms_norm(short, factor, width, eps)
    for i in tl.static_range(stride):
        offset = (row.to(tl.int64) * stride + i)[:, None] * width + column[None, :]
        out = short
        if mode != "tile":
            full = tl.load(full_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            if norm_first:
                full = rms_norm(full, factor, width, eps)
            out = tl.maximum(short, full) if mode == "max" else short + full
            if mode == "mean":
                out = out * 0.5
            if not norm_first:
                out = rms_norm(out, factor, width, eps)
        tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm(x, factor, width: tl.constexpr, eps: tl.constexpr):
    """RMSNorm of rows whose columns after `width` are 0."""
    return x * tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None] * factor[None, :]
