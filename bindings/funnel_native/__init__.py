"""The kernels for CPUs that are written in C++: XLA FFI handlers, registered with JAX when they can run here.

    funnel_native.problem()            # why they cannot, or None
    jax.ffi.ffi_call("funnel_linear", ...)

The compiled module is `_handlers`: module.cc, with the kernels of kernels/funnel_kernels. It is left out where no C++
compiler was found at installation.
"""

import ctypes
import functools
import importlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np

ONEDNN = "onednn-cpu-gomp"  # its wheel puts the library below the environment's prefix
LIMIT = "FUNNEL_CPU_ISA"  # the variable that limits the kernels, and oneDNN, to an instruction set and those below it
INSTRUCTION_SETS = ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")


def limit() -> str | None:
    """The best instruction set that FUNNEL_CPU_ISA allows; None without a limit.

    Raises:
        ValueError: it names no instruction set.
    """
    name = os.environ.get(LIMIT) or None
    if name is not None and name not in INSTRUCTION_SETS:
        raise ValueError(f"{LIMIT}={name!r} must be one of {', '.join(INSTRUCTION_SETS)}; correct it or unset it")
    return name


@functools.cache
def problem() -> str | None:
    """Why the kernels cannot run on this machine; None if they can, and then they are registered.

    Raises:
        ValueError: as `limit`.
    """
    try:
        module = handlers()
    except ImportError as error:
        return str(error)
    if module.instruction_set() == "none":
        return "this processor has no AVX2"
    for name, handler in module.handlers().items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return None


@functools.cache
def handlers() -> ModuleType:
    """The compiled module.

    Raises:
        ImportError: it is for other machines, it was not built, or oneDNN is missing; the message says what to do.
        ValueError: as `limit`.
    """
    limit()  # which the module reads as it is loaded
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise ImportError(f"the kernels are for Linux on x86-64, and this is {sys.platform} on {platform.machine()}")
    reason = Path(__file__).with_name("not_built.txt")
    try:
        preload_onednn()
        return importlib.import_module("funnel_native._handlers")
    except ModuleNotFoundError as error:
        why = " ".join(reason.read_text(encoding="utf-8").split()) if reason.exists() else "it is not there"
        raise ImportError(
            f"the compiled module was not built ({why}); install a C++17 compiler, and funnel-engine again with "
            "pip install --no-cache-dir --force-reinstall --no-deps"
        ) from error
    except (ImportError, OSError) as error:
        raise ImportError(f"the compiled module cannot be loaded: {error}") from error


def preload_onednn() -> None:
    """Loads oneDNN from its wheel, so that the module needs no path of a library."""
    try:
        files = importlib.metadata.files(ONEDNN) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"oneDNN is not installed; run: pip install {ONEDNN}") from error
    libraries = [str(file.locate()) for file in files if file.name == "libdnnl.so.3"]
    if not libraries:
        raise ImportError(f"the package {ONEDNN} holds no libdnnl.so.3; install it again")
    ctypes.CDLL(libraries[0])


def pack(weight: np.ndarray, parts: int = 1, scale: np.ndarray | None = None) -> np.ndarray:
    """Lays a weight out for the products: [out_features, in_features] -> [packed elements], the same dtype.

    Args:
        weight: float32, bfloat16 or int8, with rows one after another.
        parts: the number of matrices of equal size that the weight consists of; each is packed by itself.
        scale: of int8, float32 [out_features]: what each row is multiplied with.

    Raises:
        ValueError: an argument is something else.
    """
    dtype = str(weight.dtype)
    if weight.ndim != 2 or dtype not in ("float32", "bfloat16", "int8") or not weight.flags.c_contiguous:
        raise ValueError(f"a weight is a contiguous matrix of float32, bfloat16 or int8, not {dtype} {weight.shape}")
    if not weight.size or parts < 1 or weight.shape[0] % parts:
        raise ValueError(f"a weight of shape {weight.shape} cannot be packed in {parts} parts")
    if (scale is not None) != (dtype == "int8"):
        raise ValueError(f"a weight of {dtype} {'needs a scale for each row' if scale is None else 'has no scale'}")
    scales = np.ones(weight.shape[0], np.float32) if scale is None else np.ascontiguousarray(scale)
    if scales.dtype != np.float32 or scales.shape != weight.shape[:1]:
        raise ValueError(f"scale is {scales.dtype} {scales.shape}; it must be float32 {weight.shape[:1]}")
    module, rows = handlers(), weight.shape[0] // parts
    size = module.packed_size(rows, weight.shape[1], dtype)
    packed = aligned_empty(parts * size, weight.dtype)
    for part in range(parts):
        first = part * rows
        source, target = weight[first:], packed[part * size :]
        module.pack(source.ctypes.data, scales[first:].ctypes.data, rows, weight.shape[1], dtype, target.ctypes.data)
    return packed


def aligned_empty(size: int, dtype: np.dtype) -> np.ndarray:
    """A vector that JAX can use in place: it starts at a cache line."""
    line = 64
    memory = np.empty(size * dtype.itemsize + line, np.uint8)
    start = -memory.ctypes.data % line
    return memory[start : start + size * dtype.itemsize].view(dtype)
