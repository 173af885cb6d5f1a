"""`attention` for NVIDIA GPUs (sm_80 and newer): flash attention (arXiv:2205.14135) over key intervals, in Triton.

A program owns one block of a key/value head's queries: the `heads / kv_heads` query heads that read it lie next to each
other in a block, row after row, so that they share every key and value that is loaded. It walks over the key blocks
between the smallest `lo` and the largest `hi` of its rows with an online softmax in float32, and masks only the blocks
that some row sees in part. A block whose rows see nothing, such as padding at the end of a batch, visits no key block.
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
FAR = tl.constexpr(2**31 - 1)  # behind every key
WIDEST = 256  # head dim


class Sizes(NamedTuple):
    """Queries (over all heads of a group) and keys a block, warps a program, stages of the load pipeline."""

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
    """See `funnel_kernels.attention`; `sizes` are those of the tuning table or the rule below unless given."""
    head_dim = q.shape[1] // heads
    if head_dim > WIDEST:
        raise Unsupported(f"heads are {head_dim} wide; its registers hold at most {WIDEST}")
    capability = triton_calls.capability(target)
    block_d = padded(head_dim)
    sizes = (
        sizes or triton_calls.tuned(Sizes, "attention", block_d, q.dtype, target) or rule(block_d, q.dtype, capability)
    )
    grid, options = launch(q.shape[0], q.dtype, heads, kv_heads, head_dim, scale, softcap, sizes)
    result = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return triton_calls.call(
        attention_kernel, q, k, v, lo, hi, q.shape[0], out_shape=result, grid=grid, target=target, **options
    )


def padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))  # the least that the matrix units take


def launch(
    rows: int, dtype: Any, heads: int, kv_heads: int, head_dim: int, scale: float, softcap: float | None, sizes: Sizes
) -> triton_calls.Launch:
    """The grid, and everything that is fixed when the kernel is compiled."""
    group = heads // kv_heads
    block_d = padded(head_dim)
    # A float32 product is three of TF32. Their operands fill the registers unless wide rows are taken part by part.
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
    """What a program needs of shared memory: its queries and, for each stage, a block of keys and one of values. With
    wide float32 rows, which are taken part by part, it is less."""
    return dtype.itemsize * block_d * (sizes.block_q + 2 * sizes.stages * sizes.block_k)


def rule(block_d: int, dtype: Any, capability: int) -> Sizes:
    """Sizes whose tiles fit the registers and the shared memory."""
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
    index = tl.minimum(index, rows * group - 1)  # what is left of the last block repeats its last row: no masks
    row, member = index // group, index % group

    lo = tl.load(lo_ptr + row)
    hi = tl.load(hi_ptr + row)
    some = lo < hi
    first = tl.min(tl.where(some, lo, FAR), 0) // block_k * block_k
    last = tl.max(tl.where(some, hi, 0), 0)
    # Blocks from `whole` to `rest` are seen by every row that sees anything; if none does, `last` is 0.
    whole = tl.cdiv(tl.max(tl.where(some, lo, 0), 0), block_k) * block_k
    rest = tl.minimum(tl.min(tl.where(some, hi, FAR), 0), last) // block_k * block_k
    if whole >= rest:
        whole = last
        rest = last

    column = tl.arange(0, block_d)
    begins = (row.to(tl.int64) * (kv_heads * group) + kv_head * group + member) * head_dim
    at = begins[:, None] + column[None, :]
    there = (column < head_dim)[None, :]
    q = tl.load(q_ptr + at, mask=there, other=0.0)
    q_ptr += begins
    out = tl.zeros([block_q, block_d], tl.float32)
    total = tl.zeros([block_q], tl.float32)
    peak = tl.full([block_q], float("-inf"), tl.float32)
    k_ptr += kv_head * head_dim
    v_ptr += kv_head * head_dim
    out, total, peak = attend(
        q, q_ptr, out, total, peak, k_ptr, v_ptr, lo, hi, first, whole,
        kv_heads * head_dim, head_dim, scale, softcap, block_k, block_d, chunk, precision, True,
    )  # fmt: skip
    out, total, peak = attend(
        q, q_ptr, out, total, peak, k_ptr, v_ptr, lo, hi, whole, rest,
        kv_heads * head_dim, head_dim, scale, softcap, block_k, block_d, chunk, precision, False,
    )  # fmt: skip
    out, total, peak = attend(
        q, q_ptr, out, total, peak, k_ptr, v_ptr, lo, hi, rest, last,
        kv_heads * head_dim, head_dim, scale, softcap, block_k, block_d, chunk, precision, True,
    )  # fmt: skip
    out = tl.where(some[:, None], out / tl.where(some, total, 1.0)[:, None], 0.0)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def attend(
    q, q_ptr, out, total, peak, k_ptr, v_ptr, lo, hi, begin, end,
    stride: tl.constexpr, head_dim: tl.constexpr,
    scale: tl.constexpr, softcap: tl.constexpr,
    block_k: tl.constexpr, block_d: tl.constexpr, chunk: tl.constexpr, precision: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Takes the key blocks from `begin` to `end` into an online softmax: sums, and the peak they are relative to.

    No row sees a key from `end` on, and none is read.

    `q` holds the rows of queries and `q_ptr` points to where they begin: with a `chunk` that is narrower than the rows,
    queries and keys are loaded part by part.
    """
    column = tl.arange(0, block_d)
    for start in range(begin, end, block_k):
        key = start + tl.arange(0, block_k)
        at = key.to(tl.int64)[:, None] * stride + column[None, :]
        there = (key < end)[:, None] & (column < head_dim)[None, :]
        plain: tl.constexpr = not masked and block_d == head_dim
        if chunk == block_d:
            k = tl.load(k_ptr + at) if plain else tl.load(k_ptr + at, mask=there, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=precision)
        else:
            scores = tl.zeros([q.shape[0], block_k], tl.float32)
            for c in range(0, head_dim, chunk):
                part = c + tl.arange(0, chunk)
                needed = (part < head_dim)[None, :]
                some_q = tl.load(q_ptr[:, None] + part[None, :], mask=needed, other=0.0)
                some_k_ptr = k_ptr + key.to(tl.int64)[:, None] * stride + part[None, :]
                some_k = tl.load(some_k_ptr, mask=(key < end)[:, None] & needed, other=0.0)
                scores = tl.dot(some_q, tl.trans(some_k), scores, input_precision=precision)
        if softcap > 0.0:  # tanh by the base-2 exponential, which the hardware has
            scores = softcap - 2 * softcap / (tl.exp2(scores * (2 * LOG2_E * scale / softcap)) + 1)
            scores = scores * LOG2_E
        else:
            scores = scores * (scale * LOG2_E)
        if masked:
            visible = (lo[:, None] <= key[None, :]) & (key[None, :] < hi[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher) if masked else higher  # nothing seen yet
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None]
        v = tl.load(v_ptr + at) if plain else tl.load(v_ptr + at, mask=there, other=0.0)
        out = tl.dot(weights.to(v.dtype), v, out, input_precision=precision)
        peak = higher
    return out, total, peak
