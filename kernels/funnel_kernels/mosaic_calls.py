"""Checks whether Pallas Mosaic GPU kernels can run on a target. JAX itself has what they need."""

from funnel_kernels.target import Target, Unsupported
from funnel_kernels.triton_calls import capability

HOPPER = 90  # whose matrix instructions and asynchronous copies the kernels are written for


def check(target: Target) -> None:
    """Raises `Unsupported` unless the target is a Hopper GPU."""
    if (found := capability(target)) != HOPPER:
        raise Unsupported(
            f"{target.kind} has compute capability {found / 10}; the kernels need {HOPPER / 10} (H100, H200)"
        )
