"""`attention` for NVIDIA GPUs (sm_80 and newer): flash attention (arXiv:2205.14135) over key intervals, in Triton.

A program computes one block of queries of one key/value head. The block contains, row after row, all `heads / kv_heads`
query heads that read this key/value head, so they share every loaded key and value. The program loops over the key
blocks between the smallest `lo` and the largest `hi` of its rows, with an online softmax in float32. It masks only the
blocks that some row sees in part. If no row of a block sees a key (padding at the end of a batch), it reads no keys.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from funnel_kernels import triton_calls
from funnel_kernels.shapes import Bounds, Heads
from funnel_kernels.target import Target, Unsupported

LOG2_E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(2**31 - 1)  # greater than every key index
WIDEST = 256  # head dim


class Sizes(NamedTuple):
    """Queries (over all heads of a group) and keys per block, warps per program, stages of the load pipeline."""

    block_q: int
    block_k: int
    warps: int
    stages: int


def attention(
    q: Heads,
    k: Heads,
    v: Heads,
    lo: Bounds,
    hi: Bounds,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    softcap: float | None,
    target: Target,
    sizes: Sizes | None = None,
) -> Heads:
    """See `funnel_kernels.attention`; `sizes` default to the tuning table, or else to `rule`."""
    head_dim = q.shape[1] // heads
    if head_dim > WIDEST:
        raise Unsupported(f"heads are {head_dim} wide; the kernel supports at most {WIDEST}")
    capability = triton_calls.capability(target)
    block_d = padded(head_dim)
    sizes = (
        sizes
        or triton_calls.tuned_sizes(Sizes, "attention", block_d, q.dtype, target)
        or rule(block_d, q.dtype, capability)
    )
    grid, options = launch(q.shape[0], q.dtype, heads, kv_heads, head_dim, scale, softcap, sizes)
    result = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return triton_calls.call(
        attention_kernel, q, k, v, lo, hi, q.shape[0], out_shape=result, grid=grid, target=target, **options
    )


def padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))  # the matrix units take at least 16


def launch(
    rows: int, dtype: Any, heads: int, kv_heads: int, head_dim: int, scale: float, softcap: float | None, sizes: Sizes
) -> triton_calls.Launch:
    """The grid, and the compile-time constants of the kernel."""
    group = heads // kv_heads
    block_d = padded(head_dim)
    # A float32 product is three TF32 products. Their operands would not fit into registers, so wide rows are split.
    precision = "tf32x3" if dtype == jnp.float32 else "tf32"
    chunk = 32 if dtype == jnp.float32 and block_d > 64 else block_d
    block_q, block_k, warps, stages = sizes
    block_q = min(block_q, max(16, triton.next_power_of_2(rows * group)))
    options = {
        "group": group, "kv_heads": kv_heads, "head_dim": head_dim,
        "scale": scale, "softcap": softcap or 0.0,
        "block_q": block_q, "block_k": block_k, "block_d": block_d, "chunk": chunk, "precision": precision,
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
    return (triton.cdiv(rows * group, block_q) * kv_heads,), options


def shared_bytes(block_d: int, dtype: Any, sizes: Sizes) -> int:
    """The shared memory of a program: its queries and, for each stage, one block of keys and one of values.

    Wide float32 rows are split into chunks and need less.
    """
    return dtype.itemsize * block_d * (sizes.block_q + 2 * sizes.stages * sizes.block_k)


def rule(block_d: int, dtype: Any, capability: int) -> Sizes:
    """Sizes whose tiles fit into registers and shared memory."""
    if dtype == jnp.float32:
        return Sizes(32, 32, 8, 2) if block_d >= 128 else Sizes(32, 32, 4, 2)
    if block_d == 256:
        return Sizes(128, 32, 8, 2) if capability >= 90 else Sizes(64, 64, 8, 2)
    return Sizes(128, 64, 8, 3)


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, lo_ptr, hi_ptr, rows, out_ptr,
    group: tl.constexpr, kv_heads: tl.constexpr, head_dim: tl.constexpr,
    scale: tl.constexpr, softcap: tl.constexpr,
    block_q: tl.constexpr, block_k: tl.constexpr, block_d: tl.constexpr, chunk: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0) % kv_heads
    index = tl.program_id(0) // kv_heads * block_q + tl.arange(0, block_q)
    index = tl.minimum(index, rows * group - 1)  # the end of the last block repeats the last row, so no mask is needed
    row, member = index // group, index % group

    lo = tl.load(lo_ptr + row)
    hi = tl.load(hi_ptr + row)
    sees_keys = lo < hi
    first = tl.min(tl.where(sees_keys, lo, FAR), 0) // block_k * block_k
    last = tl.max(tl.where(sees_keys, hi, 0), 0)
    # All rows that see any key see all keys from `whole_begin` to `whole_end`. If no row sees a key, `last` is 0.
    whole_begin = tl.cdiv(tl.max(tl.where(sees_keys, lo, 0), 0), block_k) * block_k
    whole_end = tl.minimum(tl.min(tl.where(sees_keys, hi, FAR), 0), last) // block_k * block_k
    if whole_begin >= whole_end:
        whole_begin = last
        whole_end = last

    column = tl.arange(0, block_d)
    row_offset = (row.to(tl.int64) * (kv_heads * group) + kv_head * group + member) * head_dim
    offset = row_offset[:, None] + column[None, :]
    in_head = (column < head_dim)[None, :]
    q = tl.load(q_ptr + offset, mask=in_head, other=0.0)
    q_ptr += row_offset
    out = tl.zeros([block_q, block_d], tl.float32)
    total = tl.zeros([block_q], tl.float32)
    peak = tl.full([block_q], float("-inf"), tl.float32)
    k_ptr += kv_head * head_dim
    v_ptr += kv_head * head_dim
    out, total, peak = attend(
        q, q_ptr, out, total, peak, k_ptr, v_ptr, lo, hi, first, whole_begin,
        kv_heads * head_dim, head_dim, scale, softcap, block_k, block_d, chunk, precision, True,
    )  # fmt: skip
    out, total, peak = attend(
        q, q_ptr, out, total, peak, k_ptr, v_ptr, lo, hi, whole_begin, whole_end,
        kv_heads * head_dim, head_dim, scale, softcap, block_k, block_d, chunk, precision, False,
    )  # fmt: skip
    out, total, peak = attend(
        q, q_ptr, out, total, peak, k_ptr, v_ptr, lo, hi, whole_end, last,
        kv_heads * head_dim, head_dim, scale, softcap, block_k, block_d, chunk, precision, True,
    )  # fmt: skip
    out = tl.where(sees_keys[:, None], out / tl.where(sees_keys, total, 1.0)[:, None], 0.0)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=in_head)


@triton.jit
def attend(
    q, q_ptr, out, total, peak, k_ptr, v_ptr, lo, hi, begin, end,
    stride: tl.constexpr, head_dim: tl.constexpr,
    scale: tl.constexpr, softcap: tl.constexpr,
    block_k: tl.constexpr, block_d: tl.constexpr, chunk: tl.constexpr, precision: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Adds the key blocks from `begin` to `end` to an online softmax: sums, and the peak score they are relative to.

    No row sees a key at `end` or later, and none is read.

    `q` contains the query rows and `q_ptr` points to their first columns. If `chunk` is narrower than the rows, queries
    and keys are loaded chunk by chunk.
    """
    column = tl.arange(0, block_d)
    for start in range(begin, end, block_k):
        key = start + tl.arange(0, block_k)
        offset = key.to(tl.int64)[:, None] * stride + column[None, :]
        mask = (key < end)[:, None] & (column < head_dim)[None, :]
        unmasked: tl.constexpr = not masked and block_d == head_dim
        if chunk == block_d:
            k = tl.load(k_ptr + offset) if unmasked else tl.load(k_ptr + offset, mask=mask, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=precision)
        else:
            scores = tl.zeros([q.shape[0], block_k], tl.float32)
            for c in range(0, head_dim, chunk):
                part = c + tl.arange(0, chunk)
                in_head = (part < head_dim)[None, :]
                q_part = tl.load(q_ptr[:, None] + part[None, :], mask=in_head, other=0.0)
                k_part_ptr = k_ptr + key.to(tl.int64)[:, None] * stride + part[None, :]
                k_part = tl.load(k_part_ptr, mask=(key < end)[:, None] & in_head, other=0.0)
                scores = tl.dot(q_part, tl.trans(k_part), scores, input_precision=precision)
        if softcap > 0.0:  # tanh from the base-2 exponential, which is a hardware instruction
            scores = softcap - 2 * softcap / (tl.exp2(scores * (2 * LOG2_E * scale / softcap)) + 1)
            scores = scores * LOG2_E
        else:
            scores = scores * (scale * LOG2_E)
        if masked:
            visible = (lo[:, None] <= key[None, :]) & (key[None, :] < hi[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher) if masked else higher  # no key seen yet
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None]
        v = tl.load(v_ptr + offset) if unmasked else tl.load(v_ptr + offset, mask=mask, other=0.0)
        out = tl.dot(weights.to(v.dtype), v, out, input_precision=precision)
        peak = higher
    return out, total, peak
