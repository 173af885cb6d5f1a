"""The specification of the products."""

import jax
import jax.numpy as jnp

from funnel_kernels.add_norm import reference as add_norm
from funnel_kernels.linear.packed import PackedWeight, Weight
from funnel_kernels.norm import rms_norm, widened
from funnel_kernels.shapes import Angles, Heads, Rows, Vector
from funnel_kernels.target import Unsupported

HIGHEST = jax.lax.Precision.HIGHEST


def linear(x: Rows, weight: Weight, add: Rows | None) -> Rows:
    if isinstance(weight, PackedWeight):
        raise Unsupported("the weight is packed for backend 'cpu'; give the plain weight")
    product = jnp.matmul(widened(x), widened(weight).T, precision=HIGHEST)
    return product if add is None else (add + product).astype(add.dtype)


def gated_linear(x: Rows, weight: Weight) -> Rows:
    gate, up = jnp.split(linear(x, weight, None), 2, axis=1)
    return (jax.nn.gelu(gate, approximate=True) * up).astype(x.dtype)


def linear_add_norm(
    x: Rows,
    weight: Weight,
    add: Rows,
    norm_weight: Vector,
    update_weight: Vector | None,
    *,
    eps: float,
) -> tuple[Rows, Rows]:
    return add_norm.add_norm(add, linear(x, weight, None), norm_weight, update_weight, eps=eps)


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
) -> tuple[Heads, ...]:
    rows, half = cos.shape
    all_heads = linear(x, weight, None).reshape(rows, -1, 2 * half)
    groups, first = [], 0
    for index, count in enumerate(heads):
        group = all_heads[:, first : first + count]
        first += count
        if norms is not None:
            group = rms_norm(group, norms[index], eps)
        left, right = group[..., :half], group[..., half:]
        rotated = (left * cos[:, None] - right * sin[:, None], right * cos[:, None] + left * sin[:, None])
        groups.append(jnp.concatenate(rotated, axis=-1))
    if plain_heads:
        groups.append(all_heads[:, first:])
    return tuple(group.reshape(rows, -1).astype(x.dtype) for group in groups)
