"""The residual sum, fused with the RMSNorm that follows it."""

import jax
import jax.numpy as jnp

from funnel_kernels.checks import check_float, check_shape
from funnel_kernels.errors import InputError
from funnel_kernels.op import Op
from funnel_kernels.target import Target

# On accelerators XLA fuses sum and norms with what surrounds them, and has no pass of its own for them.
ADD_NORM: Op[tuple[jax.Array, jax.Array]] = Op("add_norm", __name__, "cpu")


def add_norm(
    x: jax.Array,  # [N, D]
    update: jax.Array | None,  # [N, D]
    weight: jax.Array,  # [D]
    *,
    update_weight: jax.Array | None = None,  # [D]
    eps: float,
    target: Target,
) -> tuple[jax.Array, jax.Array]:  # ([N, D], [N, D]), dtype of x
    """Adds an update to the residual stream and applies Gemma's RMSNorm to the sum.

    Sum and norms are float32. The sum is rounded to the dtype of `x`, and the norm reads the rounded rows: what the
    next residual sum starts from.

    Args:
        x: float32 or bfloat16, the residual stream.
        update: what a sub-layer made of it, in the dtype of `x` or float32. None adds nothing: the norm alone is left.
        weight: zero-centred norm weight (the factor is `1 + weight`).
        update_weight: with it, the update is normalised before it is added (Gemma 2's and 3's norm after a sub-layer).
        eps: added to the mean square, in both norms.
        target: where it runs, and by whose kernels.

    Returns:
        The sum (the new residual stream; `x` itself without an update) and its norm (the next sub-layer's input).

    Raises:
        InputError: shapes or dtypes that do not fit, or a weight for an update that is not there.
        BackendUnavailable: the backend does not serve this call.
    """
    check_float("x", x, ndim=2)
    check_float("weight", weight, ndim=1)
    check_shape("weight", weight, (x.shape[1],))
    if update is not None:
        check_float("update", update, ndim=2)
        check_shape("update", update, x.shape)
        if update.dtype not in (x.dtype, jnp.float32):
            raise InputError(f"update is {update.dtype} where x is float32; cast it to float32 first")
    if update_weight is not None:
        if update is None:
            raise InputError("update_weight is given without an update to normalise; leave it out")
        check_float("update_weight", update_weight, ndim=1)
        check_shape("update_weight", update_weight, (x.shape[1],))
    return ADD_NORM(x, update, weight, update_weight, eps=eps, target=target)
