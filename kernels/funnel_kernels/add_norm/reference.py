"""The specification of `add_norm`."""

from funnel_kernels.norm import rms_norm, rounded, widened
from funnel_kernels.shapes import Rows, Vector


def add_norm(
    x: Rows,
    update: Rows | None,
    weight: Vector,
    update_weight: Vector | None,
    scale: Vector | None,
    *,
    eps: float,
) -> tuple[Rows, Rows]:
    if update is not None:
        added = widened(update) if update_weight is None else rms_norm(update, update_weight, eps)
        total = widened(x) + added
        x = rounded(total if scale is None else total * widened(scale), x.dtype)
    return x, rms_norm(x, weight, eps).astype(x.dtype)
