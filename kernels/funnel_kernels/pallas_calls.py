"""Calling Pallas kernels on TPUs, and whether that is possible here."""

import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax


class Generation(NamedTuple):
    """What the kernels must know of a TPU.

    Attributes:
        name: as in names of topologies, e.g. "v5e".
        vmem: bytes of vector memory of a core, which kernels share with what the compiler keeps there.
        cores: that work on one program of a grid at once (its "parallel" axes).
    """

    name: str
    vmem: int
    cores: int


MIB = 2**20
# By device kind. Sizes: jax/_src/tpu_info.py; v7x shows its two cores as two devices.
GENERATIONS = {
    "TPU v4": Generation("v4", 16 * MIB, 2),
    "TPU v5 lite": Generation("v5e", 128 * MIB, 1),
    "TPU v5": Generation("v5p", 64 * MIB, 2),
    "TPU v6 lite": Generation("v6e", 128 * MIB, 1),
    "TPU7x": Generation("v7x", 64 * MIB, 1),
}
INTERPRET: Any = False  # what `pallas_call` takes; the tests set it


def implementation(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of a module, which raises `NotImplementedError` where there is no TPU it runs on."""

    def served(*arrays: Any, **options: Any) -> Any:
        generation()
        return getattr(importlib.import_module(module), name)(*arrays, **options)

    return served


@functools.cache
def generation() -> Generation:
    """The TPU that JAX runs on.

    Raises:
        NotImplementedError: there is none, or one that no kernel was compiled for.
    """
    device = jax.devices()[0]
    if device.platform != "tpu":
        raise NotImplementedError(f"JAX runs on {device.platform}; on a machine with a TPU, install jax[tpu]")
    if device.device_kind not in GENERATIONS:
        known = ", ".join(found.name for found in GENERATIONS.values())
        raise NotImplementedError(
            f"{device.device_kind} is a TPU that the kernels were never compiled for; known: {known}"
        )
    return GENERATIONS[device.device_kind]


def call(
    kernel: Callable[..., Any],
    *,
    semantics: tuple[Literal["parallel", "arbitrary"], ...],
    vmem: int | None = None,
    **options: Any,
) -> Any:
    """`pl.pallas_call` for a TPU.

    Args:
        semantics: for each axis of the grid "parallel", whose steps cores may share, or "arbitrary".
        vmem: bytes of vector memory that the kernel may take, if more than the compiler's default of 16 or 32 MiB.
        options: of `pl.pallas_call`.
    """
    from jax.experimental import pallas as pl  # imported here: they are slow to import where no TPU is
    from jax.experimental.pallas import tpu as pltpu

    parameters = pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem)
    return pl.pallas_call(kernel, compiler_params=parameters, interpret=INTERPRET, **options)
