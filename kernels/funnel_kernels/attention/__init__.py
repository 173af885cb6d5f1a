"""Attention in which every query row sees one contiguous interval of key rows."""

import jax
import jax.numpy as jnp

from funnel_kernels.checks import check_float, check_shape
from funnel_kernels.errors import InputError
from funnel_kernels.op import Op
from funnel_kernels.target import Target

ATTENTION: Op[jax.Array] = Op("attention", __name__, "xla", "cpu", "mosaic", "triton", "tpu")


def attention(
    q: jax.Array,  # [Nq, heads * d]
    k: jax.Array,  # [Nk, kv_heads * d]
    v: jax.Array,  # [Nk, kv_heads * d]
    lo: jax.Array,  # [Nq] int32
    hi: jax.Array,  # [Nq] int32
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    softcap: float | None = None,
    target: Target,
) -> jax.Array:  # [Nq, heads * d], dtype of q
    """Softmax attention over packed rows: query row `i` sees the key rows `lo[i] <= j < hi[i]`.

    Sequence boundaries, padding, causality, sliding windows, and queries on a different stride than the keys are
    all intervals. Query head `h` reads key/value head `h // (heads // kv_heads)`. Scores are
    `scale * q . k`, then `softcap * tanh(scores / softcap)` if a softcap is given (Gemma 2, arXiv:2408.00118), then
    the mask, then a float32 softmax. A row whose interval is empty gets 0.

    Backends "xla" and "reference" have reverse-mode derivatives by q, k and v, here as in every op.

    Args:
        q, k, v: float32 or bfloat16, all of one dtype, finite in every row. The heads of a row are side by side.
        lo, hi: int32, `0 <= lo` and `hi <= Nk`. An interval with `lo >= hi` is empty.
        heads, kv_heads: numbers of query heads and key/value heads; kv_heads must divide heads.
        scale: factor of the scores.
        softcap: bound on the scores' absolute value, or None.
        target: where it runs, and with which kernels.

    Raises:
        InputError: the shapes or dtypes do not fit together.
        BackendUnavailable: the backend does not support this call.
    """
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise InputError(f"heads={heads} must be a positive multiple of kv_heads={kv_heads}")
    check_float("q", q, ndim=2)
    if q.shape[1] % heads:
        raise InputError(f"q is {q.shape[1]} wide; heads={heads} must divide its width")
    if not q.shape[0] or not k.shape[0]:
        raise InputError(f"q has {q.shape[0]} rows and k has {k.shape[0]}; each must have at least one row")
    head_dim = q.shape[1] // heads
    for name, array in (("k", k), ("v", v)):
        check_float(name, array, ndim=2, dtype=q.dtype)
        check_shape(name, array, (k.shape[0], kv_heads * head_dim))
    for name, array in (("lo", lo), ("hi", hi)):
        check_shape(name, array, (q.shape[0],))
        if array.dtype != jnp.int32:
            raise InputError(f"{name} is {array.dtype}; it must be int32")
    return ATTENTION(q, k, v, lo, hi, heads=heads, kv_heads=kv_heads, scale=scale, softcap=softcap, target=target)
