"""The residual sum, fused with the RMSNorm after it."""

import jax
import jax.numpy as jnp

from funnel_kernels.checks import check_float, check_shape
from funnel_kernels.errors import InputError
from funnel_kernels.op import Op
from funnel_kernels.target import Target

# On accelerators XLA fuses the sum and the norms into the ops around them, so no kernel is needed there.
ADD_NORM: Op[tuple[jax.Array, jax.Array]] = Op("add_norm", __name__, "cpu")


def add_norm(
    x: jax.Array,  # [N, D]
    update: jax.Array | None,  # [N, D]
    weight: jax.Array,  # [D]
    *,
    update_weight: jax.Array | None = None,  # [D]
    scale: jax.Array | None = None,  # [1]
    eps: float,
    target: Target,
) -> tuple[jax.Array, jax.Array]:  # ([N, D], [N, D]), dtype of x
    """Adds an update to the residual stream and applies Gemma's RMSNorm to the sum.

    Sum and norms are computed in float32. The sum is rounded to the dtype of `x`, and the norm reads the rounded
    rows, as the next residual sum does.

    Args:
        x: float32 or bfloat16, the residual stream.
        update: the output of a sub-layer, in the dtype of `x` or float32. None adds nothing; only the norm is computed.
        weight: zero-centred norm weight (the factor is `1 + weight`).
        update_weight: if given, the update is normalised before it is added (the post-norms of Gemma 2 and 3).
        scale: if given, the sum is multiplied by it (the `layer_scalar` of Gemma 4).
        eps: added to the mean square, in both norms.
        target: where it runs, and with which kernels.

    Returns:
        The sum (the new residual stream; `x` itself without an update) and its norm (the next sub-layer's input).

    Raises:
        InputError: the shapes or dtypes do not fit together, or update_weight or scale is given without an update.
        BackendUnavailable: the backend does not support this call.
    """
    check_float("x", x, ndim=2)
    check_float("weight", weight, ndim=1)
    check_shape("weight", weight, (x.shape[1],))
    if update is not None:
        check_float("update", update, ndim=2)
        check_shape("update", update, x.shape)
        if update.dtype not in (x.dtype, jnp.float32):
            raise InputError(f"update is {update.dtype} but x is float32; cast update to float32 first")
    for name, array, shape in (("update_weight", update_weight, (x.shape[1],)), ("scale", scale, (1,))):
        if array is not None:
            if update is None:
                raise InputError(f"{name} is given without an update; give update too, or leave {name} out")
            check_float(name, array, ndim=1)
            check_shape(name, array, shape)
    return ADD_NORM(x, update, weight, update_weight, scale, eps=eps, target=target)
