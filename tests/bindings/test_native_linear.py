"""The products in C++ beyond what every backend is tested for: instruction sets, threads, int8, and wrong calls."""

import functools
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funnel_native
from funnel_kernels import PackedWeight, add_norm, gated_linear, linear, linear_add_norm, project_heads
from funnel_kernels.linear import reference
from option_grid import EPS, HeadsCase, LinearAddNormCase, LinearCase, packed_weight, target

HANDLERS = funnel_native.handlers()
BEST = HANDLERS.instruction_set()
UNIT, GROUP = HANDLERS.UNIT, HANDLERS.GROUP
LINE = 64  # bytes; those of an output feature are packed in multiples of it
# The dtypes of x and of the weights.
KINDS = (
    ("float32", "float32"),
    ("float32", "bfloat16"),
    ("bfloat16", "bfloat16"),
    ("float32", "int8"),
    ("bfloat16", "int8"),
)
over_kinds = pytest.mark.parametrize("kind", KINDS, ids=" with ".join)


def by_onednn(kind: tuple[str, str]) -> bool:
    """Whether oneDNN computes products of these dtypes on this processor."""
    return BEST == "amx" and kind not in KINDS[:2]


def weights_of(kind: tuple[str, str]) -> dict[str, str]:
    """Options of a case. Where its product is to be of int8, the case gives float32 weights, see `packed`."""
    return {"dtype": kind[0], "weights": "float32" if kind[1] == "int8" else kind[1]}


