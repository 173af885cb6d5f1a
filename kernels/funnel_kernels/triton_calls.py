"""Calls Triton kernels from JAX through jax-triton, and checks whether they can run here.

Triton is imported only after a GPU was found.
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
PACKAGES = {  # lowest supported version, and first unsupported one; as in the extra "triton"
    "triton": ((3, 6), (4,)),
    "jax-triton": ((0, 3, 1), (0, 3, 2)),
}
FFI_TARGET = "triton_kernel_call_ffi"  # jaxlib's call target that XLA can record in a CUDA graph
ELEMENTS = 8192  # in registers at once, per program of a row-wise kernel

Launch = tuple[tuple[int, ...], dict[str, Any]]  # a grid, and a kernel's compile-time constants

Sizes = TypeVar("Sizes", bound=tuple[Any, ...])


def check(target: Target) -> None:
    """Raises `Unsupported` unless the target is a GPU that the kernels support, and Triton is installed."""
    capability(target)
    if not target.interpret:
        check_packages()


def capability(target: Target) -> int:
    """The compute capability of a GPU, e.g. 90 for Hopper.

    Raises:
        Unsupported: the target is not an NVIDIA GPU, or the GPU is too old.
    """
    if target.platform != "gpu":
        raise Unsupported(f"JAX runs on {target.platform}; on a machine with an NVIDIA GPU, install jax[cuda13]")
    if not re.fullmatch(r"\d+\.\d+", target.architecture):
        raise Unsupported(f"{target.kind} is not an NVIDIA GPU (its architecture is {target.architecture})")
    found = round(10 * float(target.architecture))
    if found < OLDEST:
        raise Unsupported(f"{target.kind} has compute capability {found / 10}; the kernels need {OLDEST / 10} or newer")
    return found


@functools.cache
def check_packages() -> None:
    """Raises `Unsupported` unless supported versions of Triton and jax-triton are installed."""
    for package, (least, too_new) in PACKAGES.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise Unsupported(f"{package} is not installed; {INSTALL}") from error
        version = tuple(int(number) for number in re.findall(r"\d+", found)[:3])
        if not least <= version < too_new:
            bounds = [".".join(map(str, bound)) for bound in (least, too_new)]
            raise Unsupported(
                f"{package} {found} is installed; the kernels need {bounds[0]} or newer, below {bounds[1]}; {INSTALL}"
            )
    try:
        importlib.import_module("jax_triton")
    except Exception as error:  # a package that does not fit JAX or its CUDA plugin may raise any exception
        raise Unsupported(f"jax-triton cannot be imported ({error}); {INSTALL}") from error


def call(
    kernel: Any, *arguments: jax.Array | int, out_shape: Any, grid: tuple[int, ...], target: Target, **options: Any
) -> Any:
    """Runs a Triton kernel that takes `arguments`, pointers to the results, and `options`.

    Args:
        arguments: arrays, which the kernel gets as pointers, and integers. A new value of an integer does not compile
            the kernel again (except 1, which becomes a constant).
        out_shape: `jax.ShapeDtypeStruct` of the result, or a tuple of them.
        grid: number of programs along each axis; only the first may exceed 65,535.
        options: the kernel's compile-time constants, `num_warps` and `num_stages`.

    Raises:
        Unsupported: the program ptxas is missing.
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
    """Adds Triton's own ptxas to the end of PATH if PATH has none. jaxlib runs ptxas to assemble the kernels.

    Raises:
        Unsupported: Triton's package has none either.
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
        "the program ptxas is missing, on PATH and in Triton's package; install NVIDIA's CUDA toolkit and add its "
        "folder bin to PATH"
    )


@functools.cache
def use_typed_calls() -> None:
    """Makes jax-triton emit calls to `FFI_TARGET` through XLA's typed foreign function interface (FFI).

    jax-triton 0.3.1 only supports the legacy interface. XLA cannot record its calls, so each one would end a CUDA
    graph. The payload is the same in both.
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
        if custom_call_target_name != FFI_TARGET:  # not a kernel of this package
            return legacy
        operation = legacy[0].owner
        typed = jax.ffi.ffi_lowering(FFI_TARGET, backend_config={"opaque": operation.attributes["backend_config"]})
        results = typed(context, *operands)
        operation.erase()
        return results

    mlir.register_lowering(triton_lib.triton_kernel_call_p, lower, platform="cuda")


def tuned_sizes(kind: type[Sizes], op: str, width: int, dtype: Any, target: Target) -> Sizes | None:
    """The block sizes of an op in the tuning table of the device; None if the table has none."""
    sizes = tuning.find(tuning.Key(op, width, str(dtype)), target.kind)
    return None if sizes is None else kind(**sizes)


class RowSizes(NamedTuple):
    """Rows and warps per program of a row-wise kernel."""

    block_rows: int
    warps: int


def row_sizes(op: str, width: int, dtype: Any, target: Target) -> RowSizes:
    """Sizes from the tuning table, or else from `row_rule`."""
    block_width = 1 << (width - 1).bit_length()
    return tuned_sizes(RowSizes, op, block_width, dtype, target) or row_rule(block_width)


def row_rule(block_width: int) -> RowSizes:
    """Enough rows to keep a program busy if they are narrow, and enough warps to hold them in registers as float32."""
    rows = max(1, min(64, ELEMENTS // block_width))
    return RowSizes(rows, max(1, min(16, rows * block_width // 1024)))
