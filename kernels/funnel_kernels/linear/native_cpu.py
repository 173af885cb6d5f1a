"""oneDNN's products on tiles, each followed in the cache by what comes after it (bindings/native/linear.h)."""

import jax
import jax.numpy as jnp

from funnel_kernels import native_calls
from funnel_kernels.linear.packed import PackedWeight


def linear(x, weight, add):
    out = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32 if add is None else x.dtype)
    added = () if add is None else (add,)
    return native_calls.call("funnel_linear", out, x, packed(weight), *added, out_features=out.shape[1])


def gated_linear(x, weight):
    out = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0] // 2), x.dtype)
    return native_calls.call("funnel_gated_linear", out, x, packed(weight), out_features=out.shape[1])


def packed(weight):
    if not isinstance(weight, PackedWeight):
        raise NotImplementedError("the weight is not packed (funnel_kernels.linear.prepare), e.g. because of a mesh")
    native_calls.check_product(weight.dtype)
    return weight.packed
