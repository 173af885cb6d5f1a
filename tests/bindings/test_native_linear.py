"""The products in C++ beyond what every backend is tested for: instruction sets, threads, and calls that are wrong."""

import contextlib
import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funnel_native
from funnel_kernels import add_norm, gated_linear, linear, linear_add_norm, prepare, project_heads
from funnel_kernels.linear.packed import packs
from option_grid import EPS, HeadsCase, LinearAddNormCase, LinearCase, no_product, served_or_refused, target

HANDLERS = funnel_native.handlers()
BEST = HANDLERS.instruction_set()
OURS = BEST == "avx512_bf16" and not no_product("bfloat16")  # whose kernel multiplies bfloat16


@functools.cache
def program(case: LinearCase, threads: int):
    """Compiled once, and its arrays: its kernels run with the instruction set that is allowed when it is called."""
    x, weight, add = case.arrays()
    arrays = (x, prepare(weight, parts=1 + case.gated, target=target("cpu")), *(() if add is None else (add,)))
    product = gated_linear if case.gated else linear
    run = jax.jit(lambda *arrays: product(*arrays, target=target("cpu", threads)))
    return run.lower(*arrays).compile(), arrays


def run(case: LinearCase, threads: int = 0) -> np.ndarray:
    compiled, arrays = program(case, threads)
    return np.asarray(compiled(*arrays))


CASES = [
    LinearCase(130, 48, 600, dtype, add, gated)
    for dtype in ("float32", "bfloat16")
    for add, gated in ((False, False), (True, False), (False, True))
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set_rounds_alike(instruction_set, case):
    """What follows the product is the same in all of them: one rounding to bfloat16, gelu to the last place."""
    with served_or_refused(case.dtype):
        limited = run(case).astype(np.float64)
        HANDLERS.limit_instruction_set(BEST)
        best = run(case).astype(np.float64)
        step = 2**-8 if case.dtype == "bfloat16" and (case.add or case.gated) else 2**-20
        assert np.abs(limited - best).max() <= step * np.abs(best).max()
        assert (limited == best).mean() > 0.99 or case.gated


# Input features: few; with padding, so that the tiles are oneDNN's; and more than our own kernel takes in a pass.
@pytest.mark.parametrize(("width", "out"), [(32, 64), (96, 200), (80, 130), (1056, 100), (2080, 70)])
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 11, 12, 13, 18, 19, 24, 25, 31, 43, 48, 127, 128, 129, 300])
def test_any_number_of_rows_in_bfloat16(instruction_set, rows, width, out):
    case = LinearCase(rows, width, out, "bfloat16", False, False)
    x, weight, _ = (None if array is None else np.asarray(array, np.float64) for array in case.arrays())
    exact = x @ weight.T
    with served_or_refused("bfloat16"):
        np.testing.assert_allclose(run(case), exact, rtol=0, atol=2e-6 * np.abs(exact).max())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_equal_to_the_bit_from_run_to_run(case):
    for threads in (1, 2):
        with served_or_refused(case.dtype):
            first = run(case, threads)
            assert all((run(case, threads) == first).all() for _ in range(5))


TWO_THREADS = target("cpu", 2)


def row_results(op: str, dtype: str):
    """A function that makes an op's results of rows `first` to `last` of its input, always with the same weights."""
    if op == "project_heads":
        heads = HeadsCase(400, 384, 128, (3, 1), 1, dtype, normed=True)
        x, weight, cos, sin, norms = heads.arrays()
        packed = prepare(weight, target=target("cpu"))
        return lambda *rows: project_heads(
            x[slice(*rows)], packed, cos[slice(*rows)], sin[slice(*rows)], norms, **heads.options(), target=TWO_THREADS
        )
    if op == "linear_add_norm":
        x, weight, add, norm, update_norm = LinearAddNormCase(400, 384, 384, dtype, normed=True).arrays()
        packed, options = (
            prepare(weight, target=target("cpu")),
            {"update_weight": update_norm, "eps": EPS, "target": TWO_THREADS},
        )
        return lambda *rows: linear_add_norm(x[slice(*rows)], packed, add[slice(*rows)], norm, **options)
    x, weight, _ = LinearCase(400, 384, 600, dtype, gated=op == "gated_linear").arrays()
    packed = prepare(weight, parts=1 + (op == "gated_linear"), target=target("cpu"))
    product = gated_linear if op == "gated_linear" else linear
    return lambda *rows: [product(x[slice(*rows)], packed, target=TWO_THREADS)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["linear", "gated_linear", "linear_add_norm", "project_heads"])
