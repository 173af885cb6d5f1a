"""Matrix products with the weights of a model, fused with the operations after them."""

from typing import Any

import jax
import jax.numpy as jnp

from funnel_kernels.add_norm import add_norm
from funnel_kernels.checks import check_choice, check_float, check_shape
from funnel_kernels.errors import InputError
from funnel_kernels.linear.packed import LARGEST, PackedWeight, QuantizedWeight, Weight, prepare, quantize
from funnel_kernels.op import Op
from funnel_kernels.target import Target

__all__ = [
    "ACTIVATIONS",
    "PackedWeight",
    "QuantizedWeight",
    "Weight",
    "gated_linear",
    "linear",
    "linear_add_norm",
    "prepare",
    "project_heads",
    "quantize",
]

ACTIVATIONS = ("gelu_tanh", "silu")

# On GPUs and TPUs XLA computes the products: it calls cuBLAS, or uses the matrix unit of the TPU.
LINEAR: Op[jax.Array] = Op("linear", __name__, "xla", "cpu")
GATED_LINEAR: Op[jax.Array] = Op("gated_linear", __name__, "xla", "cpu")
LINEAR_ADD_NORM: Op[tuple[jax.Array, jax.Array]] = Op("linear_add_norm", __name__, "xla", "cpu")
PROJECT_HEADS: Op[tuple[jax.Array, ...]] = Op("project_heads", __name__, "xla", "cpu")


def linear(
    x: jax.Array,  # [N, in]
    weight: Weight,  # [out, in]
    add: jax.Array | None = None,  # [N, out]
    *,
    bias: jax.Array | None = None,  # [out]
    activation: str | None = None,
    target: Target,
) -> jax.Array:  # [N, out], float32, or the dtype of `add` if it is given
    """`activation(x @ weight.T + bias) + add`, in float32; each of the three is left out if it is not given.

    The sum is rounded once. On an accelerator the product may also be rounded to the dtype of `add` before the sum.
    With an int8 weight the rows of `x` are rounded to 8-bit integers too, see `reference.integer_product`; XLA
    multiplies them as they are. With one of float8_e4m3fn they are rounded to that by every backend that serves it,
    which "cpu" does not, see `reference.float8_product`. This holds for all four products.

    Args:
        x: float32 or bfloat16.
        weight: in the dtype of `x`, bfloat16, or 8 bits wide (`quantize`), as `prepare` returns it for the target.
        add: in the dtype of `x`, e.g. the residual stream.
        bias: float32 or bfloat16.
        activation: see `gated_linear`.
        target: where it runs, and with which kernels.

    Raises:
        InputError: the shapes or dtypes do not fit together.
        BackendUnavailable: the backend does not support this call.
    """
    check_product(x, weight)
    check_parts(weight, 1)
    if add is not None:
        check_float("add", add, ndim=2, dtype=x.dtype)
        check_shape("add", add, (x.shape[0], weight.shape[0]))
    check_bias(bias, weight)
    if activation is not None:
        check_choice("activation", activation, ACTIVATIONS)
    return LINEAR(x, weight, add, bias, activation=activation, target=target)


def gated_linear(
    x: jax.Array,  # [N, in]
    weight: Weight,  # [2 * out, in]; [out, in] with `up`
    up: jax.Array | None = None,  # [N, out]
    *,
    bias: jax.Array | None = None,  # [2 * out]; [out] with `up`
    activation: str,
    target: Target,
) -> jax.Array:  # [N, out], dtype of x
    """`activation(x @ gate.T) * (x @ up.T)`: GeGLU with "gelu_tanh", SwiGLU with "silu" (arXiv:2002.05202).

    If the second factor is given as rows, the weight is that of the gate alone: `activation(x @ gate.T) * up`. If a
    bias is given, it is added to the products first.

    Everything is computed in float32 and the result is rounded once. On an accelerator both products are rounded to
    the dtype of `x` first, because they are the largest arrays that it writes to memory.

    Args:
        x: float32 or bfloat16.
        weight: the rows of gate and then the rows of up, as `prepare` returns it for the target with `parts=2`. With
            `up` it is the rows of gate, with `parts=1`.
        up: in the dtype of `x`, e.g. the per-layer inputs of Gemma 4.
        bias: float32 or bfloat16, in the order of the rows of the weight.
        activation: "gelu_tanh", the tanh approximation of gelu (arXiv:1606.08415), or "silu", x * sigmoid(x).
        target: where it runs, and with which kernels.

    Raises:
        InputError: the shapes or dtypes do not fit together.
        BackendUnavailable: the backend does not support this call.
    """
    check_product(x, weight)
    check_parts(weight, 2 if up is None else 1)
    if up is not None:
        check_float("up", up, ndim=2, dtype=x.dtype)
        check_shape("up", up, (x.shape[0], weight.shape[0]))
    elif weight.shape[0] % 2:
        raise InputError(
            f"weight has {weight.shape[0]} rows; the number must be even, half of the rows for gate and half for up"
        )
    check_bias(bias, weight)
    check_choice("activation", activation, ACTIVATIONS)
    return GATED_LINEAR(x, weight, up, bias, activation=activation, target=target)


