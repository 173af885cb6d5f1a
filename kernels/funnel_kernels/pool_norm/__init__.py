"""Pooling of the token axis, fused with the RMSNorm after it."""

import jax
import jax.numpy as jnp

from funnel_kernels.checks import check_choice, check_float, check_shape, check_stride
from funnel_kernels.errors import InputError
from funnel_kernels.op import Op
from funnel_kernels.target import Target

POOLS = ("max", "mean", "first")
POOL_NORM: Op[tuple[jax.Array, jax.Array]] = Op("pool_norm", __name__, "cpu", "triton", "tpu")


def pool_norm(
    x: jax.Array,  # [N, D]
    real: jax.Array,  # [N] bool
    weight: jax.Array,  # [D]
    *,
    stride: int,
    pool: str,
    eps: float,
    target: Target,
) -> tuple[jax.Array, jax.Array]:  # ([N / stride, D], [N / stride, D]), dtype of x
    """Pools each window of `stride` rows into one and applies Gemma's RMSNorm to the result.

    Only the real rows of a window count, each once: "max" is their elementwise, signed maximum, "mean" is their mean in
    float32, "first" is the first of them. A window without real rows becomes 0. The norm reads the pooled row in
    float32, before it is rounded to the dtype of `x`. In the derivative, rows that share a maximum share its gradient
    in equal parts.

    Args:
        x: float32 or bfloat16, the residual stream.
        real: True where a row contains a token.
        weight: zero-centred norm weight (the factor is `1 + weight`).
        stride: rows per window; must divide N. Windows start at row 0.
        pool: "max", "mean" or "first".
        eps: added to the mean square.
        target: where it runs, and with which kernels.

    Returns:
        The pooled rows (the new residual stream) and their norm (the next layer's input).

    Raises:
        InputError: the shapes, dtypes or options do not fit together.
        BackendUnavailable: the backend does not support this call.
    """
    check_float("x", x, ndim=2)
    check_stride(stride, x.shape[0])
    check_choice("pool", pool, POOLS)
    check_float("weight", weight, ndim=1)
    check_shape("weight", weight, (x.shape[1],))
    check_shape("real", real, (x.shape[0],))
    if real.dtype != jnp.bool_:
        raise InputError(f"real is {real.dtype}; it must be bool, True where a row contains a token")
    return POOL_NORM(x, real, weight, stride=stride, pool=pool, eps=eps, target=target)
