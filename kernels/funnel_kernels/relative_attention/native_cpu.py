"""`relative_attention` on CPUs in C++: the tiles and the online softmax of `attention`, with scores of three terms.

bfloat16 queries are rounded again after a bias is added.
"""

import jax

from funnel_kernels import native_calls
from funnel_kernels.shapes import Heads
from funnel_kernels.target import Target


def relative_attention(
    q: Heads, *arrays: jax.Array, heads: int, scale: float, stride: int, separate_first: bool, target: Target
) -> Heads:
    return native_calls.call(
        "funnel_relative_attention",
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        q,
        *arrays,
        heads=heads,
        scale=float(scale),
        stride=stride,
        separate_first=separate_first,
        target=target,
    )