def linear_add_norm(
    x: jax.Array,  # [N, in]
    weight: Weight,  # [D, in]
    add: jax.Array,  # [N, D]
    norm_weight: jax.Array,  # [D]
    *,
    update_weight: jax.Array | None = None,  # [D]
    scale: jax.Array | None = None,  # [1]
    bias: jax.Array | None = None,  # [D]
    eps: float,
    axis: str | None = None,
    target: Target,
) -> tuple[jax.Array, jax.Array]:  # ([N, D], [N, D]), dtype of x
    """The end of a sub-layer: adds `x @ weight.T` to the residual stream, and applies Gemma's RMSNorm to the sum.

    It is `add_norm(add, linear(x, weight, bias=bias), ...)`, but the product need not be written to memory. Product,
    sum and norms are float32, the sum is rounded to the dtype of `x`, and the norm reads the rounded rows. On an
    accelerator the product may also be rounded before the sum, so that the sum has the dtype of `x` and not float32.

    Args:
        x: float32 or bfloat16.
        weight: in the dtype of `x`, bfloat16 or 8 bits wide, as `prepare` returns it for the target.
        add: in the dtype of `x`, the residual stream.
        norm_weight: zero-centred weight of the norm of the sum (the factor is `1 + weight`).
        update_weight: if given, the product is normalised before it is added (the post-norms of Gemma 2 and 3).
        scale: if given, the sum is multiplied by it (the `layer_scalar` of Gemma 4).
        bias: float32 or bfloat16; if given, it is added to the product before anything else.
        eps: added to the mean square, in both norms.
        axis: inside a `jax.shard_map`, the mesh axis over which the columns of `x` and `weight` are divided. The
            product is summed over this axis in the dtype of `x`; float32 would double the traffic between devices.
        target: where it runs, and with which kernels.

    Returns:
        The sum (the new residual stream) and its norm (the next sub-layer's input).

    Raises:
        InputError: the shapes or dtypes do not fit together.
        BackendUnavailable: the backend does not support this call.
    """
    check_product(x, weight)
    check_parts(weight, 1)
    check_float("add", add, ndim=2, dtype=x.dtype)
    check_shape("add", add, (x.shape[0], weight.shape[0]))
    width = weight.shape[:1]
    for name, vector, shape in (
        ("norm_weight", norm_weight, width),
        ("update_weight", update_weight, width),
        ("scale", scale, (1,)),
    ):
        if vector is not None:
            check_float(name, vector, ndim=1)
            check_shape(name, vector, shape)
    check_bias(bias, weight)
    if axis is not None:
        update = jax.lax.psum(linear(x, weight, target=target).astype(x.dtype), axis)
        if bias is not None:  # once, and not once for each device
            update = update + bias.astype(x.dtype)
        return add_norm(add, update, norm_weight, update_weight=update_weight, scale=scale, eps=eps, target=target)
    return LINEAR_ADD_NORM(x, weight, add, norm_weight, update_weight, scale, bias, eps=eps, target=target)


