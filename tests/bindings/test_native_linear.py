"""The products in C++ beyond what every backend is tested for: instruction sets, threads, and calls that are wrong."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funnel_native
from funnel_kernels import gated_linear, linear, native_calls, prepare
from option_grid import LinearCase

HANDLERS = funnel_native.handlers()
BEST = HANDLERS.instruction_set()


def run(case: LinearCase, threads: int = 0) -> np.ndarray:
    x, weight, add = case.arrays()
    prepared = prepare(weight, parts=1 + case.gated, backend="cpu")
    with native_calls.use_threads(threads):
        if case.gated:
            out = jax.jit(lambda x, weight: gated_linear(x, weight, backend="cpu"))(x, prepared)
        else:
            out = jax.jit(lambda *arrays: linear(*arrays, backend="cpu"))(x, prepared, add)
    return np.asarray(out)


CASES = [
    LinearCase(130, 48, 600, dtype, add, gated)
    for dtype in ("float32", "bfloat16")
    for add, gated in ((False, False), (True, False), (False, True))
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set_rounds_alike(instruction_set, case):
    """What follows the product is the same in all of them: one rounding to bfloat16, gelu to the last place."""
    limited = run(case).astype(np.float64)
    HANDLERS.limit_instruction_set(BEST)
    best = run(case).astype(np.float64)
    step = 2**-8 if case.dtype == "bfloat16" and (case.add or case.gated) else 2**-20
    assert np.abs(limited - best).max() <= step * np.abs(best).max()
    assert (limited == best).mean() > 0.99 or case.gated


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_equal_to_the_bit_from_run_to_run(case):
    for threads in (1, 2):
        first = run(case, threads)
        assert all((run(case, threads) == first).all() for _ in range(5))


def test_many_threads_at_once():
    """Calls from several threads share one pool and the table of products."""
    from concurrent.futures import ThreadPoolExecutor

    case = LinearCase(67, 112, 200, "bfloat16", gated=True)  # a shape that no other test has
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: run(case), range(24)))
    assert all((result == results[0]).all() for result in results)


X, PACKED = np.ones((4, 32), np.float32), funnel_native.pack(np.ones((64, 32), np.float32))


def call(target, out, *arrays, **attributes):
    attributes = {"out_features": np.int64(64), "threads": np.int64(0)} | attributes
    return jax.block_until_ready(jax.ffi.ffi_call(target, out)(*arrays, **attributes))


OUT = jax.ShapeDtypeStruct((4, 64), jnp.float32)
BAD_CALLS = {
    "x is a vector": ((OUT, X[0], PACKED), {}, "x must be a matrix"),
    "x is float16": ((OUT, X.astype(np.float16), PACKED), {}, "x must be a matrix of float32 or bfloat16"),
    "x is int32": ((OUT, X.astype(np.int32), PACKED), {}, "x must be a matrix of float32"),
    "weights of another width": ((OUT, X[:, :16], PACKED), {}, "packed weights has shape"),
    "weights cut short": ((OUT, X, PACKED[:-1]), {}, "packed weights has shape"),
    "weights of another dtype": ((OUT, X, PACKED.astype(jnp.bfloat16)), {}, "packed weights has shape"),
    "weights as a matrix": ((OUT, X, PACKED.reshape(64, 32)), {}, "packed weights has shape"),
    "more features than weights": ((OUT, X, PACKED), {"out_features": np.int64(65)}, "packed weights has shape"),
    "no output features": ((OUT, X, PACKED), {"out_features": np.int64(0)}, "from 1 to 2.24 input and output features"),
    "negative output features": (
        (OUT, X, PACKED),
        {"out_features": np.int64(-64)},
        "from 1 to 2.24 input and output features",
    ),
    "huge output features": ((OUT, X, PACKED), {"out_features": np.int64(2**62)}, "from 1 to 2.24"),
    "result too small": ((jax.ShapeDtypeStruct((3, 64), jnp.float32), X, PACKED), {}, "the result has shape"),
    "result too wide": ((jax.ShapeDtypeStruct((4, 65), jnp.float32), X, PACKED), {}, "the result has shape"),
    "result of integers": ((jax.ShapeDtypeStruct((4, 64), jnp.int32), X, PACKED), {}, "the result"),
    "attribute of another type": ((OUT, X, PACKED), {"out_features": np.float32(63)}, "expected S64 but got F32"),
}
BAD_SUMS = {
    "sum of another shape": ((OUT, X, PACKED, np.ones((4, 63), np.float32)), {}, "the matrix to add has shape"),
    "sum of another dtype": ((OUT, X, PACKED, np.ones((4, 64), jnp.bfloat16)), {}, "the matrix to add has shape"),
    "two sums": ((OUT, X, PACKED, *[np.ones((4, 64), np.float32)] * 2), {}, "adds at most one"),
}


@pytest.mark.parametrize(("arrays", "attributes", "message"), (BAD_CALLS | BAD_SUMS).values(), ids=BAD_CALLS | BAD_SUMS)
def test_a_wrong_call_is_an_error_that_says_why(arrays, attributes, message):
    with pytest.raises(Exception, match=message):
        call("funnel_linear", *arrays, **attributes)
    assert (call("funnel_linear", OUT, X, PACKED)[0] == 32).all()  # the next call is served


@pytest.mark.parametrize(("arrays", "attributes", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_wrong_gated_call_is_an_error_that_says_why(arrays, attributes, message):
    out, x, packed = arrays
    with pytest.raises(Exception, match=message):
        call("funnel_gated_linear", out, x, np.concatenate([packed, packed]), **attributes)


def test_what_cannot_be_packed():
    weight = np.ones((6, 4), np.float32)
    for wrong, parts, message in (
        (weight[0], 1, "contiguous matrix"),
        (weight.astype(np.float16), 1, "not float16"),
        (weight.T, 1, "contiguous matrix"),
        (weight, 4, r"shape \(6, 4\) cannot be packed in 4 parts"),
        (weight[:0], 1, "cannot be packed"),
        (weight[:, :0], 1, "cannot be packed"),
    ):
        with pytest.raises(ValueError, match=message):
            funnel_native.pack(np.asarray(wrong, order="K"), parts)


def test_without_bfloat16_products_the_product_is_left_to_xla():
    """oneDNN has no blocked bfloat16 product below AVX-512; the rest of the kernels still run."""
    code = """
