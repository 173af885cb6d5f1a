"""Products tile by tile; the operations after a product run on each tile while it is in the cache
(../cpu/product.h)."""

import jax
import jax.numpy as jnp

import funnel_native
from funnel_kernels import native_calls
from funnel_kernels.add_norm.native_cpu import add_norm
from funnel_kernels.linear import ACTIVATIONS, xla
from funnel_kernels.linear.packed import PackedWeight, QuantizedWeight, Weight
from funnel_kernels.shapes import Angles, Heads, Rows, Vector
from funnel_kernels.target import Target, Unsupported


def linear(
    x: Rows,
    weight: Weight,
    add: Rows | None,
    bias: Vector | None = None,
    *,
    activation: str | None = None,
    target: Target,
) -> Rows:
    out = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32 if add is None else x.dtype)
    generate_code(x, weight, out.shape[1], target)
    return native_calls.call(
        "funnel_linear",
        out,
        x,
        weight.packed,
        *bias_operands(bias),
        *(() if add is None else (add,)),
        out_features=out.shape[1],
        biased=bias is not None,
        activation=-1 if activation is None else ACTIVATIONS.index(activation),
        target=target,
    )


def gated_linear(
    x: Rows, weight: Weight, up: Rows | None, bias: Vector | None = None, *, activation: str, target: Target
) -> Rows:
    out = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0] // (2 if up is None else 1)), x.dtype)
    generate_code(x, weight, out.shape[1], target)
    return native_calls.call(
        "funnel_gated_linear",
        out,
        x,
        weight.packed,
        *bias_operands(bias),
        *(() if up is None else (up,)),
        out_features=out.shape[1],
        biased=bias is not None,
        activation=ACTIVATIONS.index(activation),
        target=target,
    )


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
    extras = tuple(array for array in (update_weight, scale) if array is not None)
    if not has_whole_rows(x, weight, target):  # then the norms are computed in a separate pass
        if not extras:
            total = linear(x, weight, add, bias, target=target)
            return add_norm(total, None, norm_weight, None, None, eps=eps, target=target)
        product = linear(x, weight, None, bias, target=target)
        return add_norm(add, product, norm_weight, update_weight, scale, eps=eps, target=target)
    result = jax.ShapeDtypeStruct(add.shape, add.dtype)
    generate_code(x, weight, weight.shape[0], target, weight.shape[0] // funnel_native.handlers().UNIT)
    return native_calls.call(
        "funnel_linear_add_norm",
        (result, result),
        x,
        weight.packed,
        add,
        norm_weight,
        *bias_operands(bias),
        *extras,
        eps=float(eps),
        biased=bias is not None,
        scaled=scale is not None,
        target=target,
    )


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
    rows, head_dim = x.shape[0], 2 * cos.shape[1]
    units, remainder = divmod(head_dim, funnel_native.handlers().UNIT)
    if remainder:
        product = linear(x, weight, None, bias, target=target)  # tiles would split heads, so XLA rotates them
        return xla.finish_heads(
            product, cos, sin, norms, x.dtype, heads=heads, plain_heads=plain_heads, eps=eps, target=target
        )
    generate_code(x, weight, weight.shape[0], target, units)
    groups = (*heads, plain_heads) if plain_heads else heads
    outs = tuple(jax.ShapeDtypeStruct((rows, count * head_dim), x.dtype) for count in groups)
    return native_calls.call(
        "funnel_project_heads",
        outs,
        x,
        weight.packed,
        cos,
        sin,
        *bias_operands(bias),
        *(norm for norm in norms if norm is not None),
        biased=bias is not None,
        normed=tuple(int(norm is not None) for norm in norms),
        heads=heads,
        plain_heads=plain_heads,
        head_dim=head_dim,
        eps=float(eps),
        target=target,
    )


def bias_operands(bias: Vector | None) -> tuple[jax.Array, ...]:
    """The operands of a handler for a bias, if there is one."""
    return () if bias is None else (bias.astype(jnp.float32),)


def has_whole_rows(x: Rows, weight: Weight, target: Target) -> bool:
    """Whether the tiles of the product contain whole rows, so that a norm can follow on each tile."""
    check(weight, target)
    dtype, threads = str(weight.dtype), native_calls.count_threads(target)
    found: bool = funnel_native.handlers().suits_whole_rows(x.shape[0], *weight.shape, dtype, threads)
    return found


def generate_code(x: Rows, weight: Weight, out_features: int, target: Target, step: int = 1) -> None:
    """Makes oneDNN generate its code for the tiles now, while the program is traced, and not in the first call.

    Each tile has a multiple of `step` units of output features.
    """
    check(weight, target)
    shape, is_bfloat16 = (x.shape[0], out_features, x.shape[1]), str(x.dtype) == "bfloat16"
    threads = native_calls.count_threads(target)
    funnel_native.handlers().prepare_product(*shape, is_bfloat16, str(weight.dtype), step, threads)


def check(weight: Weight, target: Target) -> None:
    """Raises `Unsupported` unless the kernels can multiply with this weight."""
    native_calls.check(target)
    if isinstance(weight, QuantizedWeight) and weight.dtype == jnp.float8_e4m3fn:
        raise Unsupported("no processor multiplies float8; use int8 weights on a CPU")
    if not isinstance(weight, PackedWeight):
        over_mesh = not jax.sharding.get_abstract_mesh().empty
        raise Unsupported(
            "weights are not packed when an engine runs on a mesh"
            if over_mesh
            else "the weight is not packed (funnel_kernels.prepare)"
        )