def project_heads(
    x: jax.Array,  # [N, in]
    weight: Weight,  # [(sum(heads) + plain_heads) * d, in]
    cos: jax.Array,  # [N, d / 2]
    sin: jax.Array,  # [N, d / 2]
    norms: tuple[jax.Array | None, ...],  # [d] each
    *,
    heads: tuple[int, ...],
    plain_heads: int = 0,
    bias: jax.Array | None = None,  # [(sum(heads) + plain_heads) * d]
    eps: float,
    target: Target,
) -> tuple[jax.Array, ...]:  # [N, count * d] for each of `heads`, and for `plain_heads` if above 0; dtype of x
    """The inputs of attention: `x @ weight.T + bias` in heads, normalised and rotated (RoPE, arXiv:2104.09864).

    Each pair of elements (j, j + d / 2) of a head is rotated by an angle. Product, norm and rotation are float32, and
    the result is rounded once.

    Args:
        x: float32 or bfloat16.
        weight: in the dtype of `x`, bfloat16 or 8 bits wide, as `prepare` returns it for the target.
        cos, sin: float32, cosines and sines of the d / 2 angles of each row.
        norms: for each result, the zero-centred weight of an RMSNorm over d before the rotation (the factor is
            `1 + weight`), or None for no norm.
        heads: the number of heads of each result, in the order of the rows of `weight`: e.g. of queries and of keys.
        plain_heads: the number of heads at the end that are not rotated: the values.
        bias: float32 or bfloat16; None adds nothing.
        eps: added to the mean square in each norm.
        target: where it runs, and with which kernels.

    Raises:
        InputError: the shapes or dtypes do not fit together, or a number of heads is not positive.
        BackendUnavailable: the backend does not support this call.
    """
    check_product(x, weight)
    check_parts(weight, 1)
    check_float("cos", cos, ndim=2, dtype=jnp.float32)
    check_float("sin", sin, ndim=2, dtype=jnp.float32)
    check_shape("cos", cos, (x.shape[0], cos.shape[1]))
    check_shape("sin", sin, cos.shape)
    if not heads or min(heads) < 1 or plain_heads < 0:
        raise InputError(
            f"heads={heads}, plain_heads={plain_heads}: heads must contain at least one number, each at least 1, and "
            "plain_heads must be at least 0"
        )
    head_dim, count = 2 * cos.shape[1], sum(heads) + plain_heads
    if weight.shape[0] != count * head_dim:
        raise InputError(
            f"weight has {weight.shape[0]} rows; {count} heads of width {head_dim} need {count * head_dim}"
        )
    groups = len(heads) + (plain_heads > 0)
    if len(norms) != groups:
        raise InputError(
            f"norms has {len(norms)} entries for {groups} groups of heads; give a weight or None for each group"
        )
    for norm in norms:
        if norm is not None:
            check_float("norm", norm, ndim=1)
            check_shape("norm", norm, (head_dim,))
    check_bias(bias, weight)
    return PROJECT_HEADS(x, weight, cos, sin, norms, bias, heads=heads, plain_heads=plain_heads, eps=eps, target=target)


def check_product(x: jax.Array, weight: Any) -> None:
    """Raises `InputError` unless `x` [N, in] can be multiplied with `weight` [out, in]."""
    check_float("x", x, ndim=2)
    if isinstance(weight, QuantizedWeight):
        if str(weight.dtype) not in LARGEST or weight.scale.dtype != jnp.float32 or weight.values.ndim != 2:
            raise InputError(
                f"weight is {weight.values.dtype} {weight.shape} with scales of {weight.scale.dtype}; it must be a "
                f"matrix of {' or '.join(LARGEST)} with float32 scales, as `quantize` returns it"
            )
        check_shape("scale of weight", weight.scale, weight.shape[:1])
    elif not isinstance(weight, PackedWeight):
        check_float("weight", weight, ndim=2)
    if weight.dtype == jnp.float32 != x.dtype:
        raise InputError(f"weight is float32 and x {x.dtype}; cast the weight to {x.dtype}, or x to float32")
    check_shape("weight", weight, (weight.shape[0], x.shape[1]))
    if not x.shape[0] or not x.shape[1] or not weight.shape[0]:
        raise InputError(f"x has shape {x.shape} and weight {weight.shape}; each needs at least one row and one column")


def check_bias(bias: Any, weight: Any) -> None:
    """Raises `InputError` if a bias is given that does not have an element for each row of the weight."""
    if bias is not None:
        check_float("bias", bias, ndim=1)
        check_shape("bias", bias, weight.shape[:1])


def check_parts(weight: Any, parts: int) -> None:
    """Raises `InputError` if `weight` is packed with a different number of parts."""
    if isinstance(weight, PackedWeight) and weight.parts != parts:
        raise InputError(
            f"weight is packed in {weight.parts} parts, but this product needs {parts}; use prepare(parts={parts})"
        )
