"""Calling Triton kernels from JAX through jax-triton, and whether that is possible here.

Nothing here imports Triton before a GPU is known to be there.
"""

import functools
import importlib
import importlib.metadata
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax

from funnel_kernels import tuning

OLDEST = 80  # compute capability of Ampere, the first with bfloat16
INSTALL = "run: pip install 'funnel-engine[triton]'"
PACKAGES = {  # the least version of each, and the first that is too new; the extra "triton" says the same
    "triton": ((3, 6), (4,)),
    "jax-triton": ((0, 3, 1), (0, 3, 2)),
}
ELEMENTS = 8192  # that a program of a row-wise kernel holds at once

Sizes = TypeVar("Sizes", bound=tuple[Any, ...])


def implementation(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of a module that imports Triton, which is imported by the first call.

    The call raises `NotImplementedError` where there is no GPU that the kernels run on, or no Triton.
    """

    def served(*arrays: Any, **options: Any) -> Any:
        capability()
        check_packages()
        return getattr(importlib.import_module(module), name)(*arrays, **options)

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
    if not re.fullmatch(r"\d+\.\d+", device.compute_capability):
        raise NotImplementedError(
            f"{device.device_kind} is no NVIDIA GPU (its architecture is {device.compute_capability})"
        )
    found = round(10 * float(device.compute_capability))
    if found < OLDEST:
        raise NotImplementedError(
            f"{device.device_kind} has compute capability {found / 10}; the kernels need {OLDEST / 10} or newer"
        )
    return found


@functools.cache
def check_packages() -> None:
    """Raises `NotImplementedError` unless Triton and jax-triton are installed in versions that fit."""
    for package, (least, too_new) in PACKAGES.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise NotImplementedError(f"{package} is not installed; {INSTALL}") from error
        version = tuple(int(number) for number in re.findall(r"\d+", found)[:3])
        if not least <= version < too_new:
            bounds = [".".join(map(str, bound)) for bound in (least, too_new)]
            raise NotImplementedError(
                f"{package} {found} is installed; the kernels need at least {bounds[0]}, below {bounds[1]}; {INSTALL}"
            )
    try:
        importlib.import_module("jax_triton")
    except Exception as error:  # whatever a package raises that does not fit JAX or its CUDA plugin
        raise NotImplementedError(f"jax-triton cannot be imported ({error}); {INSTALL}") from error


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


def tuned(kind: type[Sizes], op: str, width: int, dtype: Any) -> Sizes | None:
    """The sizes that the tuning table of this device has for an op, or None."""
    sizes = tuning.find(tuning.Key(op, width, str(dtype)))
    return None if sizes is None else kind(**sizes)


class RowSizes(NamedTuple):
    """Rows and warps of a program of a row-wise kernel."""

    block_rows: int
    warps: int


def row_sizes(op: str, width: int, dtype: Any) -> RowSizes:
    """From the tuning table, or by the rule."""
    block_width = 1 << (width - 1).bit_length()
    return tuned(RowSizes, op, block_width, dtype) or row_rule(block_width)


def row_rule(block_width: int) -> RowSizes:
    """So many rows that narrow ones do not leave a program idle, and warps whose registers hold them in float32."""
    rows = max(1, min(64, ELEMENTS // block_width))
    return RowSizes(rows, max(1, min(16, rows * block_width // 1024)))
