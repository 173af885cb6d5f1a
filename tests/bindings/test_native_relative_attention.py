"""Attention of Funnel-Transformer in C++ beyond what every backend is tested for: instruction sets, threads, distances
beyond the table, and calls that are wrong."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funnel_native
from funnel_kernels import relative_attention
from option_grid import ATTENTION_TOLERANCE, Packed, RelativeCase, target


@functools.cache
def program(case: RelativeCase, threads: int):
    """Compiled once: its kernels run with the instruction set that is allowed when it is called."""
    attend = jax.jit(lambda *arrays: relative_attention(*arrays, **case.options(), target=target("cpu", threads)))
    return attend.lower(*case.arrays()).compile()


def run(case: RelativeCase, threads: int = 0) -> np.ndarray:
    return np.asarray(program(case, threads)(*case.arrays()))


@functools.cache
def reference(case: RelativeCase) -> tuple[np.ndarray, np.ndarray]:
    """The output, and `sum of weight * |v|`, which bounds it."""
    q, k, v, *others = (np.asarray(array, np.float32) if array.ndim == 2 else array for array in case.arrays())
    attend = functools.partial(relative_attention, **case.options(), target=target("reference"))
    return np.asarray(attend(q, k, v, *others)), np.asarray(attend(q, k, np.abs(v), *others))


# Several blocks of keys, panels of queries, tiles and heads; head dimensions that are whole vectors and that are not.
CASES = [
    RelativeCase(layout, heads, head_dim, separate_first, dtype)
    for layout, heads, head_dim, separate_first in (
        (Packed((1,)), 1, 8, True),
        (Packed((300, 5, 211), tail=7), 3, 20, True),
        (Packed((500, 33, 64, 300), 2, 1, align=2, tail=2), 2, 64, True),
        (Packed((400, 9), 4, 1, align=4), 2, 33, False),
    )
    for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set_agrees_with_the_reference(instruction_set, case):
    out, size = reference(case)
    error = np.abs(run(case).astype(np.float64) - out)
    tolerance = ATTENTION_TOLERANCE[case.dtype] * (1 if case.dtype == "float32" else 2)
    assert (error <= tolerance * size).all(), (error / np.maximum(size, 1e-30)).max()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_equal_to_the_bit_with_any_number_of_threads(case):
    first = run(case, threads=1)
    for threads in (1, 2, 2, 0, 5):
        np.testing.assert_array_equal(run(case, threads=threads), first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_sequence_has_the_same_bits_alone_and_anywhere_in_a_batch(instruction_set, stride, dtype):
    lengths = (8, 2, 300, 34, 4, 256, 600, 6, 258)
    case = RelativeCase(Packed(lengths, stride, 1, align=stride, tail=40), 2, 20, dtype=dtype)
    q, k, v, lo, hi, query_types, key_types, *weights = case.arrays()
    together = run(case)
    ends = np.cumsum([0, *lengths], dtype=np.int32)
    attend = functools.partial(relative_attention, **case.options(), target=target("cpu"))
    for start, end in itertools.pairwise(ends):
        mine, seen = slice(start // stride, end // stride), slice(start, end)
        types = query_types[mine], key_types[seen]
        alone = attend(q[mine], k[seen], v[seen], lo[mine] - start, hi[mine] - start, *types, *weights)
        np.testing.assert_array_equal(together[mine], alone, err_msg=f"rows {start} to {end}")


@pytest.mark.parametrize("stride", [1, 3, 1000])
def test_the_term_of_a_distance_beyond_the_table_is_zero(instruction_set, stride):
    """Longer sequences than a table allows, and queries that are far from their keys."""
    q, k, v, lo, hi, query_types, key_types, biases, offsets, same = RelativeCase(Packed((290, 200))).arrays()
    reach = 57
    short = offsets[offsets.shape[0] // 2 - reach :][: 2 * reach + 1]
    beyond = stride * 490
    long = np.pad(short, [(beyond, beyond), (0, 0)])
    attend = functools.partial(
        relative_attention, heads=2, scale=1.0, stride=stride, separate_first=False, target=target("cpu")
    )
    first, second = (attend(q, k, v, lo, hi, query_types, key_types, biases, table, same) for table in (short, long))
    np.testing.assert_array_equal(first, second)


# Wrong calls.

Q, K, TYPES = np.ones((5, 8), np.float32), np.ones((7, 8), np.float32), np.zeros(7, np.int32)
VALID = {
    "q": Q,
    "k": K,
    "v": 3 * K,
    "lo": np.zeros(5, np.int32),
    "hi": np.full(5, 7, np.int32),
    "query_types": TYPES[:5],
    "key_types": TYPES,
    "biases": K[:3],
    "offsets": np.ones((15, 8), np.float32),
    "same": K[:2],
    "out": jax.ShapeDtypeStruct((5, 8), jnp.float32),
}
ATTRIBUTES = {
    "heads": np.int64(2),
    "scale": np.float32(0.5),
    "stride": np.int64(1),
    "separate_first": np.bool_(True),
    "threads": np.int64(0),
}


def call(**changed):
    funnel_native.problem()  # registers the handlers
    attributes = {name: changed.pop(name, value) for name, value in ATTRIBUTES.items()}
    arrays = VALID | changed
    out = arrays.pop("out")
    return np.asarray(jax.ffi.ffi_call("funnel_relative_attention", out)(*arrays.values(), **attributes))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": Q[0]}, "q and k must be matrices"),
        ({"q": Q.astype(np.float16)}, "q and k must be matrices of float32 or bfloat16"),
        ({"heads": np.int64(0)}, "heads=0 must divide q's width 8"),
        ({"heads": np.int64(3)}, "heads=3 must divide q's width 8"),
        ({"k": K[:0], "v": K[:0], "key_types": TYPES[:0]}, "at least one query row, one key row"),
        ({"k": K[:, :4]}, r"k has shape \[7, 4\]"),
        ({"v": K[:6]}, r"v has shape \[6, 8\]"),
        ({"lo": TYPES[:4]}, r"lo has shape \[4\]"),
        ({"hi": TYPES[:5].astype(np.float32)}, "hi has shape"),
        ({"query_types": TYPES}, r"query_types has shape \[7\]"),
        ({"key_types": TYPES[:6]}, r"key_types has shape \[6\]"),
        ({"key_types": TYPES.astype(np.uint32)}, "key_types has shape"),
        ({"biases": K[:2]}, r"biases has shape \[2, 8\]"),
        ({"biases": K[:3].astype(jnp.bfloat16)}, "biases has shape"),
        ({"offsets": np.ones((14, 8), np.float32)}, "offsets must be a matrix with an odd number of rows"),
        ({"offsets": np.ones((0, 8), np.float32)}, "offsets must be a matrix with an odd number of rows"),
        ({"offsets": np.ones(15, np.float32)}, "offsets must be a matrix with an odd number of rows"),
        ({"offsets": np.ones((15, 4), np.float32)}, r"offsets has shape \[15, 4\]"),
        ({"same": K[:3]}, r"same has shape \[3, 8\]"),
        ({"out": jax.ShapeDtypeStruct((4, 8), jnp.float32)}, "the result has shape"),
        ({"stride": np.int64(0)}, "stride=0 must be from 1"),
        ({"stride": np.int64(2**62)}, "must be from 1 to 2"),
        ({"scale": np.float32(np.nan)}, "scale=nan"),
        ({"separate_first": np.int64(2)}, "expected PRED but got S64"),  # 1 would equal True in JAX's cache
    ],
)
def test_a_wrong_call_is_an_error_that_says_why(changed, message):
    with pytest.raises(Exception, match=message):
        call(**changed)
    np.testing.assert_allclose(call(), 3, rtol=1e-6)  # the next call is served
