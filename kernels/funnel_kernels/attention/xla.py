"""Blocked attention in portable jax.numpy: online softmax, and only the key blocks that a query block can see.

One tile is a block of query rows with all query heads of one key/value head. These heads share the loaded keys, and
every product is a plain 2-D product (XLA:CPU has no batched product of bfloat16 into float32). The work is
proportional to the interval lengths, rounded up to blocks; no array of size Nq x Nk exists.

The online softmax is that of Milakov and Gimelshein (arXiv:1805.02867), in blocks as in FlashAttention
(arXiv:2205.14135).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from funnel_kernels.shapes import Bounds, Heads
from funnel_kernels.target import Target

MASKED = -1e30  # far below any score, but finite, so that a row without visible keys does not become NaN
KEYS_PER_BLOCK = 256
SCORE_ROWS_PER_BLOCK = 1024  # query rows times the query heads that share a key/value head
State = tuple[jax.Array, jax.Array, jax.Array]  # per score row: largest score, sum of weights, weighted values

LEAST_QUERIES_PER_BLOCK, MOST_QUERIES_PER_BLOCK = 64, 256


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
) -> Heads:
    rows, head_dim, group = q.shape[0], q.shape[1] // heads, heads // kv_heads
    wanted = min(max(SCORE_ROWS_PER_BLOCK // group, LEAST_QUERIES_PER_BLOCK), MOST_QUERIES_PER_BLOCK)
    block_q, block_k = even_block(rows, wanted), even_block(k.shape[0], KEYS_PER_BLOCK)
    q, lo, hi = (pad_rows(array, block_q) for array in (q, lo, hi))
    k, v = pad_rows(k, block_k), pad_rows(v, block_k)
    q_blocks = q.shape[0] // block_q

    # The key blocks [first, last) that each query block needs; a row with an empty interval needs none.
    sees_keys = lo < hi
    first = jnp.where(sees_keys, lo, k.shape[0]).reshape(q_blocks, block_q).min(1) // block_k
    last = ceil_div(jnp.where(sees_keys, hi, 0).reshape(q_blocks, block_q).max(1), block_k)

    def tile(index: jax.Array, q: Heads) -> Heads:
        block, head = index // kv_heads, index % kv_heads
        start = block * block_q
        lo_rows = lax.dynamic_slice(lo, (start,), (block_q,))[:, None, None]
        hi_rows = lax.dynamic_slice(hi, (start,), (block_q,))[:, None, None]
        q_tile = lax.dynamic_slice(q, (start, head * group * head_dim), (block_q, group * head_dim))
        q_tile = q_tile.reshape(block_q * group, head_dim)

        def visit(key_block: jax.Array, state: State) -> State:
            running_max, running_sum, weighted = state
            at = (key_block * block_k, head * head_dim)
            k_tile = lax.dynamic_slice(k, at, (block_k, head_dim))
            v_tile = lax.dynamic_slice(v, at, (block_k, head_dim))
            scores = scale * product(q_tile, k_tile, contract=(1, 1))
            if softcap is not None:
                scores = softcap * jnp.tanh(scores / softcap)
            keys = at[0] + jnp.arange(block_k)
            visible = (lo_rows <= keys) & (keys < hi_rows)  # [block_q, 1, block_k]
            scores = jnp.where(visible, scores.reshape(block_q, group, block_k), MASKED).reshape(scores.shape)
            new_max = jnp.maximum(running_max, scores.max(1))
            weights = jnp.exp(scores - new_max[:, None])
            shrink = jnp.exp(running_max - new_max)
            return (
                new_max,
                running_sum * shrink + weights.sum(1),
                weighted * shrink[:, None] + product(weights.astype(v.dtype), v_tile, contract=(1, 0)),
            )

        initial = (
            jnp.full(block_q * group, MASKED, jnp.float32),
            jnp.zeros(block_q * group, jnp.float32),
            jnp.zeros((block_q * group, head_dim), jnp.float32),
        )
        _, total, weighted = lax.fori_loop(first[block], last[block], visit, initial)
        out = (weighted / jnp.maximum(total, 1e-30)[:, None]).reshape(block_q, group, head_dim)
        out = jnp.where(lo_rows < hi_rows, out, 0.0).astype(q.dtype).reshape(block_q, group * head_dim)
        return lax.dynamic_update_slice(q, out, (start, head * group * head_dim))

    # The result of a tile replaces its queries, which no other tile reads. This saves a second array of that size.
    return lax.fori_loop(0, q_blocks * kv_heads, tile, q)[:rows]


def product(a: jax.Array, b: jax.Array, *, contract: tuple[int, int]) -> jax.Array:
    """2-D matrix product with a float32 result. Float32 operands keep full precision on every platform."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def ceil_div(a: Any, b: int) -> Any:
    return -(-a // b)


def even_block(rows: int, most: int) -> int:
    """The block size, at most `most`, that cuts `rows` into the fewest blocks of near-equal size (little padding)."""
    blocks = -(-rows // most)
    return -(-rows // blocks)


def pad_rows(array: jax.Array, multiple: int) -> jax.Array:
    missing = -array.shape[0] % multiple
    return jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) if missing else array
