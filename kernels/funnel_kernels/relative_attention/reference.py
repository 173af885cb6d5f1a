"""The specification of `relative_attention`: three dense terms, one mask, one softmax."""

import jax
import jax.numpy as jnp

from funnel_kernels.norm import widened
from funnel_kernels.shapes import Bounds, Heads

HIGHEST = jax.lax.Precision.HIGHEST
BOTH = 2  # see `funnel_kernels.relative_attention`


def relative_attention(
    q: Heads,
    k: Heads,
    v: Heads,
    lo: Bounds,
    hi: Bounds,
    query_types: jax.Array,
    key_types: jax.Array,
    biases: Heads,
    offsets: Heads,
    same: Heads,
    *,
    heads: int,
    scale: float,
    stride: int,
    separate_first: bool,
) -> Heads:
    rows, keys, reach = q.shape[0], k.shape[0], offsets.shape[0] // 2
    q_heads, k_heads, v_heads, bias_heads, offset_heads, same_heads = (
        widened(array).reshape(len(array), heads, -1) for array in (q, k, v, biases, offsets, same)
    )
    row, key = jnp.arange(rows)[:, None], jnp.arange(keys)

    content = jnp.einsum("qhd,khd->hqk", q_heads + bias_heads[0], k_heads, precision=HIGHEST)
    by_offset = jnp.einsum("qhd,ohd->hqo", q_heads + bias_heads[1], offset_heads, precision=HIGHEST)
    distance = jnp.clip(reach + stride * row - key, 0, 2 * reach)  # clipped only where the mask hides it
    position = jnp.take_along_axis(by_offset, distance[None], axis=2)
    by_type = jnp.einsum("qhd,shd->hqs", q_heads + bias_heads[2], same_heads, precision=HIGHEST)
    is_same = (query_types[:, None] == key_types) | (query_types[:, None] == BOTH) | (key_types == BOTH)
    token_type = jnp.where(is_same, by_type[..., 1:], by_type[..., :1])

    relative = position + token_type
    if separate_first:
        is_first = (key == lo[:, None]) | (stride * row <= lo[:, None])  # the key, or the query
        relative = jnp.where(is_first, 0.0, relative)
    visible = (lo[:, None] <= key) & (key < hi[:, None])
    weights = jax.nn.softmax(scale * (content + relative), axis=-1, where=visible)  # 0 where nothing is visible
    out = jnp.einsum("hqk,khd->qhd", weights, v_heads, precision=HIGHEST)
    return out.reshape(rows, -1).astype(q.dtype)
