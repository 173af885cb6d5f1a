"""The specification of the products."""

from typing import NoReturn

import jax
import jax.numpy as jnp

from funnel_kernels.add_norm import reference as add_norm
from funnel_kernels.errors import InputError
from funnel_kernels.linear.packed import LARGEST, PackedWeight, QuantizedWeight, Weight
from funnel_kernels.norm import rms_norm, widened
from funnel_kernels.shapes import Angles, Heads, Rows, Vector
from funnel_kernels.target import Unsupported

HIGHEST = jax.lax.Precision.HIGHEST
GROUP = 128  # input features that share a scale of the activations, where weights are 8-bit integers
SMALLEST = 1e-30  # the inverse of a smaller group's scale could overflow


def linear(
    x: Rows, weight: Weight, add: Rows | None, bias: Vector | None = None, *, activation: str | None = None
) -> Rows:
    if isinstance(weight, PackedWeight):
        raise Unsupported("the weight is packed for backend 'cpu'; give the plain weight")
    if isinstance(weight, QuantizedWeight):
        multiply = integer_product if weight.dtype == jnp.int8 else float8_product
        product = multiply(widened(x), weight.values, weight.scale)
    else:
        product = jnp.matmul(widened(x), widened(weight).T, precision=HIGHEST)
    result = finish(product, bias, activation)
    return result if add is None else (add + result).astype(add.dtype)


def finish(product: Rows, bias: Vector | None, activation: str | None) -> Rows:
    """What follows a product before something is added to it."""
    biased = product if bias is None else product + bias.astype(product.dtype)
    return biased if activation is None else activate(biased, activation)


@jax.custom_jvp
def integer_product(x: Rows, values: jax.Array, scale: Vector) -> Rows:
    """The product with 8-bit weights, [N, out]: x becomes 8-bit integers too, and sums of integers are exact.

    A row of x is cut into groups of GROUP features. Each group has a scale, a 127th of its largest absolute value, and
    values are rounded to nearest, ties to even. A group whose largest absolute value is below SMALLEST is 0.
    """
    padding = [(0, 0), (0, -x.shape[1] % GROUP)]
    x, values = (jnp.pad(array, padding).reshape(array.shape[0], -1, GROUP) for array in (x, values))
    largest = jnp.max(jnp.abs(x), axis=2)  # [N, groups]
    x_scale, inverse = scales(largest, "int8")
    integers = jnp.rint(x * inverse[..., None]).astype(jnp.int8)
    sums = jnp.einsum("ngi,ogi->ngo", integers, values, preferred_element_type=jnp.int32)
    return (sums * x_scale[..., None]).sum(axis=1) * scale


def scales(largest: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """The scale of numbers whose largest absolute value is given, and its inverse; both 0 where that is 0."""
    top = LARGEST[dtype]
    scale, inverse = (jnp.where(largest < SMALLEST, 0.0, value) for value in (largest / top, top / largest))
    return scale, inverse


@jax.custom_jvp
def float8_product(x: Rows, values: jax.Array, scale: Vector) -> Rows:
    """The product with weights of float8_e4m3fn, [N, out]: x is rounded to it too, with a scale for each row.

    Products of two such numbers are exact in float32.
    """
    rounded, x_scale = float8_rows(x)
    return jnp.matmul(rounded.astype(x.dtype), values.astype(x.dtype).T, precision=HIGHEST) * x_scale * scale


def float8_rows(x: Rows) -> tuple[Rows, jax.Array]:
    """Rows as float8_e4m3fn, rounded to nearest, ties to even, and the scale of each, [N, 1] float32.

    The scale is a 448th of the largest absolute value. A row whose largest is below SMALLEST is 0.
    """
    x_scale, inverse = scales(jnp.max(jnp.abs(widened(x)), axis=1, keepdims=True), "float8_e4m3fn")
    return (widened(x) * inverse).astype(jnp.float8_e4m3fn), x_scale


@integer_product.defjvp
@float8_product.defjvp
def refuse_derivative(arrays: tuple[jax.Array, ...], directions: tuple[jax.Array, ...]) -> NoReturn:
    raise InputError("the product with 8-bit weights has no derivative; train float weights, then quantize them")


def gated_linear(x: Rows, weight: Weight, up: Rows | None, bias: Vector | None = None, *, activation: str) -> Rows:
    product = linear(x, weight, None, bias)
    gate, up = jnp.split(product, 2, axis=1) if up is None else (product, widened(up))
    return (activate(gate, activation) * up).astype(x.dtype)


def activate(gate: Rows, activation: str) -> Rows:
    return jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate, approximate=True)


def linear_add_norm(
    x: Rows,
    weight: Weight,
    add: Rows,
    norm_weight: Vector,
    update_weight: Vector | None,
    scale: Vector | None,
    bias: Vector | None = None,
    *,
    eps: float,
) -> tuple[Rows, Rows]:
    return add_norm.add_norm(add, linear(x, weight, None, bias), norm_weight, update_weight, scale, eps=eps)


def project_heads(
    x: Rows,
    weight: Weight,
    cos: Angles,
    sin: Angles,
    norms: tuple[Vector | None, ...],
    bias: Vector | None = None,
    *,
    heads: tuple[int, ...],
    plain_heads: int,
    eps: float,
) -> tuple[Heads, ...]:
    rows, half = cos.shape
    all_heads = linear(x, weight, None, bias).reshape(rows, -1, 2 * half)
    groups, first = [], 0
    for index, count in enumerate((*heads, plain_heads) if plain_heads else heads):
        group = all_heads[:, first : first + count]
        first += count
        if (norm := norms[index]) is not None:
            group = rms_norm(group, norm, eps)
        if index < len(heads):
            left, right = group[..., :half], group[..., half:]
            rotated = (left * cos[:, None] - right * sin[:, None], right * cos[:, None] + left * sin[:, None])
            group = jnp.concatenate(rotated, axis=-1)
        groups.append(group)
    return tuple(group.reshape(rows, -1).astype(x.dtype) for group in groups)
