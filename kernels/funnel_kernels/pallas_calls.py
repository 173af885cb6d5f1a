"""Calls Pallas kernels on TPUs, and checks whether they can run here."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from funnel_kernels.target import Target, Unsupported


class Generation(NamedTuple):
    """The facts about a TPU that the kernels need.

    Attributes:
        name: the name in JAX's topologies, e.g. "v5e".
        vmem: bytes of vector memory per core. The compiler uses a part of them itself.
        cores: how many cores share the grid of one kernel (its "parallel" axes).
    """

    name: str
    vmem: int
    cores: int


MIB = 2**20
# By JAX's device kind. Sizes: jax/_src/tpu_info.py; v7x shows its two cores as two devices.
GENERATIONS = {
    "TPU v4": Generation("v4", 16 * MIB, 2),
    "TPU v5 lite": Generation("v5e", 128 * MIB, 1),
    "TPU v5": Generation("v5p", 64 * MIB, 2),
    "TPU v6 lite": Generation("v6e", 128 * MIB, 1),
    "TPU7x": Generation("v7x", 64 * MIB, 1),
}


def check(target: Target) -> None:
    """Raises `Unsupported` unless the target is a TPU that the kernels support."""
    generation(target)


def generation(target: Target) -> Generation:
    """The generation of the target's TPU.

    Raises:
        Unsupported: the target is not a TPU, or not one that the kernels support.
    """
    if target.platform != "tpu":
        raise Unsupported(f"JAX runs on {target.platform}; on a machine with a TPU, install jax[tpu]")
    if target.kind not in GENERATIONS:
        known = ", ".join(found.name for found in GENERATIONS.values())
        raise Unsupported(f"{target.kind} is not supported by the kernels; they support TPUs {known}")
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
        semantics: for each axis of the grid, "parallel" if cores may share its steps, else "arbitrary".
        vmem: bytes of vector memory that the kernel may use; None is the compiler's default of 16 or 32 MiB.
        options: further arguments of `pl.pallas_call`.
    """
    from jax.experimental import pallas as pl  # imported here: slow, and needed on TPUs only
    from jax.experimental.pallas import tpu as pltpu

    parameters = pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem)
    return pl.pallas_call(kernel, compiler_params=parameters, interpret=target.interpret, **options)