def test_a_row_has_the_same_bits_among_any_number_of_rows(op, dtype):
    """Whatever tile it is in: of one row or many, of few columns or whole rows."""
    if not (OURS if dtype == "bfloat16" else packs(dtype, target("cpu"))):
        pytest.skip("XLA makes these products here, or oneDNN with AMX")
    results = row_results(op, dtype)
    together = results(0, 400)
    for first, last in ((0, 1), (5, 7), (3, 15), (100, 148), (7, 136), (1, 130), (200, 400), (1, 399)):
        for result, all_rows in zip(results(first, last), together, strict=True):
            np.testing.assert_array_equal(result, all_rows[first:last], err_msg=f"rows {first} to {last}")


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("rows", "threads"),
    # The last five cut rows into fewer tiles than there were to be, because a tile has whole rows.
    [(191, 1), (192, 1), (193, 1), (1000, 2), (1000, 20), (2497, 13), (2498, 13), (2499, 13), (4096, 20), (3457, 18)],
)
def test_a_sum_and_its_norm_are_the_same_with_the_product_and_after_it(rows, threads, normed):
    """Every thread needs 192 rows, for the product to make whole ones."""
    x, weight, add, norm_weight, update_weight = LinearAddNormCase(rows, 96, 128, "bfloat16", normed).arrays()
    packed = prepare(weight, target=target("cpu"))
    options = {"update_weight": update_weight, "eps": EPS, "target": target(threads=threads)}
    expected = add_norm(add, linear(x, packed, target=target()), norm_weight, **options)
    program = jax.jit(lambda *a: linear_add_norm(*a, **options)).lower(x, packed, add, norm_weight)
    for ours, two_ops in zip(program.compile()(x, packed, add, norm_weight), expected, strict=True):
        np.testing.assert_array_equal(ours, two_ops)
    with_product = HANDLERS.suits_whole_rows(rows, *weight.shape, True, threads)
    assert ("funnel_linear_add_norm" in program.as_text()) == with_product == (OURS and rows >= 192 * threads)


def test_which_products_make_whole_rows():
    """Those whose weights take half of the shared cache, and 48 of their float32 rows 3/2 of a core's own."""
    caches = HANDLERS.caches()
    width, columns = caches["shared"] // 2 // (2048 * 2), caches["core"] * 3 // 2 // (48 * 4)
    assert HANDLERS.suits_whole_rows(10**4, 2048, width, True, 2) == OURS
    assert not HANDLERS.suits_whole_rows(10**4, 2048, width + 32, True, 2)
    assert not HANDLERS.suits_whole_rows(10**4, 2000, width, True, 2)  # half a unit
    assert HANDLERS.suits_whole_rows(10**4, columns, 96, True, 2) == OURS
    assert not HANDLERS.suits_whole_rows(10**4, columns + 64, 96, True, 2)
    assert not HANDLERS.suits_whole_rows(10**4, 2048, 2048, False, 2)


HEADS = [
    HeadsCase(300, 96, 128, (5, 1), 1, dtype, normed) for dtype in ("float32", "bfloat16") for normed in (False, True)
]


