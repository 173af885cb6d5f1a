"""The specification of `attention`: dense scores, one mask, one softmax."""

import jax
import jax.numpy as jnp

from funnel_kernels.norm import widened
from funnel_kernels.shapes import Bounds, Heads

HIGHEST = jax.lax.Precision.HIGHEST


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
) -> Heads:
    rows, keys, head_dim = q.shape[0], k.shape[0], q.shape[1] // heads
    q_heads = widened(q).reshape(rows, kv_heads, heads // kv_heads, head_dim)
    k_heads = widened(k).reshape(keys, kv_heads, head_dim)
    v_heads = widened(v).reshape(keys, kv_heads, head_dim)

    scores = scale * jnp.einsum("qhgd,khd->hgqk", q_heads, k_heads, precision=HIGHEST)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    visible = (lo[:, None] <= jnp.arange(keys)) & (jnp.arange(keys) < hi[:, None])  # [Nq, Nk]
    weights = jax.nn.softmax(scores, axis=-1, where=visible)  # 0 where nothing is visible
    out = jnp.einsum("hgqk,khd->qhgd", weights, v_heads, precision=HIGHEST)
    return out.reshape(rows, heads * head_dim).astype(q.dtype)
