"""oneDNN's own matrix product as a peer: the library of the wheel that our kernels use, called through its C API.

The weight is packed beforehand into the layout that oneDNN asks for, and the product runs on all of its OpenMP threads.
`facts["implementation"]` is oneDNN's name for what runs, e.g. `brg:avx512_core_bf16`.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

# Numbers of oneapi/dnnl/dnnl_types.h, version 3.
CPU = 1
DATA_TYPES = {DTYPES["bfloat16"]: 2, DTYPES["float32"]: 3}
ANY_LAYOUT, ROWS_FIRST, COLUMNS_FIRST = 1, 3, 14
SOURCE, DESTINATION, WEIGHTS = 1, 17, 33
WEIGHTS_LAYOUT, IMPLEMENTATION = 131, 8
ALLOCATE = ctypes.c_void_p(-1)

Handle = ctypes.c_void_p


class Argument(ctypes.Structure):
    _fields_ = (("which", ctypes.c_int), ("memory", Handle))


def operands(task: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Random `x` [rows, in] and `weight` [out, in]; the same for the same task."""
    generator, dtype = np.random.default_rng(0), DTYPES[task["dtype"]]
    shapes = (task["rows"], task["in"]), (task["out"], task["in"])
    x, weight = (generator.standard_normal(shape, np.float32).astype(dtype) for shape in shapes)
    return x, weight


def make(task: dict[str, Any]) -> tuple[Callable[[int], np.ndarray], dict[str, Any]]:
    """The call, which returns `x @ weight.T`, [rows, out] float32, whatever batch it is asked for.

    Args:
        task: `rows`, `in` and `out` features, and `dtype` of both operands.
    """
    onednn = OneDNN()
    x, weight = operands(task)
    out = np.dtype(np.float32)
    source, destination = (onednn.layout(*about) for about in ((x.shape, x.dtype), ((len(x), len(weight)), out)))
    plain = onednn.layout(weight.T.shape, weight.dtype, COLUMNS_FIRST)
    free = onednn.layout(weight.T.shape, weight.dtype, ANY_LAYOUT)
    plan = onednn.made("matmul_primitive_desc_create", onednn.engine, source, free, None, destination, None)
    packed = Handle(onednn.call("primitive_desc_query_md", plan, WEIGHTS_LAYOUT, 0))
    memories = {what: onednn.memory(layout) for what, layout in ((SOURCE, source), (WEIGHTS, packed))}
    memories[DESTINATION] = onednn.memory(destination)
    onednn.view(memories[SOURCE], x.dtype, x.shape)[...] = x
    unpacked = onednn.memory(plain)
    onednn.view(unpacked, weight.dtype, weight.shape)[...] = weight
    reorder = onednn.made("reorder_primitive_desc_create", plain, onednn.engine, packed, onednn.engine, None)
    onednn.runner(reorder, {SOURCE: unpacked, DESTINATION: memories[WEIGHTS]})()
    run, result = onednn.runner(plan, memories), onednn.view(memories[DESTINATION], out, (len(x), len(weight)))

    def product(batch: int) -> np.ndarray:
        run()
        return result

    name = ctypes.c_char_p()
    onednn.check(onednn.call("primitive_desc_query", plan, IMPLEMENTATION, 0, ctypes.byref(name)))
    assert name.value is not None
    return product, {"implementation": name.value.decode()}


class OneDNN:
    """The few functions of the C API that a product needs. Nothing is freed: the process ends with the peer."""

    def __init__(self) -> None:
        from funnel_native import handlers

        handlers()  # which loads it, within the limit of FUNNEL_CPU_ISA
        self.library = ctypes.CDLL("libdnnl.so.3")  # the one that is loaded already
        self.library.dnnl_primitive_desc_query_md.restype = ctypes.c_void_p
        self.library.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
        self.engine = self.made("engine_create", CPU, ctypes.c_size_t(0))
        self.stream = self.made("stream_create", self.engine, 1)  # 1: in order

    def call(self, name: str, *arguments: Any) -> Any:
        return getattr(self.library, f"dnnl_{name}")(*arguments)

    def check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"oneDNN returned status {status}")

    def made(self, name: str, *arguments: Any) -> Handle:
        """The object that a function of this name makes."""
        handle = Handle()
        self.check(self.call(name, ctypes.byref(handle), *arguments))
        return handle

    def layout(self, shape: tuple[int, ...], dtype: np.dtype, order: int = ROWS_FIRST) -> Handle:
        dimensions = (ctypes.c_int64 * 12)(*shape)
        return self.made("memory_desc_create_with_tag", len(shape), dimensions, DATA_TYPES[dtype], order)

    def memory(self, layout: Handle) -> Handle:
        return self.made("memory_create", layout, self.engine, ALLOCATE)

    def view(self, memory: Handle, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """The elements of a memory whose rows lie one after another."""
        address = Handle()
        self.check(self.call("memory_get_data_handle", memory, ctypes.byref(address)))
        assert address.value is not None
        size = int(np.prod(shape)) * dtype.itemsize
        bytes_there = (ctypes.c_uint8 * size).from_address(address.value)
        return np.ctypeslib.as_array(bytes_there).view(dtype).reshape(shape)

    def runner(self, plan: Handle, memories: dict[int, Handle]) -> Callable[[], None]:
        primitive = self.made("primitive_create", plan)
        arguments = (Argument * len(memories))(*(Argument(what, memory) for what, memory in memories.items()))

        def run() -> None:
            self.check(self.call("primitive_execute", primitive, self.stream, len(memories), arguments))
            self.check(self.call("stream_wait", self.stream))

        return run
