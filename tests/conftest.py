"""Interprets the kernels for GPUs and TPUs on the CPU: Triton's, and Pallas's in a simulated TPU."""

import os
import threading

os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when a kernel is defined

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter
from jax.experimental.pallas import tpu as pltpu

from funnel_kernels import pallas_calls, triton_calls
from funnel_kernels.attention import pallas_tpu as pallas_attention

# Backends that need a device which is not here -> the fixture that interprets their kernels.
INTERPRETED = {"triton": "interpreted_triton", "tpu": "interpreted_pallas"}

# Triton's interpreter is not made for threads, and each simulated device has one.
ONE_AT_A_TIME = threading.Lock()


def interpret(kernel, *arguments, out_shape, grid, num_warps, num_stages, **options):
    """What `triton_calls.call` does, on the host.

    bfloat16 is computed as float32, because the interpreter multiplies its bits as integers; only the results are
    rounded. They start as NaN, so that a row that is never written shows.
    """
    results = out_shape if isinstance(out_shape, tuple) else (out_shape,)

    def widened(array):
        return array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array

    arrays = [argument for argument in arguments if not isinstance(argument, int)]

    def run(*values):
        outputs = [torch.full(result.shape, float("nan")) for result in results]
        tensors = (torch.from_numpy(np.array(value)) for value in values)
        inputs = [argument if isinstance(argument, int) else next(tensors) for argument in arguments]
        with ONE_AT_A_TIME:
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


@pytest.fixture
def interpreted_pallas(monkeypatch):
    """Makes backend "tpu" available: memory starts as NaN, reads beyond an array raise, and races fail the test.

    Blocks are small, so that small cases have several of them.
    """
    monkeypatch.setattr(pallas_calls, "generation", lambda: pallas_calls.GENERATIONS["TPU v5 lite"])
    monkeypatch.setattr(pallas_calls, "INTERPRET", pltpu.InterpretParams(detect_races=True))
    monkeypatch.setattr(pallas_attention, "rule", lambda *_: pallas_attention.Sizes(128, 128, 128))
    yield
    races = tpu_interpreter.races
    pltpu.reset_tpu_interpret_mode_state()
    assert races is None or not races.races_found


@pytest.fixture(autouse=True)
def interpreter_where_the_backend_is_the_parameter(request):
    """Every test over the grid of backends covers the interpreted ones too."""
    backend = getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend")
    if backend in INTERPRETED:
        request.getfixturevalue(INTERPRETED[backend])
