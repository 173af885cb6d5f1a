"""Runs the Triton backend without a GPU: in Triton's interpreter, on the arrays of the CPU."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when a kernel is defined

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from funnel_kernels import triton_calls


def interpret(kernel, *arrays, out_shape, grid, num_warps, num_stages, **options):
    """What `triton_calls.call` does, on the host.

    bfloat16 is computed as float32, because the interpreter multiplies its bits as integers; only the results are
    rounded. They start as NaN, so that a row that is never written shows.
    """
    results = out_shape if isinstance(out_shape, tuple) else (out_shape,)

    def widened(array):
        return array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array

    def run(*values):
        outputs = [torch.full(result.shape, float("nan")) for result in results]
        inputs = [torch.from_numpy(np.array(value)) for value in values]
        kernel[grid](*inputs, *outputs, **options)
        return tuple(output.numpy() for output in outputs)

    shapes = tuple(jax.ShapeDtypeStruct(result.shape, jnp.float32) for result in results)
    computed = jax.pure_callback(run, shapes, *map(widened, arrays))
    rounded = tuple(value.astype(result.dtype) for value, result in zip(computed, results, strict=True))
    return rounded if isinstance(out_shape, tuple) else rounded[0]


@pytest.fixture
def interpreted_triton(monkeypatch):
    """Makes backend "triton" available, here and in what is called."""
    monkeypatch.setattr(triton_calls, "capability", lambda: 90)
    monkeypatch.setattr(triton_calls, "check_packages", lambda: None)
    monkeypatch.setattr(triton_calls, "call", interpret)


@pytest.fixture(autouse=True)
def triton_where_it_is_the_parameter(request):
    """Every test over the grid of backends covers Triton's kernels too."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") == "triton":
        request.getfixturevalue("interpreted_triton")
