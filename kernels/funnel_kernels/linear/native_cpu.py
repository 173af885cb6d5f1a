"""oneDNN's products on tiles, each followed in the cache by what comes after it (bindings/native/linear.h)."""

import jax
import jax.numpy as jnp

import funnel_native
from funnel_kernels import native_calls
from funnel_kernels.linear.packed import PackedWeight


def linear(x, weight, add):
    out = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32 if add is None else x.dtype)
    added = () if add is None else (add,)
    prepare(x, weight, out.shape[1])
    return native_calls.call("funnel_linear", out, x, packed(weight), *added, out_features=out.shape[1])


def gated_linear(x, weight):
    out = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0] // 2), x.dtype)
    prepare(x, weight, out.shape[1])
    return native_calls.call("funnel_gated_linear", out, x, packed(weight), out_features=out.shape[1])


def prepare(x, weight, out_features):
    """oneDNN makes code for each shape of a tile: now, while the program is traced, instead of in its first call."""
    packed(weight)  # refuses what cannot run
    is_bfloat16, threads = str(x.dtype) == "bfloat16", native_calls.threads()
    funnel_native.handlers().prepare_product(x.shape[0], out_features, x.shape[1], is_bfloat16, threads)


def packed(weight):
    if not isinstance(weight, PackedWeight):
        raise NotImplementedError("the weight is not packed (funnel_kernels.linear.prepare), e.g. because of a mesh")
    native_calls.check_product(weight.dtype)
    return weight.packed
