"""Attention in C++ beyond what every backend is tested for: instruction sets, threads, which keys it reads, and calls
that are wrong."""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funnel_native
from funnel_kernels import attention
from option_grid import AttentionCase, Edges, Packed, Scattered, target

TOLERANCE = {"float32": 2**-16, "bfloat16": 2**-6.9}


@functools.cache
def program(case: AttentionCase, threads: int):
    """Compiled once: its kernels run with the instruction set that is allowed when it is called."""
    attend = jax.jit(lambda *arrays: attention(*arrays, **case.options(), target=target("cpu", threads)))
    return attend.lower(*case.arrays()).compile()


def run(case: AttentionCase, arrays: tuple[np.ndarray, ...] | None = None, threads: int = 0) -> np.ndarray:
    return np.asarray(program(case, threads)(*(arrays or case.arrays())))


@functools.cache
def dense(case: AttentionCase) -> tuple[np.ndarray, np.ndarray]:
    """Float64: the output, and `sum of weight * |v|`, which bounds it."""
    q, k, v, lo, hi = case.arrays()
    options, group, d = case.options(), case.heads // case.kv_heads, case.head_dim
    q = q.astype(np.float64).reshape(len(q), case.heads, d)
    k, v = (np.repeat(array.astype(np.float64).reshape(len(k), case.kv_heads, d), group, 1) for array in (k, v))
    scores = options["scale"] * np.einsum("qhd,khd->hqk", q, k)
    if case.softcap is not None:
        scores = case.softcap * np.tanh(scores / case.softcap)
    keys = np.arange(len(k))
    weights = np.exp(scores) * ((lo[:, None] <= keys) & (keys < hi[:, None]))
    weights /= np.maximum(weights.sum(2, keepdims=True), 1e-300)
    out, size = (np.einsum("hqk,khd->qhd", weights, values).reshape(len(q), -1) for values in (v, np.abs(v)))
    return out, size