def quantized(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values of int8, and the scale of each row."""
    scale = np.abs(weight).max(axis=1) / np.float32(127)
    return np.rint(weight / scale[:, None]).astype(np.int8), scale


def packed(weight: np.ndarray, kind: tuple[str, str], parts: int = 1) -> PackedWeight:
    if kind[1] != "int8":
        return packed_weight(weight, parts)
    values, scale = quantized(weight)
    return PackedWeight(jnp.asarray(funnel_native.pack(values, parts, scale)), weight.shape, parts)


@functools.cache
def program(case: LinearCase, kind: tuple[str, str], threads: int):
    """Compiled once, and its arrays: its kernels run with the instruction set that is allowed when it is called."""
    x, weight, add = case.arrays()
    arrays = (x, packed(weight, kind, case.parts), *(() if add is None else (add,)))
    product = partial(gated_linear, activation=case.gate) if case.gate else linear
    run = jax.jit(lambda *arrays: product(*arrays, target=target("cpu", threads)))
    return run.lower(*arrays).compile(), arrays


def run(case: LinearCase, kind: tuple[str, str], threads: int = 0) -> np.ndarray:
    compiled, arrays = program(case, kind, threads)
    return np.asarray(compiled(*arrays))


TAILS = ((False, None), (True, None), (False, "gelu_tanh"), (False, "silu"), (True, "gelu_tanh"))
CASES = [
    (LinearCase(130, 48, 600, add=add, gate=gate, **weights_of(kind)), kind) for kind in KINDS for add, gate in TAILS
]
over_cases = pytest.mark.parametrize(
    ("case", "kind"), CASES, ids=[f"{case.add}-{case.gate}-{' with '.join(kind)}" for case, kind in CASES]
)


@over_cases
def test_every_instruction_set_rounds_alike(instruction_set, case, kind):
    """What follows the product is the same in all of them: one rounding to bfloat16, gelu to the last place.

    The product too, but for that of bfloat16, which AVX-512-BF16 adds in another order.
    """
    limited = run(case, kind).astype(np.float64)
    HANDLERS.limit_instruction_set(BEST)
    best = run(case, kind).astype(np.float64)
    step = 2**-8 if case.dtype == "bfloat16" and (case.add or case.gate) else 2**-20
    assert np.abs(limited - best).max() <= step * np.abs(best).max()
    assert (limited == best).mean() > 0.99 or case.gate or (kind == ("bfloat16", "bfloat16") and not case.add)


def quantized_product(x: np.ndarray, values: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The product of int8 in float64, and by how much a result may differ.

    A value of x that lies between two integers may be rounded to either of them.
    """
    x, values = x.astype(np.float64), values.astype(np.float64)
    product = allowed = 0.0
    for first in range(0, x.shape[1], GROUP):
        part, weights = x[:, first : first + GROUP], values[:, first : first + GROUP].T
        largest = np.abs(part).max(axis=1, keepdims=True)
        step = np.where(largest < 1e-30, 0, largest / 127)
        quotients = np.divide(part, step, out=np.zeros_like(part), where=step > 0)
        undecided = np.abs(quotients - np.floor(quotients) - 0.5) < 127 * 2**-22
        product += step * (np.rint(quotients) @ weights)
        allowed += step * (undecided @ np.abs(weights))
    return product * scale, allowed * scale


def exact(x: np.ndarray, weight: np.ndarray, kind: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64, and by how much that of the kernels may differ."""
    if kind[1] == "int8":
        product, allowed = quantized_product(x, *quantized(weight))
    else:
        product = x.astype(np.float64) @ weight.astype(np.float64).T
        allowed = np.zeros_like(product)
    return product, allowed + 2e-6 * np.abs(product).max()


COUNTS = (1, 2, 5, 6, 7, 11, 12, 13, 18, 19, 24, 25, 31, 43, 48, 127, 128, 129, 300)


@functools.cache
def any_rows(kind: tuple[str, str], width: int, out: int):
    """A program that multiplies the first rows of x, for each number of COUNTS; its arrays; and what comes out."""
    x, weight, _ = LinearCase(max(COUNTS), width, out, **weights_of(kind)).arrays()
    products = jax.jit(lambda x, weight: [linear(x[:rows], weight, target=target("cpu")) for rows in COUNTS])
    arrays = x, packed(weight, kind)
    return products.lower(*arrays).compile(), arrays, exact(x, weight, kind)


# Input features: odd and even; one; with padding; as many as a pass of a kernel takes, or a group of int8; and more.
WIDTHS = [(1, 70), (32, 64), (33, 130), (80, 130), (96, 200), (256, 64), (257, 70), (1056, 100), (2080, 70)]
over_widths = pytest.mark.parametrize(("width", "out"), WIDTHS)


@over_widths
@over_kinds
def test_any_number_of_rows(instruction_set, kind, width, out):
    """Each row is right, and has the same bits among any number of rows."""
    compiled, arrays, (product, allowed) = any_rows(kind, width, out)
    results = [np.asarray(result) for result in compiled(*arrays)]
    for rows, result in zip(COUNTS, results, strict=True):
        assert (np.abs(result - product[:rows]) <= allowed[:rows]).all(), rows
        if instruction_set != "amx" or not by_onednn(kind):
            np.testing.assert_array_equal(result, results[-1][:rows], err_msg=f"{rows} rows")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_gives_the_same_bits_with_every_instruction_set(instruction_set, dtype):
    """Its sums are integers."""
    for width, out in WIDTHS:
        compiled, arrays, _ = any_rows((dtype, "int8"), width, out)
        limited = np.asarray(compiled(*arrays)[-1])  # waits, because the set may not change during a call
        HANDLERS.limit_instruction_set("avx2")
        np.testing.assert_array_equal(limited, compiled(*arrays)[-1])
        HANDLERS.limit_instruction_set(instruction_set)


@over_cases
def test_results_are_equal_to_the_bit_from_run_to_run(case, kind):
    """And with one and two threads, if the tiles are our own."""
    first = run(case, kind, 1)
    for threads in (1, 2):
        expected = run(case, kind, threads) if by_onednn(kind) else first
        assert all((run(case, kind, threads) == expected).all() for _ in range(5))


SLICES = ((0, 800), (0, 1), (5, 7), (3, 15), (100, 148), (7, 136), (1, 130), (200, 400), (1, 799))
OPTIONAL = {"linear": "add", "gated_linear": "up"}  # the array that an op may have after x and weight
OPS = ("linear", "gated_linear", "gated_linear_up", "linear_add_norm", "project_heads")


@functools.cache
def sliced(op: str, kind: tuple[str, str]):
    """A program of an op on each of SLICES of the rows of its arrays, and these; then the same of the reference, which
    takes the first slice, and x and weights as the kernels round them."""
    options = {}
    if op == "project_heads":
        case = HeadsCase(800, 384, 128, (3, 1), 1, normed=2, **weights_of(kind))
        x, weight, *by_row, norms = case.arrays()
        options = case.options() | {"norms": norms}
    elif op == "gated_linear_up":
        x, weight, *by_row = LinearCase(800, 384, 600, add=True, gate="gelu_tanh", **weights_of(kind)).arrays()
        op, options = "gated_linear", {"activation": "gelu_tanh"}
    elif op == "linear_add_norm":
        x, weight, *by_row, norm, update_norm, scale = LinearAddNormCase(
            800, 384, 384, normed=True, scaled=True, **weights_of(kind)
        ).arrays()
        options = {"norm_weight": norm, "update_weight": update_norm, "scale": scale, "eps": EPS}
    else:
        x, weight, _ = LinearCase(
            800, 384, 600, gate="gelu_tanh" if op == "gated_linear" else None, **weights_of(kind)
        ).arrays()
        by_row = []
        options = {"activation": "gelu_tanh"} if op == "gated_linear" else {}
    arrays = (x, packed(weight, kind, 1 + (op == "gated_linear" and not by_row)), *by_row)
    function = globals()[op]

    def run(x, weight, *by_row):
        parts = (slice(*rows) for rows in SLICES)
        return [
            function(x[part], weight, *(array[part] for array in by_row), **options, target=target("cpu", 2))
            for part in parts
        ]

    rounded = (x, weight)
    if kind[1] == "int8":
        values, scale = quantized(weight)
        rounded = quantized_rows(x.astype(np.float32)), values * scale[:, None]
    expected = getattr(reference, op)(
        *rounded, *by_row, **options | ({name: None} if (name := OPTIONAL.get(op)) and not by_row else {})
    )
    return jax.jit(run).lower(*arrays).compile(), arrays, as_list(expected)


def quantized_rows(x: np.ndarray) -> np.ndarray:
    """Each group of x as the kernels round it, in float32."""
    groups = [x[:, first : first + GROUP] for first in range(0, x.shape[1], GROUP)]
    largest = [np.abs(group).max(axis=1, keepdims=True) for group in groups]
    rounded = [np.rint(group * (127 / most)) * (most / 127) for group, most in zip(groups, largest, strict=True)]
    return np.concatenate(rounded, axis=1)


def as_list(results) -> list[np.ndarray]:
    return [np.asarray(result, np.float64) for result in (results if isinstance(results, tuple) else (results,))]


@over_kinds
@pytest.mark.parametrize("op", OPS)
def test_every_op_agrees_with_the_reference(instruction_set, op, kind):
    compiled, arrays, expected = sliced(op, kind)
    check_op(as_list(compiled(*arrays)[0]), expected, kind)


def check_op(results: list[np.ndarray], expected: list[np.ndarray], kind: tuple[str, str]) -> None:
    step = 2**-7 if kind[0] == "bfloat16" else 2**-18
    for result, right in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, right, rtol=0, atol=step * np.abs(right).max())


@over_kinds
@pytest.mark.parametrize("op", OPS)
def test_a_row_has_the_same_bits_among_any_number_of_rows(instruction_set, op, kind):
    """Whatever tile it is in: of one row or many, of few columns or whole rows."""
    if instruction_set == "amx" and by_onednn(kind):
        pytest.skip("oneDNN makes these products with AMX")
    compiled, arrays, _ = sliced(op, kind)
    results = [as_list(result) for result in compiled(*arrays)]
    for (first, last), result in zip(SLICES, results, strict=True):
        for part, all_rows in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(part, all_rows[first:last], err_msg=f"rows {first} to {last}")


# Rows and threads. The last five cut rows into fewer tiles than there were to be, because a tile has whole rows.
SUMS = ((383, 1), (384, 1), (385, 1), (2000, 2), (2000, 20))
SUMS += ((4993, 13), (4994, 13), (4995, 13), (8192, 20), (6913, 18))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("rows", "threads", "kind"),
    [
        (*sizes, kind)
        for sizes in SUMS
        for kind in KINDS
        if kind == KINDS[2] or sizes in ((383, 1), (384, 1), (4994, 13))
    ],
)
def test_a_sum_and_its_norm_are_the_same_with_the_product_and_after_it(rows, threads, kind, normed):
    """Every thread needs 384 rows, for the product to make whole ones."""
    case = LinearAddNormCase(rows, 96, 128, normed=normed, **weights_of(kind))
    x, weight, add, norm_weight, update_weight, _ = case.arrays()
    weight = packed(weight, kind)
    options = {"update_weight": update_weight, "eps": EPS, "target": target(threads=threads)}
    expected = add_norm(add, linear(x, weight, target=target()), norm_weight, **options)
    program = jax.jit(lambda *a: linear_add_norm(*a, **options)).lower(x, weight, add, norm_weight)
    for ours, two_ops in zip(program.compile()(x, weight, add, norm_weight), expected, strict=True):
        np.testing.assert_array_equal(ours, two_ops)
    with_product = HANDLERS.suits_whole_rows(rows, *weight.shape, kind[1], threads)
    assert ("funnel_linear_add_norm" in program.as_text()) == with_product == (rows >= 384 * threads)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_which_products_make_whole_rows(dtype, size):
    """Those whose weights take half of the shared cache, and 48 of their float32 rows 3/2 of a core's own."""
    caches = HANDLERS.caches()
    columns = caches["core"] * 3 // 2 // (48 * 4)
    assert HANDLERS.suits_whole_rows(10**4, columns, 32, dtype, 2)
    assert not HANDLERS.suits_whole_rows(10**4, columns + 64, 32, dtype, 2)
    assert not HANDLERS.suits_whole_rows(10**4, columns - 48, 32, dtype, 2)  # half a unit
    half = caches["shared"] // 2 // size
    width = max(width for width in range(64, half // 2048 + 1, 64) if HANDLERS.packed_size(2048, width, dtype) <= half)
    assert width * 2048 > half * 0.9
    assert HANDLERS.suits_whole_rows(10**4, 2048, width, dtype, 2)
    assert not HANDLERS.suits_whole_rows(10**4, 2048, width + 64, dtype, 2)


HEADS = [
    (HeadsCase(300, 96, 128, (5, 1), 1, normed=normed, **weights_of(kind)), kind)
    for kind in KINDS
    for normed in (0, 2, 3)
]
over_heads = pytest.mark.parametrize(
    ("case", "kind"), HEADS, ids=[f"{case.normed}-{' with '.join(kind)}" for case, kind in HEADS]
)


@functools.cache
def heads_program(case: HeadsCase, kind: tuple[str, str], threads: int):
    x, weight, *rest = case.arrays()
    run = jax.jit(lambda *arrays: project_heads(*arrays, **case.options(), target=target("cpu", threads)))
    arrays = x, packed(weight, kind), *rest
    return run.lower(*arrays).compile(), arrays


def run_heads(case: HeadsCase, kind: tuple[str, str], threads: int = 0) -> np.ndarray:
    """All groups side by side."""
    compiled, arrays = heads_program(case, kind, threads)
    return np.concatenate([np.asarray(group, np.float64) for group in compiled(*arrays)], axis=1)


@over_heads
def test_every_instruction_set_finishes_heads_alike(instruction_set, case, kind):
    limited = run_heads(case, kind)
    HANDLERS.limit_instruction_set(BEST)
    step = 2**-8 if case.dtype == "bfloat16" else 2**-20
    assert np.abs(limited - run_heads(case, kind)).max() <= step * np.abs(limited).max()


@over_heads
def test_heads_are_equal_to_the_bit_with_any_number_of_threads(case, kind):
    first = run_heads(case, kind, 1)
    for threads in (1, 2, 3, 2):
        assert (run_heads(case, kind, threads) == first).all()


def test_many_threads_at_once():
    """Calls from several threads share one pool and the table of products."""
    from concurrent.futures import ThreadPoolExecutor

    for kind in (("bfloat16", "bfloat16"), ("float32", "int8")):
        case = LinearCase(67, 112, 200, gate="gelu_tanh", **weights_of(kind))  # a shape that no other test has
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda _, case=case, kind=kind: run(case, kind), range(24)))
        assert all((result == results[0]).all() for result in results)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_special_values_of_x_in_int8(instruction_set, dtype):
    """What is not finite spoils its own row and no other. A group of zeros, or of numbers below 1e-30, gives 0."""
    width, out = 2 * GROUP + 88, 70
    x, weight, _ = LinearCase(16, width, out, **weights_of((dtype, "int8"))).arrays()
    x[0, 5], x[1, GROUP], x[2, -1], x[3, 2 * GROUP - 1] = np.nan, np.inf, -np.inf, -np.nan
    x[4] = 0
    x[5, :GROUP], x[6, GROUP : 2 * GROUP], x[7, 2 * GROUP :] = 0, 0, -0.0
    tiny, small = np.asarray([0.98e-30, 1.05e-30], x.dtype)
    x[8], x[8, GROUP] = -tiny, 0
    x[9, :GROUP], x[10, GROUP:] = tiny, 1e-38
    x[11] = x[11] * small / np.abs(x[11]).max()
    x[12] *= np.asarray(1e30, x.dtype)
    compiled, packed_int8 = special_program(dtype, width, out)
    result = np.asarray(compiled(x, packed_int8))
    assert not np.isfinite(result[:4]).any()
    assert (result[[4, 8]] == 0).all()
    product, allowed = quantized_product(x[4:], *quantized(weight))
    sizes = np.abs(product).max(axis=1, keepdims=True)
    assert (np.abs(result[4:] - product) <= allowed + 2e-6 * sizes).all()
    assert (sizes[[0, 4]] == 0).all()
    assert (sizes[[1, 2, 3, 5, 6, 7, 8]] > 0).all()


@functools.cache
def special_program(dtype: str, width: int, out: int):
    x, weight, _ = LinearCase(16, width, out, **weights_of((dtype, "int8"))).arrays()
    weight = packed(weight, (dtype, "int8"))
    return jax.jit(lambda x, weight: linear(x, weight, target=target("cpu"))).lower(x, weight).compile(), weight


def test_whole_units_of_int8_weights_can_be_taken():
    kind = ("float32", "int8")
    x, weight, _ = LinearCase(5, 300, 300, **weights_of(kind)).arrays()
    whole = packed(weight, kind)
    for rows in (slice(0, 128), slice(64, 192), slice(256, None)):
        part = linear(x, whole[rows], target=target("cpu"))
        np.testing.assert_array_equal(part, linear(x, whole, target=target("cpu"))[:, rows])


@pytest.fixture
def prefer_onednn():
    """oneDNN computes what it would on a processor with AMX."""
    if BEST not in ("avx512_bf16", "amx"):
        pytest.skip("oneDNN's products of bfloat16 need AVX-512-BF16")
    HANDLERS.prefer_onednn(True)
    yield
    HANDLERS.prefer_onednn(False)


over_onednn = pytest.mark.parametrize("kind", KINDS[2:], ids=" with ".join)


@over_widths
@over_onednn
def test_any_number_of_rows_by_onednn(prefer_onednn, kind, width, out):
    compiled, arrays, (product, allowed) = any_rows(kind, width, out)
    for rows, result in zip(COUNTS, compiled(*arrays), strict=True):
        assert (np.abs(result - product[:rows]) <= allowed[:rows]).all(), rows


@over_onednn
@pytest.mark.parametrize("op", OPS)
def test_every_op_by_onednn(prefer_onednn, op, kind):
    """Whole rows too: 800 are enough for them. Sums of int8 are integers, so that every bit is that of our kernels."""
    compiled, arrays, expected = sliced(op, kind)
    results = [as_list(result) for result in compiled(*arrays)]
    check_op(results[0], expected, kind)
    assert op != "linear_add_norm" or "funnel_linear_add_norm" in compiled.as_text()
    HANDLERS.prefer_onednn(False)
    ours = [as_list(result) for result in compiled(*arrays)]
    for result, our_result in zip(results, ours, strict=True):
        check_op(result, our_result, kind)
        assert kind[1] != "int8" or all(map(np.array_equal, result, our_result))


X, PACKED = np.ones((4, 32), np.float32), funnel_native.pack(np.ones((64, 32), np.float32))
PACKED_INT8 = funnel_native.pack(np.ones((64, 32), np.int8), scale=np.ones(64, np.float32))


PLAIN = {"biased": np.bool_(False), "activation": np.int64(-1)}  # a product and nothing after it


GATE = {"biased": np.bool_(False), "activation": np.int64(0)}


def call(target, out, *arrays, **attributes):
    attributes = {"out_features": np.int64(64), "threads": np.int64(0)} | attributes
    return jax.block_until_ready(jax.ffi.ffi_call(target, out)(*arrays, **attributes))


OUT = jax.ShapeDtypeStruct((4, 64), jnp.float32)
UP = np.full((4, 64), 2, np.float32)
BIAS = np.full(64, 3, np.float32)
WEIGHTS = "packed weights must be int8 or bfloat16, or float32 if x is float32"
BAD_CALLS = {
    "x is a vector": ((OUT, X[0], PACKED), {}, "x must be a matrix"),
    "x is float16": ((OUT, X.astype(np.float16), PACKED), {}, "x must be a matrix of float32 or bfloat16"),
    "x is int32": ((OUT, X.astype(np.int32), PACKED), {}, "x must be a matrix of float32"),
    "weights of another width": ((OUT, X[:, :16], PACKED), {}, "packed weights has shape"),
    "weights cut short": ((OUT, X, PACKED[:-1]), {}, "packed weights has shape"),
    "weights of another dtype": ((OUT, X, PACKED.astype(np.float16)), {}, WEIGHTS),
    "weights of integers": ((OUT, X, PACKED.astype(np.int32)), {}, WEIGHTS),
    "weights of uint8": ((OUT, X, PACKED_INT8.view(np.uint8)), {}, WEIGHTS),
    "float32 weights for bfloat16": ((OUT, X.astype(jnp.bfloat16), PACKED), {}, WEIGHTS),
    "int8 cut short": ((OUT, X, PACKED_INT8[:-1]), {}, "packed weights has shape"),
    "int8 without scales": ((OUT, X, PACKED_INT8[: 64 * 64]), {}, "packed weights has shape"),
    "int8 of another width": ((OUT, np.ones((4, 65), np.float32), PACKED_INT8), {}, "packed weights has shape"),
    "int8 of more groups": ((OUT, np.ones((4, 257), np.float32), PACKED_INT8), {}, "packed weights has shape"),
    "int8 for x of int8": ((OUT, X.astype(np.int8), PACKED_INT8), {}, "x must be a matrix of float32"),
    "int8 for x of float16": ((OUT, X.astype(np.float16), PACKED_INT8), {}, "x must be a matrix of float32"),
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
    "no bias": ((OUT, X, PACKED), {"biased": np.bool_(True)}, "the bias is missing"),
    "a short bias": ((OUT, X, PACKED, BIAS[1:]), {"biased": np.bool_(True)}, "bias has shape"),
    "a bias of bfloat16": ((OUT, X, PACKED, BIAS.astype(jnp.bfloat16)), {"biased": np.bool_(True)}, "bias has shape"),
    "a bias and two sums": ((OUT, X, PACKED, BIAS, UP, UP), {"biased": np.bool_(True)}, "adds at most one"),
    "an unknown activation": ((OUT, X, PACKED), {"activation": np.int64(2)}, "there is no such activation"),
    "a negative activation": ((OUT, X, PACKED), {"activation": np.int64(-2)}, "there is no such activation"),
}


@pytest.mark.parametrize(("arrays", "attributes", "message"), (BAD_CALLS | BAD_SUMS).values(), ids=BAD_CALLS | BAD_SUMS)
def test_a_wrong_call_is_an_error_that_says_why(arrays, attributes, message):
    with pytest.raises(Exception, match=message):
        call("funnel_linear", *arrays, **PLAIN | attributes)
    for packed in (PACKED, PACKED_INT8):
        assert (call("funnel_linear", OUT, X, packed, **PLAIN)[0] == 32).all()
        assert (call("funnel_linear", OUT, X, packed, BIAS, **PLAIN | {"biased": np.bool_(True)})[0] == 35).all()


@pytest.mark.parametrize(("arrays", "attributes", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_wrong_gated_call_is_an_error_that_says_why(arrays, attributes, message):
    out, x, packed = arrays
    with pytest.raises(Exception, match=message):
        call("funnel_gated_linear", out, x, np.concatenate([packed, packed]), **GATE | attributes)
    with pytest.raises(Exception, match=message):
        call("funnel_gated_linear", out, x, packed, UP, **GATE | attributes)


@pytest.mark.parametrize(
    ("extras", "biased", "message"),
    [
        ((UP[:, 1:],), False, "the second factor has shape"),
        ((UP[1:],), False, "the second factor has shape"),
        ((UP.astype(jnp.bfloat16),), False, "the second factor has shape"),
        ((UP, UP), False, "at most one second factor"),
        ((), False, "packed weights has shape"),
        ((), True, "packed weights has shape"),
        ((BIAS[1:], UP), True, "bias has shape"),
        ((UP, BIAS), True, "bias has shape"),
        ((BIAS, UP, UP), True, "at most one second factor"),
    ],
)
def test_a_wrong_second_factor_or_bias_is_an_error_that_says_why(extras, biased, message):
    with pytest.raises(Exception, match=message):
        call("funnel_gated_linear", OUT, X, PACKED, *extras, **GATE | {"biased": np.bool_(biased)})
    assert (call("funnel_gated_linear", OUT, X, PACKED, UP, **GATE) == 64).all()
    assert (call("funnel_gated_linear", OUT, X, PACKED, BIAS, UP, **GATE | {"biased": np.bool_(True)}) == 70).all()


TABLE, NORM = np.ones((4, 32), np.float32), np.ones(64, np.float32)
Q, K = (jax.ShapeDtypeStruct((4, count * 64), jnp.float32) for count in (2, 1))
PACKED_HEADS = funnel_native.pack(np.ones((256, 32), np.float32))
BAD_HEADS = {
    "fewer results than groups": ((Q, K), (), {}, "each group of heads needs a result"),
    "more results than groups": ((Q, K, K, K), (), {}, "each group of heads needs a result"),
    "one norm of two": ((Q, K, K), (NORM,), {"normed": np.array([1, 1, 0])}, "a norm if `normed` says so"),
    "normed for two results": ((Q, K, K), (NORM,), {"normed": np.array([1, 0])}, "a norm if `normed` says so"),
    "no bias": ((Q, K, K), (), {"biased": np.bool_(True)}, "the bias is missing"),
    "a norm as the bias": ((Q, K, K), (NORM,), {"biased": np.bool_(True)}, "bias has shape"),
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
        "biased": np.bool_(False),
        "normed": np.array([int(index < len(norms)) for index in range(len(outs))]),
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
    with pytest.raises(Exception, match=message):
        call_heads(outs, norms, **attributes)
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
    attributes = {name: np.bool_(False) for name in ("biased", "scaled")}
    attributes |= {"eps": np.float32(1e-6), "threads": np.int64(0)}
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(jax.ffi.ffi_call("funnel_linear_add_norm", outs)(X, PACKED, add, *norms, **attributes))
    add = np.arange(256, dtype=np.float32).reshape(4, 64)
    total, normed = jax.ffi.ffi_call("funnel_linear_add_norm", (ROWS, ROWS))(X, PACKED, add, ROW_NORM, **attributes)
    np.testing.assert_array_equal(total, add + 32)
    np.testing.assert_allclose((np.asarray(normed) ** 2).mean(1), 4, rtol=1e-5)  # the factor is 2
    attributes["biased"] = np.bool_(True)
    run = jax.ffi.ffi_call("funnel_linear_add_norm", (ROWS, ROWS))
    np.testing.assert_array_equal(run(X, PACKED, add, ROW_NORM, BIAS, **attributes)[0], add + 35)
    for extras, wrong in (((), "the bias is missing"), ((BIAS[1:],), "bias has shape")):
        with pytest.raises(Exception, match=wrong):
            jax.block_until_ready(run(X, PACKED, add, ROW_NORM, *extras, **attributes))


def test_heads_that_are_wider_than_other_tiles():
    outs = tuple(jax.ShapeDtypeStruct((4, 512), jnp.float32) for _ in range(2))
    sizes = {"head_dim": np.int64(512), "heads": np.array([1]), "plain_heads": np.int64(1)}
    packed = funnel_native.pack(np.ones((1024, 32), np.float32))
    assert (call_heads(outs, table=np.ones((4, 256), np.float32), packed=packed, **sizes)[1] == 32).all()
    with pytest.raises(Exception, match="cosines and sines has shape"):
        call_heads((Q, K, K), table=TABLE[:, :31])


def transposed(weight: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """A weight as the products read it, in words of 4 bytes: [units, words, UNIT]; of int8 with scales and offsets."""
    (rows, width), per_line = weight.shape, LINE // weight.dtype.itemsize
    units = -(-rows // UNIT)
    padded = np.pad(weight, ((0, units * UNIT - rows), (0, -width % per_line)))
    words = [padded.view(np.uint32).reshape(units, UNIT, -1)]
    if scale is not None:
        sums = np.add.reduceat(padded, range(0, width, GROUP), axis=1, dtype=np.int32)
        words.append(np.pad(scale, (0, units * UNIT - rows)).view(np.uint32).reshape(units, UNIT, 1))
        words.append((-128 * sums).view(np.uint32).reshape(units, UNIT, -1))
    return np.concatenate(words, axis=2).swapaxes(1, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_packed_weight_is_a_transposition(dtype):
    generator = np.random.default_rng(0)
    for rows, width in ((1, 1), (64, 32), (70, 33), (130, 255), (65, 256), (200, 257), (63, 700)):
        for parts in (1, 2):
            shape = parts * rows, width
            if dtype == "int8":
                weight, scale = (
                    generator.integers(-127, 128, shape, np.int8),
                    generator.random(parts * rows, np.float32),
                )
            else:
                weight, scale = generator.standard_normal(shape).astype(jnp.dtype(dtype)), None
            expected = [
                transposed(weight[first : first + rows], None if scale is None else scale[first : first + rows])
                for first in range(0, parts * rows, rows)
            ]
            packed = funnel_native.pack(weight, parts, scale)
            assert packed.dtype == weight.dtype
            assert packed.size == parts * HANDLERS.packed_size(rows, width, dtype)
            np.testing.assert_array_equal(packed.view(np.uint32), np.concatenate([part.ravel() for part in expected]))


def test_what_cannot_be_packed():
    weight, scale = np.ones((6, 4), np.float32), np.ones(6, np.float32)
    values = weight.astype(np.int8)
    for wrong, parts, scales, message in (
        (weight[0], 1, None, "contiguous matrix"),
        (weight.astype(np.float16), 1, None, "not float16"),
        (values.view(np.uint8), 1, None, "not uint8"),
        (weight.T, 1, None, "contiguous matrix"),
        (weight, 4, None, r"shape \(6, 4\) cannot be packed in 4 parts"),
        (weight, 0, None, "cannot be packed in 0 parts"),
        (weight[:0], 1, None, "cannot be packed"),
        (weight[:, :0], 1, None, "cannot be packed"),
        (weight, 1, scale, "a weight of float32 has no scale"),
        (values, 1, None, "a weight of int8 needs a scale for each row"),
        (values, 1, scale[:5], r"scale is float32 \(5,\); it must be float32 \(6,\)"),
        (values, 1, scale.astype(np.float64), "scale is float64"),
    ):
        with pytest.raises(ValueError, match=message):
            funnel_native.pack(np.asarray(wrong, order="K"), parts, scales)


@pytest.mark.parametrize(
    "limit", [{"FUNNEL_CPU_ISA": "avx512"}, {"FUNNEL_CPU_ISA": "avx2"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}], ids=str
)
def test_whatever_the_limit_products_are_ours(limit):
    """In bfloat16 too, which they multiply in float32 where the processor does not."""
    code = """
import numpy as np, jax, jax.numpy as jnp
from funnel_kernels import PackedWeight, Target, linear, linear_add_norm, prepare
half = np.ones((64, 32), jnp.bfloat16)
for target in (Target(), Target("cpu")):
    prepared = prepare(half, target=target)
    assert isinstance(prepared, PackedWeight)
    assert (linear(half[:4], prepared, target=target) == 32).all()
    total, _ = linear_add_norm(half[:4], prepared, np.ones((4, 64), jnp.bfloat16), half[:, 0], eps=1e-6, target=target)
    assert (total == 33).all()
    assert "dot_general" not in jax.jit(lambda x, w: linear(x, w, target=target)).lower(half[:4], prepared).as_text()
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | limit, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_program_that_is_compiled_has_made_all_its_products():
    """oneDNN writes down what it makes: a compiled program that is called makes nothing more. Without AMX it makes none
    unless it is preferred."""
    code = """
import sys, jax, jax.numpy as jnp, numpy as np, funnel_native
from functools import partial
from funnel_kernels import PackedWeight, Target, gated_linear, linear, prepare
cpu = Target("cpu")
funnel_native.handlers().prefer_onednn(sys.argv[2] == "True")
weight = np.ones((1000, 300), jnp.bfloat16)
down, gate_up = prepare(weight, target=cpu), prepare(weight, parts=2, target=cpu)
values = funnel_native.pack(weight.astype(np.int8), scale=np.ones(1000, np.float32))
int8 = PackedWeight(jnp.asarray(values), weight.shape)
for rows in (1, 16, 300):  # one tile, and tiles of different sizes
    x = jax.ShapeDtypeStruct((rows, 300), jnp.bfloat16)
    products = (linear, down), (linear, int8), (partial(gated_linear, activation="silu"), gate_up)
    program = jax.jit(lambda x: [product(x, packed, target=cpu) for product, packed in products]).lower(x).compile()
    if sys.argv[1] == "call":
        jax.block_until_ready(program(np.ones(x.shape, x.dtype)))
"""
    made = {}
    for what, preferred in (("compile", True), ("call", True), ("call", False)):
        environment = os.environ | {"ONEDNN_VERBOSE": "2"}
        command = [sys.executable, "-c", code, what, str(preferred)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made[what, preferred] = done.stdout.count("create:cache_miss,cpu,matmul")
        used = BEST == "amx" or (preferred and BEST == "avx512_bf16")
        assert ("exec,cpu,matmul" in done.stdout) == (used and what == "call")
        assert "matmul,ref" not in done.stdout  # which is a thousand times slower
        assert (made[what, preferred] > 10) == used
    assert made["call", True] == made["compile", True]
