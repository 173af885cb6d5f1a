"""Gemma's RMSNorm, shared by the reference ops and the model."""

import jax
import jax.numpy as jnp


def rms_norm(
    x: jax.Array,  # [..., D]
    weight: jax.Array,  # [D], zero-centred: the factor is 1 + weight
    eps: float,
) -> jax.Array:  # [..., D], float32
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467) with Gemma's `1 + weight`.

    Everything is float32, also the result: the caller casts once, after the weight is applied.
    """
    x = widened(x)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * inverse_rms * (1.0 + widened(weight))


def sum_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of sums and norms: float32. Derivatives are checked in float64, which stays float64."""
    return jnp.promote_types(dtype, jnp.float32)


def widened(x: jax.Array) -> jax.Array:
    """`x` in the dtype of sums and norms."""
    return x.astype(sum_dtype(x.dtype))


def rounded(
    x: jax.Array,  # float32
    dtype: jnp.dtype,
) -> jax.Array:
    """`x` in another dtype. XLA may remove a cast to fewer bits and back, but it keeps this rounding."""
    bits = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=bits.nexp, mantissa_bits=bits.nmant).astype(dtype)
