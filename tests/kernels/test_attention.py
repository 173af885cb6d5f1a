"""`attention`: every implementation against float64 loops, what is refused, and what the blocked one never does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_oracle import oracle
from funnel_kernels import BackendUnavailable, InputError, attention
from option_grid import (
    ATTENTION_TOLERANCE,
    BACKENDS,
    DTYPES,
    AttentionCase,
    Packed,
    Scattered,
    each_value_once,
    largest_array,
    over_the_grid,
    refuses,
    target,
)


@over_the_grid("attention")
def test_agrees_with_float64(backend, case):
    arrays = case.arrays()
    run = jax.jit(lambda *arrays: attention(*arrays, **case.options(), target=target(backend)))
    if refuses("attention", backend, case):
        with pytest.raises(BackendUnavailable, match=f"{backend}: ."):
            run(*arrays)
        return
    actual, (expected, size) = run(*arrays), oracle(case)
    assert actual.shape == expected.shape
    assert actual.dtype == jnp.dtype(case.dtype)
    error = np.abs(np.asarray(actual, np.float64) - expected)
    assert (error <= ATTENTION_TOLERANCE[case.dtype] * size).all(), (error / np.maximum(size, 1e-30)).max()


@each_value_once(backend=BACKENDS, dtype=DTYPES)
def test_a_row_that_sees_nothing_is_exactly_zero(backend, dtype):
    case = AttentionCase(Scattered(300, 700), dtype=dtype)
    q, k, v, lo, hi = case.arrays()
    empty = lo >= hi
    assert 50 < empty.sum() < 250
    out = np.asarray(attention(q, k, v, lo, hi, **case.options(), target=target(backend)), np.float32)
    assert (out[empty] == 0).all()
    assert (out[~empty] != 0).any(axis=1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    case = AttentionCase(Packed((200, 90)))
    q, k, v, lo, hi = case.arrays()
    out = attention(1e4 * q, k, v, lo, hi, **case.options(), target=target(backend))
    # All weight is on the key of the largest score, as in the limit of infinite scores.
    scores = np.einsum("qhd,kd->hqk", q.reshape(290, 2, 8), k, dtype=np.float64)
    scores[:, (np.arange(290)[:, None] < 200) != (np.arange(290) < 200)] = -np.inf
    best, second = np.sort(scores, axis=2)[:, :, -1], np.sort(scores, axis=2)[:, :, -2]
    clear = best - second > 0.05
    assert clear.mean() > 0.9
    expected = v[scores.argmax(axis=2)]  # [heads, Nq, d]
    np.testing.assert_allclose(np.asarray(out).reshape(290, 2, 8).swapaxes(0, 1)[clear], expected[clear], rtol=1e-6)
    assert np.isfinite(out).all()


# What the blocked implementation must not do. The compiled program and NaN in the keys tell.


def compiled(case, backend):
    run = jax.jit(lambda *arrays: attention(*arrays, **case.options(), target=target(backend)))
    return run.lower(*case.arrays()).compile().as_text()


def test_no_array_has_a_score_for_every_pair_of_rows():
    case = AttentionCase(Scattered(2048, 2048), heads=2, kv_heads=1, head_dim=8)
    pairs = 2048 * 2048
    assert largest_array(compiled(case, "reference")) >= pairs
    assert largest_array(compiled(case, "xla")) <= pairs / 8


def test_the_size_of_the_program_does_not_depend_on_the_number_of_rows():
    small, large = (AttentionCase(Scattered(rows, rows)) for rows in (512, 4096))
    count = [compiled(case, "xla").count("\n") for case in (small, large)]
    assert count[1] <= 1.1 * count[0]


class Poisoned:
    """xla attention with NaN in the keys and values of some rows: they reach the output if their block is visited."""

    def __init__(self, layout: Packed):
        self.case = AttentionCase(layout, heads=4, kv_heads=1)
        self.arrays = self.case.arrays()
        self.keys = np.arange(len(self.arrays[1]))
        self.run = jax.jit(lambda *arrays: attention(*arrays, **self.case.options(), target=target("xla")))

    def output(self, poisoned: np.ndarray) -> np.ndarray:
        q, k, v, lo, hi = self.arrays
        k, v = (np.where(poisoned[:, None], np.float32(np.nan), array) for array in (k, v))
        return np.asarray(self.run(q, k, v, lo, hi))


def test_a_packed_sequence_costs_no_visit_to_another_one():
    attend = Poisoned(Packed((256,) * 15 + (100,), tail=156))
    rows = np.arange(4096)
    clean = attend.output(attend.keys < 0)
    for sequence in range(16):
        out = attend.output(attend.keys // 256 == sequence)
        others = rows // 256 != sequence
        np.testing.assert_array_equal(out[others], clean[others])
        assert np.isnan(out[~others & (rows < 3940)]).all()


@pytest.mark.parametrize(
    ("layout", "visited"),
    [
        # The blocks of the query rows 1024..1279, which see 64 tokens on both sides, or all that came before.
        (Packed((4096,), left=64, right=64), range(768, 1536)),
        (Packed((4096,), left=64, right=0), range(768, 1280)),
        (Packed((4096,), right=0), range(1280)),
        (Packed((4096,), 2, 2, left=64, right=64, align=2), range(768, 1536)),
        (Packed((4096,), 2, 1, left=64, right=64, align=2), range(1792, 2816)),
    ],
    ids=["window", "causal window", "causal", "pooled window", "window of queries on stride 2"],
)
def test_only_blocks_inside_the_intervals_are_visited(layout, visited):
    attend = Poisoned(layout)
    clean = attend.output(attend.keys < 0)[1024:1280]
    np.testing.assert_array_equal(attend.output(~np.isin(attend.keys, visited))[1024:1280], clean)
    assert np.isnan(attend.output(np.isin(attend.keys, visited))[1024:1280]).all()


def test_rows_of_padding_visit_nothing():
    attend = Poisoned(Packed((256,), tail=3840))
    out = attend.output(attend.keys >= 0)
    assert np.isnan(out[:256]).all()
    assert (out[256:] == 0).all()


# What is refused.


def valid():
    return {
        "q": jnp.ones((5, 24)),
        "k": jnp.ones((7, 8)),
        "v": jnp.ones((7, 8)),
        "lo": jnp.zeros(5, jnp.int32),
        "hi": jnp.full(5, 7, jnp.int32),
        "heads": 6,
        "kv_heads": 2,
        "scale": 0.5,
        "target": target(),
    }


def test_the_valid_call_that_the_refusals_start_from_is_served():
    assert attention(**valid()).shape == (5, 24)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"heads": 0}, "heads=0 must be a positive multiple of kv_heads=2"),
        ({"kv_heads": 0}, "heads=6 must be a positive multiple of kv_heads=0"),
        ({"kv_heads": -2}, "kv_heads=-2"),
        ({"heads": 4, "kv_heads": 3}, "heads=4 must be a positive multiple of kv_heads=3"),
        ({"heads": 10}, "q is 24 wide; heads=10 must divide its width"),
        ({"q": jnp.ones((1, 5, 24))}, r"q has shape \(1, 5, 24\); it must have 2 axes"),
        ({"k": jnp.ones(56)}, r"k has shape \(56,\); it must have 2 axes"),
        ({"q": jnp.ones((5, 24), jnp.float16)}, "q is float16; use float32 or bfloat16"),
        ({"q": jnp.ones((5, 24), jnp.int32)}, "q is int32; use float32 or bfloat16"),
        ({"k": jnp.ones((7, 8), jnp.bfloat16)}, "k is bfloat16; it must be float32"),
        ({"v": jnp.ones((7, 8), jnp.bfloat16)}, "v is bfloat16; it must be float32"),
        ({"k": jnp.ones((7, 24))}, r"k has shape \(7, 24\); it must have shape \(7, 8\)"),
        ({"v": jnp.ones((6, 8))}, r"v has shape \(6, 8\); it must have shape \(7, 8\)"),
        ({"lo": jnp.zeros(7, jnp.int32)}, r"lo has shape \(7,\); it must have shape \(5,\)"),
        ({"hi": jnp.zeros((5, 1), jnp.int32)}, r"hi has shape \(5, 1\); it must have shape \(5,\)"),
        ({"lo": jnp.zeros(5, jnp.uint32)}, "lo is uint32; it must be int32"),
        ({"hi": jnp.zeros(5)}, "hi is float32; it must be int32"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(changed, message):
    with pytest.raises(InputError, match=message):
        attention(**(valid() | changed))


@pytest.mark.parametrize("empty", [{"q": (0, 24)}, {"k": (0, 8), "v": (0, 8)}], ids=["no queries", "no keys"])
def test_no_rows_are_refused(empty):
    arguments = valid() | {name: jnp.ones(shape) for name, shape in empty.items()}
    rows = arguments["q"].shape[0]
    arguments |= {"lo": jnp.zeros(rows, jnp.int32), "hi": jnp.zeros(rows, jnp.int32)}
    with pytest.raises(InputError, match="at least one row"):
        attention(**arguments)
