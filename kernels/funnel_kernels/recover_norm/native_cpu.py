"""`recover_norm` for CPUs, in C++ (native_cpu_kernels.h): each array is read or written once."""

import jax

import funnel_native
from funnel_kernels import native_calls
from funnel_kernels.shapes import Rows, Vector
from funnel_kernels.target import Target


def recover_norm(
    short: Rows, full: Rows | None, weight: Vector, *, stride: int, mode: str, site: str, eps: float, target: Target
) -> Rows:
    """See `funnel_kernels.recover_norm`."""
    result = jax.ShapeDtypeStruct((short.shape[0] * stride, short.shape[1]), short.dtype)
    arrays = (short, weight) if full is None else (short, weight, full)
    return native_calls.call(
        "funnel_recover_norm",
        result,
        *arrays,
        stride=stride,
        mode=funnel_native.handlers().MODES.index(mode),
        after_norm=site == "after_norm",
        eps=float(eps),
        target=target,
    )
