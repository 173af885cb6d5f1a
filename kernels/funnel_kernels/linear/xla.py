"""Products as XLA makes them best: operands in their own dtype, accumulated in float32."""

from functools import partial

import jax
import jax.numpy as jnp

from funnel_kernels.add_norm.reference import add_norm
from funnel_kernels.linear.packed import PackedWeight
from funnel_kernels.norm import rms_norm


def linear(x, weight, add):
    return project(x, weight, jnp.float32) if add is None else residual_sum(x, weight, add, None, None)


def residual_sum(x, weight, add, update_weight, eps):
    """`add` and the product, which is normalised first if there is an `update_weight`."""
    total = partial(total_in, eps=eps)
    cpu, default = partial(total, jnp.float32), partial(total, x.dtype)
    return jax.lax.platform_dependent(x, weight, add, update_weight, cpu=cpu, default=default)


def total_in(wide, x, weight, add, update_weight, *, eps):
    """`wide` is the dtype of the sum before it is rounded to that of `add`: float32 on a CPU. An accelerator's compiler
    leaves that rounding out and keeps the residual stream in float32 from layer to layer, which is twice the memory
    traffic and not what is promised. There all is in the dtype of the activations: the product is rounded and then the
    sum, as transformers does; where XLA makes both in one call of cuBLASLt, the sum alone is.
    """
    if update_weight is None:
        return (add + project(x, weight, wide)).astype(add.dtype)
    update = rms_norm(project(x, weight, jnp.float32), update_weight, eps)
    return (add + update.astype(wide)).astype(add.dtype)


def gated_linear(x, weight):
    return jax.lax.platform_dependent(x, weight, cpu=partial(gated, jnp.float32), default=partial(gated, x.dtype))


def gated(wide, x, weight):
    """`wide` is the dtype of gate and up, the largest arrays of all. On a CPU float32 costs nothing; an accelerator
    must write and read them, so there they are rounded to the dtype of the activations, as transformers does."""
    # Split first: XLA would widen the whole before it is written.
    gate, up = (half.astype(jnp.float32) for half in jnp.split(project(x, weight, wide), 2, axis=1))
    return (jax.nn.gelu(gate, approximate=True) * up).astype(x.dtype)


def linear_add_norm(x, weight, add, norm_weight, update_weight, *, eps):
    return add_norm(residual_sum(x, weight, add, update_weight, eps), None, norm_weight, None, eps=eps)


def project_heads(x, weight, cos, sin, norms, *, heads, plain_heads, eps):
    product = project(x, weight, jnp.float32)
    return finish_heads(product, cos, sin, norms, x.dtype, heads=heads, plain_heads=plain_heads, eps=eps)


def finish_heads(product, cos, sin, norms, dtype, *, heads, plain_heads, eps):
    """What follows the product of `project_heads`."""
    head_dim = 2 * cos.shape[1]
    ends = [head_dim * sum(heads[: i + 1]) for i in range(len(heads))]
    *groups, plain = jnp.split(product, ends, axis=1)

    def finish(norm, head, cos, sin):
        return turn(head if norm is None else rms_norm(head, norm, eps), cos, sin).astype(dtype)

    norms = norms or (None,) * len(heads)
    turned = [per_head(partial(finish, norm), group, cos, sin) for norm, group in zip(norms, groups, strict=True)]
    return (*turned, plain.astype(dtype)) if plain_heads else tuple(turned)


def turn(head, cos, sin):
    """Rotates the pairs (j, j + d / 2) of heads [..., d] by angles [..., d / 2]."""
    first, second = jnp.split(head, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def per_head(function, x, *tables):
    """Applies a function to every head of `[N, heads * d]`; it gets `[..., d]`, and tables [N, d / 2] that fit.

    A view of the heads is free, except on a TPU, where it moves all of x: there each head is cut out by itself.
    """
    head_dim = 2 * tables[0].shape[1]

    def together(x):
        heads = x.reshape(x.shape[0], -1, head_dim)
        return function(heads, *(table[:, None] for table in tables)).reshape(x.shape)

    def one_by_one(x):
        heads = jnp.split(x, x.shape[1] // head_dim, axis=1)
        return jnp.concatenate([function(head, *tables) for head in heads], axis=1)

    return jax.lax.platform_dependent(x, tpu=one_by_one, default=together)


def project(x, weight, result):
    if isinstance(weight, PackedWeight):
        raise NotImplementedError("the weight is packed for backend cpu")
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, dimensions, precision=precision, preferred_element_type=result)
