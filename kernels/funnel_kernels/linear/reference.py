"""The specification of `linear` and `gated_linear`."""

import jax
import jax.numpy as jnp

from funnel_kernels.linear.packed import PackedWeight

HIGHEST = jax.lax.Precision.HIGHEST


def linear(x, weight, add):
    if isinstance(weight, PackedWeight):
        raise NotImplementedError("the weight is packed for backend cpu")
    product = jnp.matmul(x.astype(jnp.float32), weight.astype(jnp.float32).T, precision=HIGHEST)
    return product if add is None else (add + product).astype(add.dtype)


def gated_linear(x, weight):
    gate, up = jnp.split(linear(x, weight, None), 2, axis=1)
    return (jax.nn.gelu(gate, approximate=True) * up).astype(x.dtype)
