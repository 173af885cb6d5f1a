"""The residual sum and its LayerNorm, as models with norms after their sub-layers have it."""

import jax
import jax.numpy as jnp

from funnel_kernels.checks import check_float, check_shape
from funnel_kernels.errors import InputError
from funnel_kernels.op import Op
from funnel_kernels.target import Target

# On accelerators XLA fuses the sum and the norm into the ops around them, as those of `add_norm`.
POST_NORM: Op[jax.Array] = Op("post_norm", __name__, "cpu")


def post_norm(
    x: jax.Array,  # [N, D]
    update: jax.Array | None,  # [N, D]
    weight: jax.Array,  # [2, D]
    *,
    eps: float,
    target: Target,
) -> jax.Array:  # [N, D], dtype of x
    """`LayerNorm(x + update)` (Ba et al. 2016, arXiv:1607.06450): the end of a sub-layer whose norm comes last.

    Sum, mean, variance and the result before it is rounded are float32. The variance is that of all D numbers.

    Args:
        x: float32 or bfloat16, the input of the sub-layer.
        update: the output of the sub-layer, in the dtype of `x` or float32. None adds nothing.
        weight: the zero-centred factors (each is `1 + weight[0]`), and what is added after them, `weight[1]`.
        eps: added to the variance.
        target: where it runs, and with which kernels.

    Raises:
        InputError: the shapes or dtypes do not fit together.
        BackendUnavailable: the backend does not support this call.
    """
    check_float("x", x, ndim=2)
    check_float("weight", weight, ndim=2)
    check_shape("weight", weight, (2, x.shape[1]))
    if update is not None:
        check_float("update", update, ndim=2)
        check_shape("update", update, x.shape)
        if update.dtype not in (x.dtype, jnp.float32):
            raise InputError(f"update is {update.dtype} but x is float32; cast update to float32 first")
    return POST_NORM(x, update, weight, eps=eps, target=target)
