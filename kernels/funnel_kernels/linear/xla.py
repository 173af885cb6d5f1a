"""Products as XLA makes them best: operands in their own dtype, accumulated in float32."""

from functools import partial

import jax
import jax.numpy as jnp

from funnel_kernels.linear.packed import PackedWeight


def linear(x, weight, add):
    product = project(x, weight, jnp.float32)
    return product if add is None else (add + product).astype(add.dtype)


def gated_linear(x, weight):
    return jax.lax.platform_dependent(x, weight, cpu=partial(gated, jnp.float32), default=partial(gated, x.dtype))


def gated(wide, x, weight):
    """`wide` is the dtype of gate and up, the largest arrays of all. On a CPU float32 costs nothing; an accelerator
    must write and read them, so there they are rounded to the dtype of the activations, as transformers does."""
    # Split first: XLA would widen the whole before it is written.
    gate, up = (half.astype(jnp.float32) for half in jnp.split(project(x, weight, wide), 2, axis=1))
    return (jax.nn.gelu(gate, approximate=True) * up).astype(x.dtype)


def project(x, weight, result):
    if isinstance(weight, PackedWeight):
        raise NotImplementedError("the weight is packed for backend cpu")
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, dimensions, precision=precision, preferred_element_type=result)
