"""Calling Pallas kernels on TPUs, and whether that is possible here."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from funnel_kernels.target import Target, Unsupported


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


def check(target: Target) -> None:
    """Raises `Unsupported` unless the target is a TPU that the kernels run on."""
    generation(target)


def generation(target: Target) -> Generation:
    """The TPU that programs run on.

    Raises:
        Unsupported: there is none, or one that no kernel was compiled for.
    """
    if target.platform != "tpu":
        raise Unsupported(f"JAX runs on {target.platform}; on a machine with a TPU, install jax[tpu]")
    if target.kind not in GENERATIONS:
        known = ", ".join(found.name for found in GENERATIONS.values())
        raise Unsupported(f"{target.kind} is a TPU that the kernels were never compiled for; known: {known}")
    return GENERATIONS[target.kind]


def call(
    kernel: Callable[..., Any],
    *,
    target: Target,
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
    return pl.pallas_call(kernel, compiler_params=parameters, interpret=target.interpret, **options)