def run_heads(case: HeadsCase, threads: int = 0) -> np.ndarray:
    """All groups side by side."""
    x, weight, *rest = case.arrays()
    run = jax.jit(lambda *arrays: project_heads(*arrays, **case.options(), target=target("cpu", threads)))
    groups = run(x, prepare(weight, target=target("cpu")), *rest)
    return np.concatenate([np.asarray(group, np.float64) for group in groups], axis=1)


@pytest.mark.parametrize("case", HEADS, ids=str)
def test_every_instruction_set_finishes_heads_alike(instruction_set, case):
    with served_or_refused(case.dtype):
        limited = run_heads(case)
        HANDLERS.limit_instruction_set(BEST)
        step = 2**-8 if case.dtype == "bfloat16" else 2**-20
        assert np.abs(limited - run_heads(case)).max() <= step * np.abs(limited).max()


@pytest.mark.parametrize("case", HEADS, ids=str)
def test_heads_are_equal_to_the_bit_with_any_number_of_threads(case):
    with served_or_refused(case.dtype):
        first = run_heads(case, 1)
        for threads in (1, 2, 3, 2):
            assert (run_heads(case, threads) == first).all()


def test_many_threads_at_once():
    """Calls from several threads share one pool and the table of products."""
    from concurrent.futures import ThreadPoolExecutor

    case = LinearCase(67, 112, 200, "bfloat16", gated=True)  # a shape that no other test has
    with served_or_refused("bfloat16"):
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda _: run(case), range(24)))
        assert all((result == results[0]).all() for result in results)


X, PACKED = np.ones((4, 32), np.float32), funnel_native.pack(np.ones((64, 32), np.float32))
REFUSED = HANDLERS.no_product(False)  # why a right call is refused where the processor has no products, else ""


def the_next_call_is_served():
    return pytest.raises(Exception, match=re.escape(REFUSED)) if REFUSED else contextlib.nullcontext()


def fails(message):
    """What is wrong with a call; where the processor has no products, the handlers may say that first."""
    return pytest.raises(Exception, match=f"{message}|{re.escape(REFUSED)}" if REFUSED else message)


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
    with fails(message):
        call("funnel_linear", *arrays, **attributes)
    with the_next_call_is_served():
        assert (call("funnel_linear", OUT, X, PACKED)[0] == 32).all()


