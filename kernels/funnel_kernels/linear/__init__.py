"""Matrix products with a model's weights, fused with what follows them."""

from typing import Any

import jax
import jax.numpy as jnp

from funnel_kernels.add_norm import add_norm
from funnel_kernels.checks import check_float, check_shape
from funnel_kernels.errors import InputError
from funnel_kernels.linear.packed import PackedWeight, Weight, prepare
from funnel_kernels.op import Op
from funnel_kernels.target import Target

__all__ = ["PackedWeight", "Weight", "gated_linear", "linear", "linear_add_norm", "prepare", "project_heads"]

# On GPUs and TPUs the products are XLA's: it calls cuBLAS there, or drives the matrix unit itself.
LINEAR: Op[jax.Array] = Op("linear", __name__, "xla", "cpu")
GATED_LINEAR: Op[jax.Array] = Op("gated_linear", __name__, "xla", "cpu")
LINEAR_ADD_NORM: Op[tuple[jax.Array, jax.Array]] = Op("linear_add_norm", __name__, "xla", "cpu")
PROJECT_HEADS: Op[tuple[jax.Array, ...]] = Op("project_heads", __name__, "xla", "cpu")


def linear(
    x: jax.Array,  # [N, in]
    weight: Weight,  # [out, in]
    add: jax.Array | None = None,  # [N, out]
    *,
    target: Target,
) -> jax.Array:  # [N, out], float32, or with `add` its dtype
    """`x @ weight.T`, accumulated in float32; with `add` the sum of both.

    The sum is rounded once. On an accelerator the product may be rounded to the dtype of `add` before it.

    Args:
        x: float32 or bfloat16.
        weight: in the dtype of `x`, as `prepare` gives it for the target.
        add: in the dtype of `x`, e.g. the residual stream.
        target: where it runs, and by whose kernels.

    Raises:
        InputError: shapes or dtypes that do not fit together.
        BackendUnavailable: the backend does not serve this call.
    """
    check_product(x, weight)
    check_parts(weight, 1)
    if add is not None:
        check_float("add", add, ndim=2, dtype=x.dtype)
        check_shape("add", add, (x.shape[0], weight.shape[0]))
    return LINEAR(x, weight, add, target=target)


def gated_linear(
    x: jax.Array,  # [N, in]
    weight: Weight,  # [2 * out, in]
    *,
    target: Target,
) -> jax.Array:  # [N, out], dtype of x
    """`gelu(x @ gate.T) * (x @ up.T)`: GeGLU (arXiv:2002.05202), the tanh approximation of gelu.

    Products, gelu and gate are float32, and the result is rounded once. On an accelerator both products are rounded
    to the dtype of `x` first, because they are the largest arrays that its memory has to pass.

    Args:
        x: float32 or bfloat16.
        weight: the rows of gate and then those of up, as `prepare` gives it for the target with `parts=2`.
        target: where it runs, and by whose kernels.

    Raises:
        InputError: shapes or dtypes that do not fit together.
        BackendUnavailable: the backend does not serve this call.
    """
    check_product(x, weight)
    check_parts(weight, 2)
    if weight.shape[0] % 2:
        raise InputError(f"weight has {weight.shape[0]} rows; those of gate and up together are an even number")
    return GATED_LINEAR(x, weight, target=target)


def linear_add_norm(
    x: jax.Array,  # [N, in]
    weight: Weight,  # [D, in]
    add: jax.Array,  # [N, D]
    norm_weight: jax.Array,  # [D]
    *,
    update_weight: jax.Array | None = None,  # [D]
    eps: float,
    axis: str | None = None,
    target: Target,
) -> tuple[jax.Array, jax.Array]:  # ([N, D], [N, D]), dtype of x
    """The end of a sub-layer: `x @ weight.T` added to the residual stream, and Gemma's RMSNorm of the sum.

    It is `add_norm(add, linear(x, weight), ...)`, where the update need not pass through memory: product, sum and norms
    are float32, the sum is rounded to the dtype of `x`, and the norm reads the rounded rows. On an accelerator what is
    added may be rounded before it is, too: the residual stream stays in the dtype of `x` there only if the sum is.

    Args:
        x: float32 or bfloat16.
        weight: in the dtype of `x`, as `prepare` gives it for the target.
        add: in the dtype of `x`, the residual stream.
        norm_weight: zero-centred weight (the factor is `1 + weight`) of the norm of the sum.
        update_weight: with it, the product is normalised before it is added (Gemma 2's and 3's norm after a sub-layer).
        eps: added to the mean square, in both norms.
        axis: inside a `jax.shard_map`, the mesh axis along which each device has some columns of `x` and `weight`.
            The product is summed over it in the dtype of `x`: in float32 twice as much would travel between devices.
        target: where it runs, and by whose kernels.

    Returns:
        The sum (the new residual stream) and its norm (the next sub-layer's input).

    Raises:
        InputError: shapes or dtypes that do not fit together.
        BackendUnavailable: the backend does not serve this call.
    """
    check_product(x, weight)
    check_parts(weight, 1)
    check_float("add", add, ndim=2, dtype=x.dtype)
    check_shape("add", add, (x.shape[0], weight.shape[0]))
    for name, norm in (("norm_weight", norm_weight), ("update_weight", update_weight)):
        if norm is not None:
            check_float(name, norm, ndim=1)
            check_shape(name, norm, (weight.shape[0],))
    if axis is not None:
        update = jax.lax.psum(linear(x, weight, target=target).astype(x.dtype), axis)
        return add_norm(add, update, norm_weight, update_weight=update_weight, eps=eps, target=target)
    return LINEAR_ADD_NORM(x, weight, add, norm_weight, update_weight, eps=eps, target=target)


