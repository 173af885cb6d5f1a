"""Calling Triton kernels from JAX through jax-triton, and whether that is possible here.

Nothing here imports Triton before a GPU is known to be there.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

from funnel_kernels import triton_interpreter, tuning
from funnel_kernels.target import Target, Unsupported

OLDEST = 80  # compute capability of Ampere, the first with bfloat16
INSTALL = "run: pip install 'funnel-engine[triton]'"
PACKAGES = {  # the least version of each, and the first that is too new; the extra "triton" says the same
    "triton": ((3, 6), (4,)),
    "jax-triton": ((0, 3, 1), (0, 3, 2)),
}
FFI_TARGET = "triton_kernel_call_ffi"  # of jaxlib's, which XLA may record in a CUDA graph
ELEMENTS = 8192  # that a program of a row-wise kernel holds at once

Launch = tuple[tuple[int, ...], dict[str, Any]]  # a grid, and what is fixed when a kernel is compiled

Sizes = TypeVar("Sizes", bound=tuple[Any, ...])


def check(target: Target) -> None:
    """Raises `Unsupported` unless the target is a GPU that the kernels run on, and Triton is there."""
    capability(target)
    if not target.interpret:
        check_packages()


def capability(target: Target) -> int:
    """The compute capability of a GPU, e.g. 90 for Hopper.

    Raises:
        Unsupported: there is none, or one that is too old.
    """
    if target.platform != "gpu":
        raise Unsupported(f"JAX runs on {target.platform}; on a machine with an NVIDIA GPU, install jax[cuda13]")
    if not re.fullmatch(r"\d+\.\d+", target.architecture):
        raise Unsupported(f"{target.kind} is not a GPU of NVIDIA's (its architecture is {target.architecture})")
    found = round(10 * float(target.architecture))
    if found < OLDEST:
        raise Unsupported(f"{target.kind} has compute capability {found / 10}; the kernels need {OLDEST / 10} or newer")
    return found


@functools.cache
def check_packages() -> None:
    """Raises `Unsupported` unless Triton and jax-triton are installed in versions that fit."""
    for package, (least, too_new) in PACKAGES.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise Unsupported(f"{package} is not installed; {INSTALL}") from error
        version = tuple(int(number) for number in re.findall(r"\d+", found)[:3])
        if not least <= version < too_new:
            bounds = [".".join(map(str, bound)) for bound in (least, too_new)]
            raise Unsupported(
                f"{package} {found} is installed; the kernels need at least {bounds[0]}, below {bounds[1]}; {INSTALL}"
            )
    try:
        importlib.import_module("jax_triton")
    except Exception as error:  # whatever a package raises that does not fit JAX or its CUDA plugin
        raise Unsupported(f"jax-triton cannot be imported ({error}); {INSTALL}") from error


def call(
    kernel: Any, *arguments: jax.Array | int, out_shape: Any, grid: tuple[int, ...], target: Target, **options: Any
) -> Any:
    """Runs a Triton kernel that takes `arguments`, pointers to the results, and `options`.

    Args:
        arguments: arrays, of which the kernel gets pointers, and integers, of which no value compiles the kernel again
            (but 1, which becomes a constant).
        out_shape: `jax.ShapeDtypeStruct` of the result, or a tuple of them.
        grid: numbers of programs; only the first axis may exceed 65,535.
        options: the kernel's compile-time constants, `num_warps` and `num_stages`.

    Raises:
        Unsupported: there is no ptxas.
    """
    if target.interpret:
        return triton_interpreter.call(kernel, *arguments, out_shape=out_shape, grid=grid, **options)
    provide_ptxas()
    use_typed_calls()
    import jax_triton

    return jax_triton.triton_call(
        *arguments,
        kernel=kernel,
        out_shape=out_shape,
        grid=grid,
        compute_capability=capability(target),
        custom_call_target_name=FFI_TARGET,
        **options,
    )


@functools.cache
def provide_ptxas() -> None:
    """Puts Triton's own ptxas at the end of PATH if PATH has none: jaxlib runs it to assemble the kernels.

    Raises:
        Unsupported: Triton has none either.
    """
    if shutil.which("ptxas"):
        return
    spec = importlib.util.find_spec("triton")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        tools = Path(folder, "backends", "nvidia", "bin")
        if shutil.which("ptxas", path=tools):
            os.environ["PATH"] = os.pathsep.join(filter(None, [os.environ.get("PATH"), str(tools)]))
            return
    raise Unsupported(
        "there is no program ptxas, neither on PATH nor in Triton's package; install NVIDIA's CUDA toolkit and add its "
        "folder bin to PATH"
    )


@functools.cache
def use_typed_calls() -> None:
    """Makes jax-triton emit calls of `FFI_TARGET` as calls of XLA's typed foreign function interface (FFI).

    jax-triton 0.3.1 knows the legacy interface only, whose calls XLA cannot record: each would end a CUDA graph. The
    payload is the same.
    """
    from jax.interpreters import mlir
    from jax_triton import triton_lib

    def lower(context: Any, *operands: Any, custom_call_target_name: str, **parameters: Any) -> Any:
        legacy = triton_lib.triton_kernel_call_lowering(
            triton_lib.get_cuda_backend,
            context,
            *operands,
            custom_call_target_name=custom_call_target_name,
            **parameters,
        )
        if custom_call_target_name != FFI_TARGET:  # a kernel that is not ours
            return legacy
        operation = legacy[0].owner
        typed = jax.ffi.ffi_lowering(FFI_TARGET, backend_config={"opaque": operation.attributes["backend_config"]})
        results = typed(context, *operands)
        operation.erase()
        return results

    mlir.register_lowering(triton_lib.triton_kernel_call_p, lower, platform="cuda")


def tuned(kind: type[Sizes], op: str, width: int, dtype: Any, target: Target) -> Sizes | None:
    """The sizes that the tuning table of the device has for an op, or None."""
    sizes = tuning.find(tuning.Key(op, width, str(dtype)), target.kind)
    return None if sizes is None else kind(**sizes)


class RowSizes(NamedTuple):
    """Rows and warps of a program of a row-wise kernel."""

    block_rows: int
    warps: int


def row_sizes(op: str, width: int, dtype: Any, target: Target) -> RowSizes:
    """From the tuning table, or by the rule."""
    block_width = 1 << (width - 1).bit_length()
    return tuned(RowSizes, op, block_width, dtype, target) or row_rule(block_width)


def row_rule(block_width: int) -> RowSizes:
    """As many rows that narrow ones do not leave a program idle, and warps whose registers hold them in float32."""
    rows = max(1, min(64, ELEMENTS // block_width))
    return RowSizes(rows, max(1, min(16, rows * block_width // 1024)))
