"""Calling Triton kernels from JAX through jax-triton, and whether that is possible here.

Nothing here imports Triton before a GPU is known to be there.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax

OLDEST = 80  # compute capability of Ampere, the first with bfloat16
INSTALL = "run: pip install 'funnel-engine[triton]'"
ELEMENTS = 8192  # that a program of a row-wise kernel holds at once


def implementation(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of a module that imports Triton, which is imported by the first call.

    The call raises `NotImplementedError` where there is no GPU that the kernels run on, or no Triton.
    """

    def served(*arrays: Any, **options: Any) -> Any:
        capability()
        try:
            function = getattr(importlib.import_module(module), name)
        except ImportError as error:
            raise NotImplementedError(f"{error.name or error} is missing; {INSTALL}") from error
        return function(*arrays, **options)

    return served


@functools.cache
def capability() -> int:
    """The compute capability of the GPU that JAX runs on, e.g. 90 for Hopper.

    Raises:
        NotImplementedError: there is none, or one that is too old.
    """
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise NotImplementedError(
            f"JAX runs on {device.platform}; on a machine with an NVIDIA GPU, install jax[cuda13]"
        )
    found = round(10 * float(device.compute_capability))
    if found < OLDEST:
        raise NotImplementedError(f"the GPU has compute capability {found / 10}; the kernels need {OLDEST / 10}")
    return found


def call(kernel: Any, *arrays: jax.Array, out_shape: Any, grid: tuple[int, ...], **options: Any) -> Any:
    """Runs a Triton kernel whose arguments are pointers to `arrays`, pointers to the results, and `options`.

    Args:
        out_shape: `jax.ShapeDtypeStruct` of the result, or a tuple of them.
        grid: numbers of programs; only the first axis may exceed 65,535.
        options: the kernel's compile-time constants, `num_warps` and `num_stages`.
    """
    import jax_triton

    return jax_triton.triton_call(
        *arrays, kernel=kernel, out_shape=out_shape, grid=grid, compute_capability=capability(), **options
    )


def rows_per_program(block_width: int) -> int:
    """How many rows a program of a row-wise kernel takes, so that narrow rows do not leave it idle."""
    return max(1, min(64, ELEMENTS // block_width))


def warps(elements: int) -> int:
    """How many warps hold so many float32 elements in registers."""
    return max(1, min(16, elements // 1024))
