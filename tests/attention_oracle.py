"""What attention must compute, for the tests of every backend."""

import functools

import numpy as np


@functools.cache
def oracle(case):
    """Float64, one row and one head at a time. Returns the output and `sum of weight * |v|`."""
    q, k, v, lo, hi = (np.asarray(array, np.float64 if array.ndim == 2 else None) for array in case.arrays())
    options, d = case.options(), case.head_dim
    out, size = np.zeros((2, *q.shape))
    for i in range(len(q)):
        for h in range(case.heads):
            if hi[i] <= lo[i]:
                continue
            kv = h * case.kv_heads // case.heads
            keys, values = (array[lo[i] : hi[i], kv * d : (kv + 1) * d] for array in (k, v))
            scores = options["scale"] * (keys @ q[i, h * d : (h + 1) * d])
            if case.softcap is not None:
                scores = case.softcap * np.tanh(scores / case.softcap)
            weights = np.exp(scores - scores.max())
            weights = weights / weights.sum()
            out[i, h * d : (h + 1) * d] = weights @ values
            size[i, h * d : (h + 1) * d] = weights @ np.abs(values)
    return out, size