def project_heads(
    x: jax.Array,  # [N, in]
    weight: Weight,  # [(sum(heads) + plain_heads) * d, in]
    cos: jax.Array,  # [N, d / 2]
    sin: jax.Array,  # [N, d / 2]
    norms: tuple[jax.Array, ...] | None = None,  # [d] each
    *,
    heads: tuple[int, ...],
    plain_heads: int = 0,
    eps: float,
    target: Target,
) -> tuple[jax.Array, ...]:  # [N, count * d] for each of `heads`, and for `plain_heads` if there are any; dtype of x
    """Attention's inputs: `x @ weight.T` cut into heads, which RoPE (arXiv:2104.09864) turns, some after their norm.

    A head's pairs (j, j + d / 2) are turned by an angle each. Product, norm and rotation are float32, and the result is
    rounded once.

    Args:
        x: float32 or bfloat16.
        weight: in the dtype of `x`, as `prepare` gives it for the target.
        cos, sin: float32, of each row's d / 2 angles.
        norms: for each of `heads` the zero-centred weight (the factor is `1 + weight`) of an RMSNorm over d before the
            rotation; None leaves all norms out.
        heads: how many heads each result has, in the order of the weight's rows: e.g. queries and keys.
        plain_heads: how many heads come last that are neither normed nor turned: values.
        eps: added to the mean square, in every norm.
        target: where it runs, and by whose kernels.

    Raises:
        InputError: shapes or dtypes that do not fit together, or numbers of heads that are not positive.
        BackendUnavailable: the backend does not serve this call.
    """
    check_product(x, weight)
    check_parts(weight, 1)
    check_float("cos", cos, ndim=2, dtype=jnp.float32)
    check_float("sin", sin, ndim=2, dtype=jnp.float32)
    check_shape("cos", cos, (x.shape[0], cos.shape[1]))
    check_shape("sin", sin, cos.shape)
    if not heads or min(heads) < 1 or plain_heads < 0:
        raise InputError(
            f"heads={heads} and plain_heads={plain_heads}: give at least one number of heads, none below 1"
        )
    head_dim, count = 2 * cos.shape[1], sum(heads) + plain_heads
    if weight.shape[0] != count * head_dim:
        raise InputError(f"weight has {weight.shape[0]} rows where {count} heads of {head_dim} need {count * head_dim}")
    if norms is not None:
        if len(norms) != len(heads):
            raise InputError(
                f"{len(norms)} norms are given for {len(heads)} groups of heads; give one for each, or none"
            )
        for norm in norms:
            check_float("norm", norm, ndim=1)
            check_shape("norm", norm, (head_dim,))
    return PROJECT_HEADS(x, weight, cos, sin, norms, heads=heads, plain_heads=plain_heads, eps=eps, target=target)


def check_product(x: jax.Array, weight: Any) -> None:
    """Raises `InputError` unless `x` [N, in] can be multiplied with `weight` [out, in]."""
    check_float("x", x, ndim=2)
    if isinstance(weight, PackedWeight):
        if weight.dtype != x.dtype:
            raise InputError(f"weight is packed as {weight.dtype} where {x.dtype} is needed; cast it before packing")
    else:
        check_float("weight", weight, ndim=2, dtype=x.dtype)
    check_shape("weight", weight, (weight.shape[0], x.shape[1]))
    if not x.shape[0] or not x.shape[1] or not weight.shape[0]:
        raise InputError(f"x {x.shape} and weight {weight.shape} need at least one row and one column each")


def check_parts(weight: Any, parts: int) -> None:
    """Raises `InputError` if `weight` is packed in another number of parts."""
    if isinstance(weight, PackedWeight) and weight.parts != parts:
        raise InputError(
            f"weight is packed in {weight.parts} parts, this product needs {parts}: prepare(parts={parts})"
        )
