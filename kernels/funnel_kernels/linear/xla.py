"""Products by XLA, accumulated in float32: operands in their own dtype. Of int8 only weights are; of float8 both."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from funnel_kernels.add_norm import add_norm
from funnel_kernels.linear.packed import PackedWeight, QuantizedWeight, Weight
from funnel_kernels.linear.reference import activate, finish, float8_rows
from funnel_kernels.norm import rms_norm, sum_dtype, widened
from funnel_kernels.shapes import Angles, Heads, Rows, Vector
from funnel_kernels.target import Target, Unsupported

DIMENSIONS = (((1,), (1,)), ((), ()))  # of x @ weight.T


def linear(
    x: Rows,
    weight: Weight,
    add: Rows | None,
    bias: Vector | None = None,
    *,
    activation: str | None = None,
    target: Target,
) -> Rows:
    if add is None:
        return finish(project(x, weight, sum_dtype(x.dtype), target), bias, activation)
    # On a CPU the float32 sum is rounded once. An accelerator's compiler would remove that rounding and keep the
    # residual stream in float32 from layer to layer, which doubles the memory traffic and breaks the promised dtype. So
    # there the product is rounded and then the sum, as in transformers. If XLA fuses both into one cuBLASLt call, only
    # the sum is rounded.
    return (add + finish(narrow_product(x, weight, bias, target), None, activation)).astype(add.dtype)


def gated_linear(
    x: Rows, weight: Weight, up: Rows | None, bias: Vector | None = None, *, activation: str, target: Target
) -> Rows:
    # On a CPU float32 costs nothing. An accelerator writes gate and up, the largest arrays, to memory and reads them
    # again, so there they are rounded to the dtype of the activations, as in transformers.
    product = narrow_product(x, weight, bias, target)
    # Split before the cast: otherwise XLA writes the whole array as float32.
    halves = jnp.split(product, 2, axis=1) if up is None else (product, up)
    gate, up = map(widened, halves)
    return (activate(gate, activation) * up).astype(x.dtype)


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
    target: Target,
) -> tuple[Rows, Rows]:
    if target.platform == "cpu":  # `add_norm` computes the sum in float32
        product = linear(x, weight, None, bias, target=target)
        return add_norm(add, product, norm_weight, update_weight=update_weight, scale=scale, eps=eps, target=target)
    if update_weight is None:
        total = linear(x, weight, add, bias, target=target)
    else:
        product = linear(x, weight, None, bias, target=target)
        total = add + rms_norm(product, update_weight, eps).astype(add.dtype)
    if scale is not None:
        total = (total * widened(scale)).astype(add.dtype)
    return add_norm(total, None, norm_weight, eps=eps, target=target)


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
    target: Target,
) -> tuple[Heads, ...]:
    product = linear(x, weight, None, bias, target=target)
    return finish_heads(product, cos, sin, norms, x.dtype, heads=heads, plain_heads=plain_heads, eps=eps, target=target)


def finish_heads(
    product: Heads,
    cos: Angles,
    sin: Angles,
    norms: tuple[Vector | None, ...],
    dtype: Any,
    *,
    heads: tuple[int, ...],
    plain_heads: int,
    eps: float,
    target: Target,
) -> tuple[Heads, ...]:
    """The steps of `project_heads` after the product."""
    head_dim = 2 * cos.shape[1]
    ends = [head_dim * sum(heads[: i + 1]) for i in range(len(heads))]
    *groups, plain = jnp.split(product, ends, axis=1)

    def normed(norm: Vector | None, head: jax.Array) -> jax.Array:
        return head if norm is None else rms_norm(head, norm, eps)

    def turned(norm: Vector | None, head: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        return rotate(normed(norm, head), cos, sin).astype(dtype)

    results = [
        per_head(partial(turned, norm), group, head_dim, cos, sin, target=target)
        for norm, group in zip(norms, groups, strict=False)
    ]
    if plain_heads:
        norm = norms[-1]
        results.append(plain if norm is None else per_head(partial(normed, norm), plain, head_dim, target=target))
    return tuple(result.astype(dtype) for result in results)


def rotate(head: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (j, j + d / 2) of heads [..., d] by angles [..., d / 2]."""
    first, second = jnp.split(head, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def per_head(function: Callable[..., jax.Array], x: Heads, head_dim: int, *tables: Angles, target: Target) -> Heads:
    """Applies a function to every head of `[N, heads * d]`; it gets heads `[..., d]` and matching rows of the tables.

    A view with an axis of heads is free, except on a TPU, where it copies x; there the heads are split instead.
    """
    if target.platform == "tpu":
        columns = jnp.split(x, x.shape[1] // head_dim, axis=1)
        return jnp.concatenate([function(head, *tables) for head in columns], axis=1)
    heads = x.reshape(x.shape[0], -1, head_dim)
    return function(heads, *(table[:, None] for table in tables)).reshape(x.shape)


def narrow_product(x: Rows, weight: Weight, bias: Vector | None, target: Target) -> Rows:
    """The product and its bias: float32 on a CPU; on an accelerator their sum is rounded once, to the dtype of x."""
    if bias is None and target.platform != "cpu":
        return project(x, weight, x.dtype, target)
    wide = finish(project(x, weight, sum_dtype(x.dtype), target), bias, None)
    return wide if target.platform == "cpu" else wide.astype(x.dtype)


def project(x: Rows, weight: Weight, result: Any, target: Target) -> Rows:
    if isinstance(weight, PackedWeight):
        raise Unsupported("the weight is packed for backend 'cpu'; give the plain weight")
    if isinstance(weight, QuantizedWeight) and weight.dtype == jnp.float8_e4m3fn:
        return float8_project(x, weight, result, target)
    if isinstance(weight, QuantizedWeight):  # 8-bit integers are exact in bfloat16
        product = project(x, weight.values.astype(x.dtype), sum_dtype(x.dtype), target)
        return (product * weight.scale).astype(result)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, weight.astype(x.dtype), DIMENSIONS, precision=precision, preferred_element_type=result
    )


def float8_project(x: Rows, weight: QuantizedWeight, result: Any, target: Target) -> Rows:
    """The product of float8 numbers, and then the scales of rows and of columns.

    cuBLASLt multiplies them on GPUs of compute capability 8.9 and newer. Elsewhere they are widened to bfloat16, in
    which they are exact.
    """
    rounded, x_scale = float8_rows(x)
    is_nvidia = target.platform == "gpu" and re.fullmatch(r"\d+\.\d+", target.architecture)
    dtype = jnp.float8_e4m3fn if is_nvidia and float(target.architecture) >= 8.9 else jnp.bfloat16
    product = jax.lax.dot_general(
        rounded.astype(dtype), weight.values.astype(dtype), DIMENSIONS, preferred_element_type=jnp.float32
    )
    return (product * x_scale * weight.scale).astype(result)