@pytest.mark.parametrize(("arrays", "attributes", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_wrong_gated_call_is_an_error_that_says_why(arrays, attributes, message):
    out, x, packed = arrays
    with fails(message):
        call("funnel_gated_linear", out, x, np.concatenate([packed, packed]), **attributes)


TABLE, NORM = np.ones((4, 32), np.float32), np.ones(64, np.float32)
Q, K = (jax.ShapeDtypeStruct((4, count * 64), jnp.float32) for count in (2, 1))
PACKED_HEADS = funnel_native.pack(np.ones((256, 32), np.float32))
BAD_HEADS = {
    "fewer results than groups": ((Q, K), (), {}, "each group of heads needs a result"),
    "more results than groups": ((Q, K, K, K), (), {}, "each group of heads needs a result"),
    "one norm of two": ((Q, K, K), (NORM,), {}, "a norm if another group has one"),
    "a norm of another size": ((Q, K, K), (NORM, NORM[:32]), {}, "a head's norm has shape"),
    "a norm of integers": ((Q, K, K), (NORM, NORM.astype(np.int32)), {}, "a head's norm has shape"),
    "results in another order": ((K, Q, K), (), {}, "heads has shape"),
    "a result of another dtype": ((Q, K, jax.ShapeDtypeStruct(K.shape, jnp.bfloat16)), (), {}, "heads has shape"),
    "heads of half a unit": ((Q, K, K), (), {"head_dim": np.int64(32)}, "must be a multiple of 64"),
    "heads of nothing": ((Q, K, K), (), {"head_dim": np.int64(0)}, "must be a multiple of 64"),
    "negative heads": ((Q, K, K), (), {"heads": np.array([-2, 1])}, "numbers of heads must be positive"),
    "no heads": ((Q, K, K), (), {"heads": np.array([2, 0])}, "numbers of heads must be positive"),
    "negative plain heads": ((Q, K, K), (), {"plain_heads": np.int64(-1)}, "numbers of heads must be positive"),
    "too many heads": ((Q, K, K), (), {"heads": np.array([2**62, 2**62])}, "numbers of heads must be positive"),
    "more heads than weights": ((Q, K, K), (), {"heads": np.array([3, 1])}, "packed weights has shape"),
    "weights of narrower heads": (
        tuple(jax.ShapeDtypeStruct((4, 512), jnp.float32) for _ in range(2)),
        (),
        {"head_dim": np.int64(512), "heads": np.array([1]), "plain_heads": np.int64(1)},
        "packed weights has shape",
    ),
}


def call_heads(outs, norms=(), table=TABLE, packed=PACKED_HEADS, **attributes):
    attributes = {
        "heads": np.array([2, 1]),
        "plain_heads": np.int64(1),
        "head_dim": np.int64(64),
        "eps": np.float32(1e-6),
        "threads": np.int64(0),
    } | attributes
    arrays = (X, packed, table, table, *norms)
    return jax.block_until_ready(jax.ffi.ffi_call("funnel_project_heads", outs)(*arrays, **attributes))


@pytest.mark.parametrize(("outs", "norms", "attributes", "message"), BAD_HEADS.values(), ids=BAD_HEADS)
def test_a_wrong_call_for_heads_is_an_error_that_says_why(outs, norms, attributes, message):
    with fails(message):
        call_heads(outs, norms, **attributes)
    with the_next_call_is_served():
        assert (call_heads((Q, K, K))[2] == 32).all()


ROWS, ROW_NORM = jax.ShapeDtypeStruct((4, 64), jnp.float32), np.ones(64, np.float32)
BAD_ROWS = {
    "nothing to add to": ((ROWS, ROWS), X[0], (ROW_NORM,), "the matrix to add must be a matrix"),
    "fewer rows to add to": ((ROWS, ROWS), np.ones((3, 64), np.float32), (ROW_NORM,), "the matrix to add has shape"),
    "wider rows to add to": ((ROWS, ROWS), np.ones((4, 128), np.float32), (ROW_NORM,), "packed weights has shape"),
    "rows of another dtype": ((ROWS, ROWS), np.ones((4, 64), jnp.bfloat16), (ROW_NORM,), "the matrix to add has shape"),
    "half a unit": ((ROWS, ROWS), np.ones((4, 32), np.float32), (ROW_NORM,), "width of whole rows must be a multiple"),
    "a short norm": ((ROWS, ROWS), X @ np.ones((32, 64), np.float32), (ROW_NORM[1:],), "norm_weight has shape"),
    "a short norm of the update": ((ROWS, ROWS), X @ np.ones((32, 64), np.float32), (ROW_NORM, ROW_NORM[1:]), "update"),
    "three norms": ((ROWS, ROWS), X @ np.ones((32, 64), np.float32), (ROW_NORM,) * 3, "at most one norm"),
    "a small sum": ((Q, ROWS), X @ np.ones((32, 64), np.float32), (ROW_NORM,), "the sum has shape"),
    "a small result": ((ROWS, Q), X @ np.ones((32, 64), np.float32), (ROW_NORM,), "the norm has shape"),
}


@pytest.mark.parametrize(("outs", "add", "norms", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_wrong_call_for_whole_rows_is_an_error_that_says_why(outs, add, norms, message):
    attributes = {"eps": np.float32(1e-6), "threads": np.int64(0)}
    with fails(message):
        jax.block_until_ready(jax.ffi.ffi_call("funnel_linear_add_norm", outs)(X, PACKED, add, *norms, **attributes))
    add = np.arange(256, dtype=np.float32).reshape(4, 64)
    with the_next_call_is_served():
        total, normed = jax.ffi.ffi_call("funnel_linear_add_norm", (ROWS, ROWS))(X, PACKED, add, ROW_NORM, **attributes)
        np.testing.assert_array_equal(total, add + 32)  # by oneDNN since it is float32
        np.testing.assert_allclose((np.asarray(normed) ** 2).mean(1), 4, rtol=1e-5)  # the factor is 2


def test_heads_that_fit_into_no_tile():
    outs = tuple(jax.ShapeDtypeStruct((4, 512), jnp.float32) for _ in range(2))
    sizes = {"head_dim": np.int64(512), "heads": np.array([1]), "plain_heads": np.int64(1)}
    packed = funnel_native.pack(np.ones((1024, 32), np.float32))
    with fails("a whole head, or row, does not fit into a tile"):
        call_heads(outs, table=np.ones((4, 256), np.float32), packed=packed, **sizes)
    with fails("cosines and sines has shape"):
        call_heads((Q, K, K), table=TABLE[:, :31])


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


@pytest.mark.parametrize(
    "limit", [{"FUNNEL_CPU_ISA": "avx512"}, {"FUNNEL_CPU_ISA": "avx2"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}], ids=str
)
def test_without_bfloat16_products_the_product_is_left_to_xla(limit):
    """oneDNN has blocked bfloat16 products from AVX-512-BF16 on; without them the rest of the kernels still run."""
    code = """
import numpy as np, jax.numpy as jnp, funnel_native
from funnel_kernels import PackedWeight, Target, linear, linear_add_norm, prepare
half = np.ones((64, 32), jnp.bfloat16)
auto = Target()
prepared = prepare(half, target=auto)
assert not isinstance(prepared, PackedWeight)
assert (linear(half[:4], prepared, target=auto) == 32).all()
total, _ = linear_add_norm(half[:4], prepared, np.ones((4, 64), jnp.bfloat16), half[:, 0], eps=1e-6, target=auto)
assert (total == 33).all()
packed = funnel_native.pack(np.ones((64, 32), np.float32)).astype(jnp.bfloat16)
for weight in (half, PackedWeight(packed, (64, 32))):
    try:
        linear(half[:4], weight, target=Target("cpu"))
    except Exception as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | limit, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("oneDNN has no blocked product of bfloat16 for this processor") == 2


def test_a_program_that_is_compiled_has_made_all_its_products():
    """oneDNN writes down what it makes: a compiled program that is called makes nothing more."""
    code = """
import sys, jax, jax.numpy as jnp, numpy as np
from funnel_kernels import Target, gated_linear, linear, prepare
cpu = Target("cpu")
weight = np.ones((1000, 96), jnp.float32)
down, gate_up = prepare(weight, target=cpu), prepare(weight, parts=2, target=cpu)
for rows in (1, 16, 300):  # one tile, and tiles of different sizes
    x = jax.ShapeDtypeStruct((rows, 96), jnp.float32)
    both = jax.jit(lambda x: (linear(x, down, target=cpu), gated_linear(x, gate_up, target=cpu)))
    program = both.lower(x).compile()
    if sys.argv[1] == "call":
        jax.block_until_ready(program(np.ones(x.shape, x.dtype)))
"""
    made = {}
    for what in ("compile", "call"):
        environment = os.environ | {"ONEDNN_VERBOSE": "2"}
        done = subprocess.run([sys.executable, "-c", code, what], env=environment, capture_output=True, text=True)
        if reason := no_product("float32"):
            assert reason in done.stderr
            return
        assert done.returncode == 0, done.stderr
        made[what] = done.stdout.count("create:cache_miss,cpu,matmul")
        assert ("exec,cpu,matmul" in done.stdout) == (what == "call")
    assert made["call"] == made["compile"] > 10
