"""The C++ kernels on whole rows beyond what every backend is tested for: instruction sets, threads, and wrong calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funnel_kernels import Target, add_norm, pool_norm, post_norm, recover_norm
from option_grid import EPS, AddNormCase, PoolCase, PostNormCase, RecoverCase, target


def results(case, target: Target, *arrays) -> list[jax.Array]:
    if isinstance(case, AddNormCase):
        *arrays, update_weight, scale = arrays
        return [*add_norm(*arrays, update_weight=update_weight, scale=scale, eps=EPS, target=target)]
    if isinstance(case, PostNormCase):
        return [post_norm(*arrays, eps=EPS, target=target)]
    op = pool_norm if isinstance(case, PoolCase) else recover_norm
    return jax.tree.leaves(op(*arrays, **case.options(), target=target))


@functools.cache
def program(case, threads: int):
    """Compiled once: its kernels run with the instruction set that is allowed when it is called."""
    return jax.jit(functools.partial(results, case, target("cpu", threads))).lower(*case.arrays()).compile()


def run(case, threads: int = 0) -> list[np.ndarray]:
    return [np.asarray(result) for result in program(case, threads)(*case.arrays())]


# Widths of less than a vector, and of blocks of vectors, more vectors and a part of one.
CASES = {
    case
    for width in (7, 300)
    for dtype, other in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))
    for case in (
        *(PoolCase(3, pool, dtype, width=width) for pool in ("max", "mean", "first")),
        *(RecoverCase(3, mode, "before_norm", dtype, other, width=width) for mode in ("tile", "sum", "mean", "max")),
        *(RecoverCase(2, mode, "after_norm", dtype, other, width=width) for mode in ("sum", "mean", "max")),
        *(AddNormCase(update, dtype, other, width=width) for update in ("none", "plain", "normed")),
        *(AddNormCase(update, dtype, other, width=width, scaled=True) for update in ("plain", "normed")),
        *(PostNormCase(updated, dtype, other, width=width) for updated in (True, False)),
    )
}


@functools.cache
def reference(case) -> list[np.ndarray]:
    return [np.asarray(result) for result in results(case, target("reference"), *case.arrays())]


def test_every_instruction_set_agrees_with_the_reference(instruction_set):
    for case in CASES:
        for result, expected in zip(run(case), reference(case), strict=True):
            assert result.dtype == expected.dtype
            step = 2**-7 if result.dtype == jnp.bfloat16 else 4e-6
            result, expected = result.astype(np.float64), expected.astype(np.float64)
            assert (np.abs(result - expected) <= step * np.maximum(np.abs(expected), 1)).all(), case


LARGE = [
    PoolCase(2, "mean", "bfloat16", windows=301, width=640),
    RecoverCase(3, "sum", "after_norm", "bfloat16", "float32", windows=203, width=640),
    AddNormCase("normed", "bfloat16", "float32", rows=307, width=640),
    AddNormCase("none", "float32", rows=307, width=640),
    PostNormCase(True, "bfloat16", "float32", rows=307, width=640),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_results_do_not_depend_on_threads_to_the_bit(case):
    """Several parts, the last of them smaller."""
    alone = run(case, threads=1)
    for threads in (2, 2, 2, 0):
        for result, expected in zip(run(case, threads=threads), alone, strict=True):
            np.testing.assert_array_equal(result, expected)


def of_windows(array: np.ndarray | None, windows: int, first: int, last: int) -> np.ndarray | None:
    """The rows of an array that belong to some of its windows; a weight has none, and stays as it is."""
    if array is None or len(array) % windows:
        return array
    rows = len(array) // windows
    return array[first * rows : last * rows]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_a_row_has_the_same_bits_among_any_number_of_rows(case):
    windows = case.rows if isinstance(case, AddNormCase | PostNormCase) else case.windows
    for first, last in ((0, 1), (5, 7), (11, windows)):
        alone = results(case, target("cpu"), *(of_windows(array, windows, first, last) for array in case.arrays()))
        for result, together in zip(alone, run(case), strict=True):
            np.testing.assert_array_equal(result, of_windows(together, windows, first, last))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_is_to_the_nearest_and_to_even(instruction_set, dtype):
    """A sum of float32 and 0 is rounded as ml_dtypes rounds it: ties, the largest values, infinities and NaN."""
    ties = np.arange(0x3F7F7000, 0x3F819000, 0x800, np.uint32).view(np.float32)
    edges = np.array([0, 1e-40, 3.38e38, 3.4e38, np.inf, np.nan, 1 + 2**-8, 1 + 2**-7 + 2**-8], np.float32)
    update = np.concatenate([ties, -ties, edges, -edges])[None]
    x = np.zeros(update.shape, jnp.dtype(dtype))
    total, _ = add_norm(x, update, np.zeros(update.shape[1], np.float32), eps=1e-6, target=target("cpu"))
    total, expected = np.asarray(total, np.float32), update.astype(jnp.dtype(dtype)).astype(np.float32)
    np.testing.assert_array_equal(total[np.abs(expected) > 1e-38], expected[np.abs(expected) > 1e-38])
    assert np.abs(total[np.abs(expected) <= 1e-38]).max() <= 1e-38  # the hardware's rounding may flush them to 0
    assert np.isnan(total[np.isnan(expected)]).all()


X, WEIGHT = np.ones((6, 32), np.float32), np.ones(32, np.float32)
REAL = np.ones(6, bool)
NORM = {"eps": np.float32(1e-6), "threads": np.int64(0)}
POOL = {**NORM, "stride": np.int64(2), "pooling": np.int64(0)}
RECOVER = {**NORM, "stride": np.int64(2), "mode": np.int64(1), "after_norm": np.bool_(False)}


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


# What is right: target -> (results, arrays, attributes). Every wrong call below changes one thing of it.
RIGHT = {
    "funnel_norm": ((shape(6, 32),), (X, WEIGHT), NORM),
    "funnel_add_norm": ((shape(6, 32), shape(6, 32)), (X, X, WEIGHT, WEIGHT), {**NORM, "scaled": np.bool_(False)}),
    "funnel_pool_norm": ((shape(3, 32), shape(3, 32)), (X, REAL, WEIGHT), POOL),
    "funnel_post_norm": ((shape(6, 32),), (X, WEIGHT, 2 * WEIGHT, X), NORM),
    "funnel_recover_norm": ((shape(12, 32),), (X, WEIGHT, np.ones((12, 32), np.float32)), RECOVER),
}


def call(target, results, arrays, attributes):
    return jax.block_until_ready(jax.ffi.ffi_call(target, results)(*arrays, **attributes))


def with_result(index, result):
    return lambda results, arrays, options: ((*results[:index], result, *results[index + 1 :]), arrays, options)


def with_array(index, array):
    return lambda results, arrays, options: (results, (*arrays[:index], array, *arrays[index + 1 :]), options)


def with_option(name, value):
    return lambda results, arrays, options: (results, arrays, options | {name: value})


def with_arrays(count, *more):
    return lambda results, arrays, options: (results, (*arrays[:count], *more), options)


def scaled(*scales):
    return lambda results, arrays, options: (results, (*arrays, *scales), options | {"scaled": np.bool_(True)})


HALF = X.astype(np.float16)
WRONG_X = {
    "x is a vector": (with_array(0, X[0]), "must be a matrix"),
    "x has three axes": (with_array(0, X[None]), "must be a matrix"),
    "x is float16": (with_array(0, HALF), "must be a matrix of float32 or bfloat16"),
    "x is int32": (with_array(0, X.astype(np.int32)), "must be a matrix of float32 or bfloat16"),
    "x has no rows": (with_array(0, X[:0]), "at least one element"),
    "x has no columns": (with_array(0, X[:, :0]), "at least one element"),
    "a result of integers": (with_result(0, shape(6, 32, dtype=jnp.int32)), "must"),
    "a result that is too small": (with_result(0, shape(2, 32)), "must|stride"),
    "a result that is too narrow": (with_result(0, shape(6, 31)), "has shape|stride"),
    "a result of another dtype": (with_result(0, shape(6, 32, dtype=jnp.bfloat16)), "dtype|stride"),
    "eps of another type": (with_option("eps", np.int64(0)), "expected F32"),
}
ADD = "funnel_add_norm"
POOLED = "funnel_pool_norm"
POST = "funnel_post_norm"
RECOVERED = "funnel_recover_norm"
WRONG = {
    **{f"{target}: {name}": (target, *wrong) for target in RIGHT for name, wrong in WRONG_X.items()},
    "norm: short weight": ("funnel_norm", with_array(1, WEIGHT[:31]), "weight has shape"),
    "norm: weight is float16": ("funnel_norm", with_array(1, WEIGHT.astype(np.float16)), "weight has shape"),
    "add: short update": (ADD, with_array(1, X[:5]), "update has shape"),
    "add: update is float16": (ADD, with_array(1, HALF), "update has shape"),
    "add: update is narrower than x": (ADD, with_array(1, X.astype(jnp.bfloat16)), "update has shape"),
    "add: short weight": (ADD, with_array(2, WEIGHT[:31]), "weight has shape"),
    "add: short weight of the update": (ADD, with_array(3, WEIGHT[:31]), "update_weight has shape"),
    "add: two weights of the update": (ADD, with_arrays(4, WEIGHT), "at most one norm"),
    "add: no scale": (ADD, with_option("scaled", np.bool_(True)), "scale has shape"),
    "add: scaled": (ADD, scaled(WEIGHT[:2]), "scale has shape"),
    "add: scaled by float16": (ADD, scaled(WEIGHT[:1].astype(np.float16)), "scale has shape"),
    "add: two scales": (ADD, scaled(WEIGHT[:1], WEIGHT[:1]), "at most one norm"),
    "add: small normed rows": (ADD, with_result(1, shape(5, 32)), "the normed rows has shape"),
    "pool: real is short": (POOLED, with_array(1, REAL[:5]), "real has shape"),
    "pool: real is int8": (POOLED, with_array(1, REAL.astype(np.int8)), "real has shape"),
    "pool: short weight": (POOLED, with_array(2, WEIGHT[:31]), "weight has shape"),
    "pool: small normed rows": (POOLED, with_result(1, shape(2, 32)), "the normed rows has shape"),
    **{
        f"pool: stride {stride}": (POOLED, with_option("stride", np.int64(stride)), "the stride must be positive")
        for stride in (-2, 0, 4, 2**62)
    },
    "pool: another stride": (POOLED, with_option("stride", np.int64(3)), "the pooled rows has shape"),
    **{
        f"pool: pool {pool}": (POOLED, with_option("pooling", np.int64(pool)), "there is no such pool")
        for pool in (-1, 3, 2**32)
    },
    "post: short weight": (POST, with_array(1, WEIGHT[:31]), "weight has shape"),
    "post: short sum": (POST, with_array(2, WEIGHT[:31]), "what the norm adds has shape"),
    "post: the sum is bfloat16": (POST, with_array(2, WEIGHT.astype(jnp.bfloat16)), "what the norm adds has shape"),
    "post: short update": (POST, with_array(3, X[:5]), "update has shape"),
    "post: update is float16": (POST, with_array(3, HALF), "update has shape"),
    "post: update is narrower than x": (POST, with_array(3, X.astype(jnp.bfloat16)), "update has shape"),
    "post: two updates": (POST, with_arrays(4, X), "at most one update"),
    "recover: short weight": (RECOVERED, with_array(1, WEIGHT[:31]), "weight has shape"),
    "recover: full is short": (RECOVERED, with_array(2, X), "full has shape"),
    "recover: full is float16": (RECOVERED, with_array(2, np.ones((12, 32), np.float16)), "full has shape"),
    "recover: no full": (RECOVERED, with_arrays(2), "every mode but tile needs full-length rows"),
    "recover: two of full": (RECOVERED, with_arrays(3, X), "every mode but tile needs full-length rows"),
    "recover: tile with full": (RECOVERED, with_option("mode", np.int64(0)), "and tile takes none"),
    **{
        f"recover: stride {stride}": (RECOVERED, with_option("stride", np.int64(stride)), "the stride must be positive")
        for stride in (-2, 0, 1, 3, 2**62)
    },
    **{
        f"recover: mode {mode}": (RECOVERED, with_option("mode", np.int64(mode)), "there is no such mode")
        for mode in (-1, 4, 2**32)
    },
}


@pytest.mark.parametrize(
    ("target", "values"),
    [
        ("funnel_norm", [2]),
        ("funnel_add_norm", [3, 2]),
        ("funnel_pool_norm", [1, 2]),
        ("funnel_post_norm", [2]),
        ("funnel_recover_norm", [2]),
    ],
)
def test_the_calls_that_the_wrong_ones_start_from_are_served(target, values):
    """Rows of ones, whose RMSNorm with a weight of 1 is 2. Around their mean they are 0, and a LayerNorm adds 2."""
    for result, value in zip(call(target, *RIGHT[target]), values, strict=True):
        np.testing.assert_allclose(result, value, rtol=1e-5)


@pytest.mark.parametrize(("target", "change", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_call_is_an_error_that_says_why(target, change, message):
    with pytest.raises(Exception, match=message):
        call(target, *change(*RIGHT[target]))


def test_any_byte_but_zero_is_a_real_row():
    """XLA's booleans are bytes; whatever one holds, nothing outside the window is read, and a row counts once."""
    real = np.array([255, 0, 0, 2, 0, 0], np.uint8).view(np.bool_)
    x = np.arange(6 * 32, dtype=np.float32).reshape(6, 32)
    for pooling in range(3):
        pooled, _ = call(POOLED, RIGHT[POOLED][0], (x, real, WEIGHT), POOL | {"pooling": np.int64(pooling)})
        np.testing.assert_array_equal(pooled, np.stack([x[0], x[3], np.zeros(32)]))
