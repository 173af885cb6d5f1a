"""`recover_norm` for CPUs, in C++ (native_cpu_kernels.h): all is read or written once."""

import jax

import funnel_native
from funnel_kernels import native_calls


def recover_norm(short, full, weight, *, stride, mode, site, eps, target):
    """See `funnel_kernels.recover_norm`."""
    result = jax.ShapeDtypeStruct((short.shape[0] * stride, short.shape[1]), short.dtype)
    mode = funnel_native.handlers().MODES.index(mode)
    arrays = (short, weight) if full is None else (short, weight, full)
    return native_calls.call(
        "funnel_recover_norm", result, *arrays,
        stride=stride, mode=mode, after_norm=site == "after_norm", eps=float(eps), target=target,
    )  # fmt: skip
