"""`attention` for NVIDIA GPUs (sm_80 and newer): flash attention (arXiv:2205.14135) over key intervals, in Triton.

A program owns one block of a key/value head's queries: the `heads / kv_heads` query heads that read it lie next to each
other in a block, row after row, so that they share every key and value that is loaded. It walks over the key blocks
between the smallest `lo` and the largest `hi` of its rows with an online softmax in float32, and masks only the blocks
that some row sees in part.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from funnel_kernels import triton_calls

LOG2_E = tl.constexpr(1.4426950408889634)
WIDEST = 256  # head dim


class Sizes(NamedTuple):
    """Queries (over all heads of a group) and keys a block, warps a program, stages of the load pipeline."""

    block_q: int
    block_k: int
    warps: int
    stages: int


def attention(q, k, v, lo, hi, *, heads, kv_heads, scale, softcap, sizes=None):
    """See `funnel_kernels.attention`; `sizes` are those of the tuning table or the rule below unless given."""
    head_dim = q.shape[1] // heads
    if head_dim > WIDEST:
        raise NotImplementedError(f"heads are {head_dim} wide; its registers hold at most {WIDEST}")
    capability = triton_calls.capability()
    block_d = padded(head_dim)
    sizes = sizes or triton_calls.tuned(Sizes, "attention", block_d, q.dtype) or rule(block_d, q.dtype, capability)
    grid, options = launch(q.shape[0], k.shape[0], q.dtype, heads, kv_heads, head_dim, scale, softcap, sizes)
    return triton_calls.call(
        attention_kernel, q, k, v, lo, hi, out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype), grid=grid, **options
    )


def padded(head_dim):
    return max(16, triton.next_power_of_2(head_dim))  # the least that the matrix units take


def launch(rows, keys, dtype, heads, kv_heads, head_dim, scale, softcap, sizes):
    """The grid, and everything that is fixed when the kernel is compiled."""
    group = heads // kv_heads
    block_d = padded(head_dim)
    # A float32 product is three of TF32. Their operands fill the registers unless wide rows are taken part by part.
    precision = "tf32x3" if dtype == jnp.float32 else "tf32"
    chunk = 32 if dtype == jnp.float32 and block_d > 64 else block_d
    block_q, block_k, warps, stages = sizes
    block_q = min(block_q, max(16, triton.next_power_of_2(rows * group)))
    options = {
        "rows": rows, "keys": keys, "group": group, "kv_heads": kv_heads, "head_dim": head_dim,
        "scale": scale, "softcap": softcap or 0.0,
        "block_q": block_q, "block_k": block_k, "block_d": block_d, "chunk": chunk, "precision": precision,
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
    return (triton.cdiv(rows * group, block_q) * kv_heads,), options


def rule(block_d, dtype, capability):
    """Sizes whose tiles fit the registers and the shared memory."""
    if dtype == jnp.float32:
        return Sizes(32, 32, 8, 2) if block_d >= 128 else Sizes(32, 32, 4, 2)
    if block_d == 256:
        return Sizes(128, 32, 8, 2) if capability >= 90 else Sizes(64, 64, 8, 2)
    return Sizes(128, 64, 8, 3)


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, lo_ptr, hi_ptr, out_ptr,
    rows: tl.constexpr, keys: tl.constexpr, group: tl.constexpr, kv_heads: tl.constexpr, head_dim: tl.constexpr,
    scale: tl.constexpr, softcap: tl.constexpr,
    block_q: tl.constexpr, block_k: tl.constexpr, block_d: tl.constexpr, chunk: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (rows * group + block_q - 1) // block_q
    kv_head = tl.program_id(0) // blocks
    index = (tl.program_id(0) % blocks) * block_q + tl.arange(0, block_q)
    row, member = index // group, index % group
    inside = row < rows

    lo = tl.load(lo_ptr + row, mask=inside, other=0)
    hi = tl.load(hi_ptr + row, mask=inside, other=0)
    some = lo < hi
    first = tl.min(tl.where(some, lo, keys), 0) // block_k * block_k
    last = tl.max(tl.where(some, hi, 0), 0)
    # Blocks from `whole` to `rest` are seen by every row that sees anything.
    whole = tl.cdiv(tl.max(tl.where(some, lo, 0), 0), block_k) * block_k
    rest = tl.min(tl.where(some, hi, keys), 0) // block_k * block_k
    if whole >= rest:
        whole = last
        rest = last

    column = tl.arange(0, block_d)
    begins = (row.to(tl.int64) * (kv_heads * group) + kv_head * group + member) * head_dim
    at = begins[:, None] + column[None, :]
    there = inside[:, None] & (column < head_dim)[None, :]
    q = tl.load(q_ptr + at, mask=there, other=0.0)
    q_ptr += tl.where(inside, begins, 0)
    out = tl.zeros([block_q, block_d], tl.float32)
    total = tl.zeros([block_q], tl.float32)
    peak = tl.full([block_q], float("-inf"), tl.float32)
    k_ptr += kv_head * head_dim
    v_ptr += kv_head * head_dim
    out, total, peak = attend(
        q, q_ptr, out, total, peak, k_ptr, v_ptr, lo, hi, first, whole,
        keys, kv_heads * head_dim, head_dim, scale, softcap, block_k, block_d, chunk, precision, True,
    )  # fmt: skip
    out, total, peak = attend(
        q, q_ptr, out, total, peak, k_ptr, v_ptr, lo, hi, whole, rest,
        keys, kv_heads * head_dim, head_dim, scale, softcap, block_k, block_d, chunk, precision, False,
    )  # fmt: skip
    out, total, peak = attend(
        q, q_ptr, out, total, peak, k_ptr, v_ptr, lo, hi, rest, last,
        keys, kv_heads * head_dim, head_dim, scale, softcap, block_k, block_d, chunk, precision, True,
    )  # fmt: skip
    out = tl.where(some[:, None], out / tl.where(some, total, 1.0)[:, None], 0.0)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def attend(
    q, q_ptr, out, total, peak, k_ptr, v_ptr, lo, hi, begin, end,
    keys: tl.constexpr, stride: tl.constexpr, head_dim: tl.constexpr,
    scale: tl.constexpr, softcap: tl.constexpr,
    block_k: tl.constexpr, block_d: tl.constexpr, chunk: tl.constexpr, precision: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Takes the key blocks from `begin` to `end` into an online softmax: sums, and the peak they are relative to.

    `q` holds the rows of queries and `q_ptr` points to where they begin: with a `chunk` that is narrower than the rows,
    queries and keys are loaded part by part.
    """
    column = tl.arange(0, block_d)
    for start in range(begin, end, block_k):
        key = start + tl.arange(0, block_k)
        at = key.to(tl.int64)[:, None] * stride + column[None, :]
        there = (key < keys)[:, None] & (column < head_dim)[None, :]
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
                some_k = tl.load(some_k_ptr, mask=(key < keys)[:, None] & needed, other=0.0)
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
