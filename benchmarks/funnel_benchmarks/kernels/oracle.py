"""The ops in float64 NumPy on the host: what results of the device are compared with.

Written apart from `funnel_kernels`, so that an error there does not excuse itself here. All arrays are float64.
"""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
BLOCK = 256  # query rows at a time: their scores fit the cache


def attention(
    q: Array,  # [Nq, heads * d]
    k: Array,  # [Nk, kv_heads * d]
    v: Array,  # [Nk, kv_heads * d]
    lo: Array,  # [Nq] int
    hi: Array,  # [Nq] int
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    softcap: float | None,
) -> Array:  # [Nq, heads * d]
    """Softmax attention of row `i` over the keys `lo[i] <= j < hi[i]`; 0 where there is none."""
    d, out = q.shape[1] // heads, np.zeros_like(q)
    for start in range(0, len(q), BLOCK):
        rows = start + np.flatnonzero((lo < hi)[start : start + BLOCK])
        if not len(rows):
            continue
        first, last = lo[rows].min(), hi[rows].max()
        keys = np.arange(first, last)
        seen = (lo[rows, None] <= keys) & (keys < hi[rows, None])
        for head in range(heads):
            kv = slice(head * kv_heads // heads * d, (head * kv_heads // heads + 1) * d)
            own = slice(head * d, (head + 1) * d)
            scores = scale * (q[rows, own] @ k[first:last, kv].T)
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            scores[~seen] = -np.inf
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out[rows, own] = (weights @ v[first:last, kv]) / weights.sum(1, keepdims=True)
    return out


def norm(x: Array, weight: Array, eps: float) -> Array:
    return x * (1 + weight) / np.sqrt((x * x).mean(1, keepdims=True) + eps)


def pool_norm(x: Array, real: Array, weight: Array, *, stride: int, pool: str, eps: float) -> tuple[Array, Array]:
    """Pooled rows and their norm, [N / stride, D] each, row of the window by row of the window."""
    pooled, count = np.zeros((len(x) // stride, x.shape[1])), np.zeros(len(x) // stride)
    for place in range(stride):
        row, here = x[place::stride], real[place::stride]
        first, later = here & (count == 0), here & (count > 0)
        pooled[first] = row[first]
        if pool == "max":
            pooled[later] = np.maximum(pooled, row)[later]
        elif pool == "mean":
            pooled[later] += row[later]
        count += here
    if pool == "mean":
        pooled /= np.maximum(count, 1)[:, None]
    return pooled, norm(pooled, weight, eps)


def recover_norm(
    short: Array, full: Array | None, weight: Array, *, stride: int, mode: str, site: str, eps: float
) -> Array:
    """Full-length rows, [N, D]: the short ones tiled, combined with `full`, and normalised."""
    tiled = short[np.arange(len(short) * stride) // stride]
    if full is None:
        return norm(tiled, weight, eps)
    if site == "after_norm":
        tiled, full = norm(tiled, weight, eps), norm(full, weight, eps)
    combined = {"sum": tiled + full, "mean": (tiled + full) / 2, "max": np.maximum(tiled, full)}[mode]
    return combined if site == "after_norm" else norm(combined, weight, eps)
