"""Products as XLA makes them best: operands in their own dtype, accumulated in float32."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from funnel_kernels.add_norm import add_norm
from funnel_kernels.linear.packed import PackedWeight, Weight
from funnel_kernels.norm import rms_norm
from funnel_kernels.shapes import Angles, Heads, Rows, Vector
from funnel_kernels.target import Target, Unsupported


def linear(x: Rows, weight: Weight, add: Rows | None, *, target: Target) -> Rows:
    if add is None:
        return project(x, weight, jnp.float32)
    # A float32 sum would be rounded once, but an accelerator's compiler leaves that rounding out and keeps the residual
    # stream in float32 from layer to layer: twice the memory traffic, and not what is promised. There the product is
    # rounded and then the sum, as in transformers; where XLA makes both in one call of cuBLASLt, the sum alone is.
    product = project(x, weight, jnp.float32 if target.platform == "cpu" else x.dtype)
    return (add + product).astype(add.dtype)


def gated_linear(x: Rows, weight: Weight, *, target: Target) -> Rows:
    # On a CPU float32 costs nothing. An accelerator must write gate and up, the largest arrays of all, and read them:
    # there they are rounded to the dtype of the activations, as transformers does.
    product = project(x, weight, jnp.float32 if target.platform == "cpu" else x.dtype)
    # Split first: XLA would widen the whole before it is written.
    gate, up = (half.astype(jnp.float32) for half in jnp.split(product, 2, axis=1))
    return (jax.nn.gelu(gate, approximate=True) * up).astype(x.dtype)


def linear_add_norm(
    x: Rows,
    weight: Weight,
    add: Rows,
    norm_weight: Vector,
    update_weight: Vector | None,
    *,
    eps: float,
    target: Target,
) -> tuple[Rows, Rows]:
    if target.platform == "cpu":  # the sum is float32, as `add_norm` makes it
        product = project(x, weight, jnp.float32)
        return add_norm(add, product, norm_weight, update_weight=update_weight, eps=eps, target=target)
    if update_weight is None:
        total = linear(x, weight, add, target=target)
    else:
        total = add + rms_norm(project(x, weight, jnp.float32), update_weight, eps).astype(add.dtype)
    return add_norm(total, None, norm_weight, eps=eps, target=target)


def project_heads(
    x: Rows,
    weight: Weight,
    cos: Angles,
    sin: Angles,
    norms: tuple[Vector, ...] | None,
    *,
    heads: tuple[int, ...],
    plain_heads: int,
    eps: float,
    target: Target,
) -> tuple[Heads, ...]:
    product = project(x, weight, jnp.float32)
    options: dict[str, Any] = {"heads": heads, "plain_heads": plain_heads, "eps": eps, "target": target}
    return finish_heads(product, cos, sin, norms, x.dtype, **options)


def finish_heads(
    product: Heads,
    cos: Angles,
    sin: Angles,
    norms: tuple[Vector, ...] | None,
    dtype: Any,
    *,
    heads: tuple[int, ...],
    plain_heads: int,
    eps: float,
    target: Target,
) -> tuple[Heads, ...]:
    """What follows the product of `project_heads`."""
    head_dim = 2 * cos.shape[1]
    ends = [head_dim * sum(heads[: i + 1]) for i in range(len(heads))]
    *groups, plain = jnp.split(product, ends, axis=1)

    def finish(norm: Vector | None, head: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        return turn(head if norm is None else rms_norm(head, norm, eps), cos, sin).astype(dtype)

    every_norm: tuple[Vector | None, ...] = norms or (None,) * len(heads)
    turned = [
        per_head(partial(finish, norm), group, cos, sin, target=target)
        for norm, group in zip(every_norm, groups, strict=True)
    ]
    return (*turned, plain.astype(dtype)) if plain_heads else tuple(turned)


def turn(head: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (j, j + d / 2) of heads [..., d] by angles [..., d / 2]."""
    first, second = jnp.split(head, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def per_head(function: Callable[..., jax.Array], x: Heads, *tables: Angles, target: Target) -> Heads:
    """Applies a function to every head of `[N, heads * d]`; it gets `[..., d]`, and tables [N, d / 2] that fit.

    A view of the heads is free, except on a TPU, where it moves all of x: there each head is cut out by itself.
    """
    head_dim = 2 * tables[0].shape[1]
    if target.platform == "tpu":
        columns = jnp.split(x, x.shape[1] // head_dim, axis=1)
        return jnp.concatenate([function(head, *tables) for head in columns], axis=1)
    heads = x.reshape(x.shape[0], -1, head_dim)
    return function(heads, *(table[:, None] for table in tables)).reshape(x.shape)


def project(x: Rows, weight: Weight, result: Any) -> Rows:
    if isinstance(weight, PackedWeight):
        raise Unsupported("the weight is packed for backend cpu")
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, dimensions, precision=precision, preferred_element_type=result)