import numpy as np, jax.numpy as jnp, funnel_native
from funnel_kernels import PackedWeight, linear, prepare
half = np.ones((64, 32), jnp.bfloat16)
assert not isinstance(prepare(half), PackedWeight)
assert (linear(half[:4], prepare(half)) == 32).all()
packed = funnel_native.pack(np.ones((64, 32), np.float32)).astype(jnp.bfloat16)
try:
    linear(half[:4], PackedWeight(packed, (64, 32)), backend="cpu")
except Exception as error:
    print(error)
"""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "oneDNN has no blocked product of bfloat16 for this processor" in done.stdout


def test_a_program_that_is_compiled_has_made_all_its_products():
    """oneDNN writes down what it makes: a compiled program that is called makes nothing more."""
    code = """
import sys, jax, jax.numpy as jnp, numpy as np
from funnel_kernels import gated_linear, linear, prepare
weight = np.ones((1000, 96), jnp.bfloat16)
down, gate_up = prepare(weight, backend="cpu"), prepare(weight, parts=2, backend="cpu")
for rows in (1, 16, 300):  # one tile, and tiles of different sizes
    x = jax.ShapeDtypeStruct((rows, 96), jnp.bfloat16)
    both = jax.jit(lambda x: (linear(x, down, backend="cpu"), gated_linear(x, gate_up, backend="cpu")))
    program = both.lower(x).compile()
    if sys.argv[1] == "call":
        jax.block_until_ready(program(np.ones(x.shape, x.dtype)))
"""
    made = {}
    for what in ("compile", "call"):
        environment = os.environ | {"ONEDNN_VERBOSE": "2"}
        done = subprocess.run([sys.executable, "-c", code, what], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made[what] = done.stdout.count("create:cache_miss,cpu,matmul")
        assert ("exec,cpu,matmul" in done.stdout) == (what == "call")
    assert made["call"] == made["compile"] > 10
