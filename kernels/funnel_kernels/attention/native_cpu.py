"""Attention on CPUs in C++ (native_cpu.cc): blocked, with an online softmax in float32.

bfloat16 values are multiplied in pairs if the processor supports it (AVX512-BF16), and else converted to float32.
"""

import jax

from funnel_kernels import native_calls
from funnel_kernels.shapes import Bounds, Heads
from funnel_kernels.target import Target


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
    return native_calls.call(
        "funnel_attention",
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        q,
        k,
        v,
        lo,
        hi,
        heads=heads,
        kv_heads=kv_heads,
        scale=float(scale),
        softcap=float(softcap or 0.0),
        target=target,
    )
