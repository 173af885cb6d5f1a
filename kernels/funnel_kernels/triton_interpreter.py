"""Calls Triton kernels in Triton's interpreter on the host. Needs PyTorch, and TRITON_INTERPRET=1 from the start."""

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ONE_AT_A_TIME = threading.Lock()  # the interpreter is not thread-safe, and each simulated device has a thread


def call(
    kernel: Any,
    *arguments: jax.Array | int,
    out_shape: Any,
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    **options: Any,
) -> Any:
    """See `triton_calls.call`; the numbers of warps and stages have no effect here.

    bfloat16 is computed as float32, because the interpreter would multiply its bits as integers; only the results are
    rounded. Results start as NaN, so that a row that is never written is visible.
    """
    import torch

    results = out_shape if isinstance(out_shape, tuple) else (out_shape,)
    arrays = [argument for argument in arguments if not isinstance(argument, int)]

    def run(*values: Any) -> tuple[np.ndarray, ...]:
        outputs = [torch.full(result.shape, float("nan")) for result in results]
        tensors = (torch.from_numpy(np.array(value)) for value in values)
        inputs = [argument if isinstance(argument, int) else next(tensors) for argument in arguments]
        with ONE_AT_A_TIME:
            kernel[grid](*inputs, *outputs, **options)
        return tuple(output.numpy() for output in outputs)

    def widened(array: jax.Array) -> jax.Array:
        return array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array

    shapes = tuple(jax.ShapeDtypeStruct(result.shape, jnp.float32) for result in results)
    computed = jax.pure_callback(run, shapes, *map(widened, arrays))
    rounded = tuple(value.astype(result.dtype) for value, result in zip(computed, results, strict=True))
    return rounded if isinstance(out_shape, tuple) else rounded[0]