CASES = [
    AttentionCase(Packed((1,)), dtype="bfloat16"),
    AttentionCase(Packed((300, 5, 211), left=63, right=0, tail=7), 8, 1, 64),
    AttentionCase(Packed((300, 5, 211), left=63, right=0, tail=7), 8, 1, 64, dtype="bfloat16"),
    AttentionCase(Edges(), 3, 3, 33, softcap=2.5),
    AttentionCase(Edges(), 3, 3, 33, softcap=2.5, dtype="bfloat16"),
    AttentionCase(Scattered(300, 700), 10, 2, 1),
    AttentionCase(Scattered(300, 700), 10, 2, 1, dtype="bfloat16"),
    AttentionCase(Packed((700, 64, 64, 90)), 4, 4, 33),  # several tiles of several key/value heads
    AttentionCase(Packed((700, 64, 64, 90)), 4, 4, 33, dtype="bfloat16"),
    AttentionCase(Scattered(40, 70), 600, 1, 16, dtype="bfloat16"),  # more heads than a tile has columns
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set_agrees_with_float64(instruction_set, case):
    out, size = dense(case)
    error = np.abs(run(case).astype(np.float64) - out)
    assert (error <= TOLERANCE[case.dtype] * size).all(), (error / np.maximum(size, 1e-30)).max()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_equal_to_the_bit_from_run_to_run_and_with_any_number_of_threads(case):
    """Tiles are smaller with more threads: what a row shares its tile with does not matter either."""
    first = run(case, threads=1)
    for threads in (1, 2, 2, 0, 5):
        np.testing.assert_array_equal(run(case, threads=threads), first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("query_stride", "left", "right"), [(1, None, None), (1, None, 0), (1, 20, 20), (2, None, None), (2, 40, 0)]
)
def test_a_sequence_has_the_same_bits_alone_and_anywhere_in_a_batch(instruction_set, query_stride, left, right, dtype):
    """Lengths around those of vectors and blocks, which lie at any offset, odd ones too."""
    lengths = (7, 1, 300, 2, 33, 3, 17, 256, 16, 600, 5, 257, 31, 512, 100, 9)
    case = AttentionCase(Packed(lengths, query_stride, left=left, right=right, tail=40), 3, 1, 20, dtype=dtype)
    q, k, v, lo, hi = case.arrays()
    together = run(case)
    query_rows = [-(-length // query_stride) for length in lengths]
    keys, queries = (np.cumsum([0, *counts]) for counts in (lengths, query_rows))
    attend = functools.partial(attention, **case.options(), target=target("cpu"))
    for index, length in enumerate(lengths):
        mine, seen = (slice(ends[index], ends[index + 1]) for ends in (queries, keys))
        start = np.int32(seen.start)
        alone = attend(q[mine], k[seen], v[seen], lo[mine] - start, hi[mine] - start)
        np.testing.assert_array_equal(together[mine], alone, err_msg=f"{length} tokens from row {start} on")


def test_many_calls_at_once():
    """The pool's threads work for several calls in turn, of different sizes."""
    cases = CASES[1:5] * 4
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, cases))
    for case, result in zip(cases, results, strict=True):
        np.testing.assert_array_equal(result, run(case, threads=1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bounds_outside_the_keys_are_clamped(instruction_set, dtype):
    case = AttentionCase(Packed((77,)), dtype=dtype)
    q, k, v, lo, hi = case.arrays()
    full = run(case)
    far = np.iinfo(np.int32)
    np.testing.assert_array_equal(run(case, (q, k, v, np.full_like(lo, far.min), np.full_like(hi, far.max))), full)
    for first, last in ((77, far.max), (far.max, far.max), (far.min, 0), (far.min, far.min), (far.max, far.min)):
        assert (run(case, (q, k, v, np.full_like(lo, first), np.full_like(hi, last))) == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("right", [None, 0], ids=["both ways", "causal"])
def test_a_row_reads_no_keys_of_other_sequences(instruction_set, right, dtype):
    """NaN in the keys and values of one sequence stays there, whatever is computed at once."""
    lengths = (97, 3, 288, 575, 96)
    layout = Packed(lengths, right=right, tail=192)
    case = AttentionCase(layout, heads=4, kv_heads=1, head_dim=10, dtype=dtype)
    q, k, v, lo, hi = case.arrays()
    clean = run(case)
    sequence = np.repeat(np.arange(6), (*lengths, 192))
    for poisoned in range(6):
        at = (sequence == poisoned)[:, None]
        nan = np.asarray(np.nan, k.dtype)
        out = run(case, (q, np.where(at, nan, k), np.where(at, nan, v), lo, hi))
        others = sequence != poisoned
        np.testing.assert_array_equal(out[others], clean[others])
        assert poisoned == 5 or np.isnan(out[~others].astype(np.float32)).all()


def test_causal_rows_read_only_the_keys_up_to_the_next_multiple_of_8(instruction_set):
    case = AttentionCase(Packed((384,), right=0), heads=48, kv_heads=1)  # one query row fills a panel, or two
    q, k, v, lo, hi = case.arrays()
    clean = run(case)
    for start in (8, 32, 136, 320):
        late = (np.arange(384) >= start)[:, None]
        out = run(case, (q, np.where(late, np.float32(np.nan), k), np.where(late, np.float32(np.nan), v), lo, hi))
        np.testing.assert_array_equal(out[:start], clean[:start])
        assert np.isnan(out[start:]).all()


# Wrong calls.

Q, K = np.ones((5, 24), np.float32), np.ones((7, 8), np.float32)
LO, HI = np.zeros(5, np.int32), np.full(5, 7, np.int32)
VALID = {"q": Q, "k": K, "v": 3 * K, "lo": LO, "hi": HI, "out": jax.ShapeDtypeStruct((5, 24), jnp.float32)}
ATTRIBUTES = {
    "heads": np.int64(6),
    "kv_heads": np.int64(2),
    "scale": np.float32(0.5),
    "softcap": np.float32(0),
    "threads": np.int64(0),
}


def call(**changed):
    funnel_native.problem()  # registers the handlers
    attributes = {name: changed.pop(name, value) for name, value in ATTRIBUTES.items()}
    arrays = VALID | changed
    out = arrays.pop("out")
    return np.asarray(jax.ffi.ffi_call("funnel_attention", out)(*arrays.values(), **attributes))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": Q[0]}, "q and k must be matrices"),
        ({"k": K[0]}, "q and k must be matrices"),
        ({"q": Q.astype(np.float16)}, "q and k must be matrices of float32 or bfloat16"),
        ({"q": Q.astype(np.int32)}, "q and k must be matrices of float32 or bfloat16"),
        ({"heads": np.int64(0)}, "heads=0 must divide q's width 24"),
        ({"heads": np.int64(-6)}, "heads=-6 must divide"),
        ({"heads": np.int64(5)}, "heads=5 must divide q's width 24"),
        ({"heads": np.int64(2**62)}, "must divide q's width 24"),
        ({"kv_heads": np.int64(0)}, "multiple of kv_heads=0"),
        ({"kv_heads": np.int64(-2)}, "multiple of kv_heads=-2"),
        ({"kv_heads": np.int64(4)}, "multiple of kv_heads=4"),
        ({"kv_heads": np.int64(1)}, r"k has shape \[7, 8\] .* must have shape \[7, 4\]"),
        ({"q": Q[:, :0]}, "heads=6 must divide q's width 0"),
        ({"q": Q[:0], "lo": LO[:0], "hi": HI[:0]}, "at least one query row"),
        ({"k": K[:0], "v": K[:0]}, "at least one query row, one key row"),
        ({"k": K.astype(jnp.bfloat16)}, "k has shape"),
        ({"v": K.astype(jnp.bfloat16)}, "v has shape"),
        ({"q": Q.astype(jnp.bfloat16)}, "k has shape"),
        ({"k": K[:6]}, r"v has shape \[7, 8\] .* must have shape \[6, 8\]"),
        ({"v": K[:6]}, r"v has shape \[6, 8\]"),
        ({"v": K[:, :4]}, r"v has shape \[7, 4\]"),
        ({"lo": LO[:4]}, r"lo has shape \[4\]"),
        ({"hi": HI[:4]}, r"hi has shape \[4\]"),
        ({"lo": LO[:, None]}, r"lo has shape \[5, 1\]"),
        ({"lo": LO.astype(np.uint32)}, "lo has shape"),
        ({"hi": HI.astype(np.float32)}, "hi has shape"),
        ({"out": jax.ShapeDtypeStruct((4, 24), jnp.float32)}, "the result has shape"),
        ({"out": jax.ShapeDtypeStruct((5, 24), jnp.bfloat16)}, "the result has shape"),
        ({"scale": np.float32(np.nan)}, "scale=nan"),
        ({"scale": np.float32(np.inf)}, "scale=inf"),
        ({"softcap": np.float32(-1)}, "softcap=-1.000000 must be finite"),
        ({"softcap": np.float32(np.nan)}, "softcap=nan"),
        ({"scale": np.int64(1)}, "expected F32 but got S64"),
        ({"heads": np.float32(3)}, "expected S64 but got F32"),  # 6.0 would equal the valid 6 in JAX's cache
    ],
)
def test_a_wrong_call_is_an_error_that_says_why(changed, message):
    with pytest.raises(Exception, match=message):
        call(**changed)
    np.testing.assert_allclose(call(), 3, rtol=1e-6)  # the next call is served
