"""Recovery of the full token axis after a funnel, fused with the final RMSNorm."""

import jax

from funnel_kernels.checks import check_choice, check_float, check_shape, check_stride
from funnel_kernels.errors import InputError
from funnel_kernels.op import Op
from funnel_kernels.target import Target

MODES = ("tile", "sum", "mean", "max")
SITES = ("before_norm", "after_norm")
RECOVER_NORM: Op[jax.Array] = Op("recover_norm", __name__, "cpu", "triton", "tpu")


def recover_norm(
    short: jax.Array,  # [N / stride, D]
    full: jax.Array | None,  # [N, D]; None with mode "tile"
    weight: jax.Array,  # [D]
    *,
    stride: int,
    mode: str,
    site: str = "before_norm",
    eps: float,
    target: Target,
) -> jax.Array:  # [N, D], dtype of short
    """Copies each short row to all full-length rows of its window, combines them with `full`, and applies RMSNorm.

    Full-length row `j` gets short row `j // stride`. The combination and the norm are float32. With site "before_norm"
    the combined rows are normalised; with "after_norm" both operands are normalised with the same weight and then
    combined. In the derivative of a maximum, operands that are equal share the gradient in equal parts.

    Args:
        short: float32 or bfloat16, the residual stream after the last layer.
        full: full-length activations in the dtype of `short` or float32.
        weight: zero-centred weight of the final norm (the factor is `1 + weight`).
        stride: rows per window, the product of all strides of the funnel.
        mode: "tile" (no combination), "sum", "mean" (half the sum) or "max" (elementwise).
        site: where the combination happens, "before_norm" or "after_norm".
        eps: added to the mean square.
        target: where it runs, and with which kernels.

    Raises:
        InputError: the shapes, dtypes or options do not fit together.
        BackendUnavailable: the backend does not support this call.
    """
    check_float("short", short, ndim=2)
    check_choice("mode", mode, MODES)
    check_choice("site", site, SITES)
    check_float("weight", weight, ndim=1)
    check_shape("weight", weight, (short.shape[1],))
    rows = short.shape[0] * stride
    check_stride(stride, rows)
    if full is None and mode != "tile":
        raise InputError(f"mode={mode!r} needs the full-length rows; give `full`")
    if full is not None and mode == "tile":
        raise InputError("mode='tile' does not use full-length rows; give None for `full`")
    if full is not None:
        check_float("full", full, ndim=2)
        check_shape("full", full, (rows, short.shape[1]))
    return RECOVER_NORM(short, full, weight, stride=stride, mode=mode, site=site, eps=eps, target=target)
