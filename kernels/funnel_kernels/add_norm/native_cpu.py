"""`add_norm` for CPUs, in C++ (native_cpu_kernels.h): each row and its update are read once."""

import jax

from funnel_kernels import native_calls
from funnel_kernels.shapes import Rows, Vector
from funnel_kernels.target import Target


def add_norm(
    x: Rows,
    update: Rows | None,
    weight: Vector,
    update_weight: Vector | None,
    scale: Vector | None,
    *,
    eps: float,
    target: Target,
) -> tuple[Rows, Rows]:
    """See `funnel_kernels.add_norm`."""
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    if update is None:
        return x, native_calls.call("funnel_norm", result, x, weight, eps=float(eps), target=target)
    return native_calls.call(
        "funnel_add_norm",
        (result, result),
        x,
        update,
        weight,
        *(array for array in (update_weight, scale) if array is not None),
        eps=float(eps),
        scaled=scale is not None,
        target=target,
    )
