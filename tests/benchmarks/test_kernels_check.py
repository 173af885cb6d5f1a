"""`funnel bench check`: layouts, the oracle, what checks catch, and what the report says of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funnel_benchmarks.kernels import check, layouts, oracle
from funnel_benchmarks.kernels.check import Check, make_check
from funnel_benchmarks.suite import markdown
from funnel_engine import FunnelError
from funnel_engine.devices import local_target
from funnel_kernels import attention as attention_op
from funnel_kernels import pool_norm, recover_norm
from funnel_kernels.pool_norm import POOLS
from funnel_kernels.recover_norm import MODES, SITES

SUITE = make_check("xla", small=True, seed=5)


# Layouts.


def by_hand(lengths, stride, left, right):
    """For every query row its visible key rows, token by token."""
    seen, start = [], 0
    for length in lengths:
        for t in range(0, length, stride):
            keys = [
                start + j
                for j in range(length)
                if (left is None or j >= t - left) and (right is None or j <= t + right)
            ]
            seen.append(keys)
        start += -(-length // stride) * stride
    return seen


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("window", [(None, None), (None, 0), (5, 3)])
def test_packed_sequences_see_themselves_only(stride, window):
    lengths = [7, 1, 12]
    layout = layouts.packed(np.array(lengths, np.int32), stride=stride, window=window, padding=2)
    expected = [*by_hand(lengths, stride, *window), [], []]
    assert (layout.queries, layout.keys) == (len(expected), stride * len(expected))
    assert [list(range(lo, hi)) for lo, hi in zip(layout.lo, layout.hi, strict=True)] == expected
    assert layout.pairs == sum(map(len, expected))


def test_scattered_intervals_stay_inside_and_some_are_empty():
    layout = layouts.scattered(np.random.default_rng(0), 500, 300)
    assert (layout.lo >= 0).all()
    assert (layout.hi <= 300).all()
    assert 0.1 < (layout.hi <= layout.lo).mean() < 0.6
    assert layout.pairs == sum(max(0, hi - lo) for lo, hi in zip(layout.lo.tolist(), layout.hi.tolist(), strict=True))


def test_lengths_are_cut_to_the_tokens_wanted():
    lengths = np.array([5, 4, 3, 9], np.int32)
    assert layouts.up_to(10, lengths).tolist() == [5, 4, 1]
    assert layouts.up_to(9, lengths).tolist() == [5, 4]
    assert lengths.tolist() == [5, 4, 3, 9]
    assert layouts.equal(32, 8).tolist() == [8] * 4


# The oracle, against the specification.


def numbers(seed, *shapes):
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


def agree(ours, reference):
    for actual, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(actual, np.asarray(expected), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 2), (3, 3)])
def test_the_oracle_of_attention_is_the_specification(heads, kv_heads, softcap):
    layout = layouts.scattered(np.random.default_rng(heads), 600, 90)  # more than one block of queries
    q, k, v = numbers(1, (600, heads * 8), (90, kv_heads * 8), (90, kv_heads * 8))
    options = {"heads": heads, "kv_heads": kv_heads, "scale": 0.7, "softcap": softcap}
    wide = [array.astype(np.float64) for array in (q, k, v)]
    agree(
        oracle.attention(*wide, layout.lo, layout.hi, **options),
        attention_op(q, k, v, layout.lo, layout.hi, **options, target=local_target("reference")),
    )


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_oracle_of_pool_norm_is_the_specification(pool, stride):
    x, weight = numbers(2, (60, 24), (24,))
    real = np.random.default_rng(3).random(60) < 0.5
    options = {"stride": stride, "pool": pool, "eps": 1e-3}
    agree(
        oracle.pool_norm(x.astype(np.float64), real, weight.astype(np.float64), **options),
        pool_norm(x, real, weight, **options, target=local_target("reference")),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("site", SITES)
def test_the_oracle_of_recover_norm_is_the_specification(mode, site):
    short, full, weight = numbers(4, (20, 24), (60, 24), (24,))
    full = None if mode == "tile" else full
    options = {"stride": 3, "mode": mode, "site": site, "eps": 1e-3}
    wide = [array if array is None else array.astype(np.float64) for array in (short, full, weight)]
    agree(
        oracle.recover_norm(*wide, **options),
        recover_norm(short, full, weight, **options, target=local_target("reference")),
    )


# What a check catches.


def double(x):
    return 2 * x


def flipping():
    """An op whose result differs from call to call."""
    state = iter(range(100))

    def op(x):
        return jax.pure_callback(
            lambda x: x * np.float32(2 + 1e-6 * next(state)), jax.ShapeDtypeStruct((50,), "float32"), x
        )

    return op


@pytest.mark.parametrize(
    ("op", "facts"),
    [
        (double, {"passed": True, "finite": True, "same_bits_twice": True}),
        (lambda x: 2 * x + 1e-3, {"passed": False, "finite": True, "same_bits_twice": True}),
        (lambda x: (2 * x).at[7].set(jnp.nan), {"passed": False, "finite": False, "same_bits_twice": True}),
        (flipping(), {"passed": False, "finite": True, "same_bits_twice": False}),
    ],
    ids=["right", "wrong", "unwritten", "moving"],
)
def test_a_check_catches(op, facts):
    row = check.compare(op, double, numbers(6, (50,)), check.FLOAT32)
    assert row.items() >= facts.items()
    small = row["error"] is not None and row["error"] <= row["limit"]
    assert small is (facts["passed"] or not facts["same_bits_twice"])


def test_memory_is_full_of_nan_before_each_of_the_two_runs(monkeypatch):
    filled, full = [], jnp.full
    monkeypatch.setattr(check.jnp, "full", lambda *spec: filled.append(spec) or full(*spec))
    check.compare(lambda x: (2 * x, x[:7]), lambda x: (2 * x, x[:7]), numbers(7, (50,)), check.FLOAT32)
    assert [shape for shape, _, _ in filled] == 2 * [*4 * [(50,)], *4 * [(7,)]]
    assert all(np.isnan(value) and dtype == jnp.float32 for _, value, dtype in filled)


def test_a_result_of_another_shape_is_an_error():
    with pytest.raises(FunnelError, match=r"the result has shape \(3,\) but it must be \(4,\)"):
        check.relative_error(np.ones(3), np.ones(4))


def test_relative_error_is_that_of_the_whole_result():
    assert check.relative_error(np.array([3.0, 5.0]), np.array([3.0, 4.0])) == pytest.approx(0.2)
    assert not check.relative_error(np.array([np.nan, 4.0]), np.array([3.0, 4.0])) <= 1


def test_checks_cover_every_op_dtype_and_option():
    names = [name for name, _ in check.cells(SUITE)]
    for dtype in ("bfloat16", "float32"):
        for option in (*(f"pool_norm {pool}" for pool in POOLS), *(f"recover_norm {mode}" for mode in MODES)):
            assert sum(name.startswith(option) and dtype in name for name in names) >= 2
        for heads in (
            "8/1 heads of 256",
            "8/4 heads of 256",
            "4/4 heads of 256",
            "6/2 heads of 128",
            "2/2 heads of 64",
        ):
            assert any(f"attention {heads}" in name and dtype in name for name in names)
    assert sum("one long sequence" in name for name in names) == 3
    shown = [name for name, _ in SUITE.cells(None)]
    assert shown == names[:: SUITE.step]


def test_checks_of_two_seeds_have_other_numbers():
    row, again = (list(SUITE.cells(None))[-1][1]() for _ in range(2))
    other = list(Check("xla", 6, longest=130, step=7).cells(None))[-1][1]()
    assert row == again
    assert row["error"] != other["error"]
    assert (row["op"], row["backend"]) == ("recover_norm", "xla")
    assert make_check("xla", False, None).seed != make_check("xla", False, None).seed


# The report.


def checked(op, dtype, precision, error, limit, **facts):
    row = {"op": op, "backend": "xla", "dtype": dtype, "precision": precision, "error": error, "limit": limit}
    return row | {"cell": f"{op}: odd sizes", "same_bits_twice": True, "finite": True, "passed": True} | facts


def test_wrong_results_are_counted_and_named():
    rows = [
        checked("attention", "bfloat16", "default", 2e-3, 1e-2),
        checked("attention", "bfloat16", "default", 4e-3, 1e-2, cell="attention: even sizes"),
        checked("pool_norm", "float32", "highest", 3e-5, 1e-5, passed=False),
        checked("recover_norm", "float32", "highest", 1e-7, 1e-5, passed=False, same_bits_twice=False),
        checked("recover_norm", "float32", "highest", None, 1e-5, passed=False, finite=False, cell="not finite"),
    ]
    text = markdown(Check.section({"options": SUITE.options(), "rows": rows}))
    assert "3 of 5 results are wrong." in text
    assert "| attention (xla) | bfloat16, default | 2 | 4.00e-03 | 0.01 | 0 |" in text
    assert "| pool_norm (xla) | float32, highest | 1 | 3.00e-05 | 1e-05 | 1 |" in text
    assert "| recover_norm (xla) | float32, highest | 2 | inf | 1e-05 | 2 |" in text
    wrong = text.split("**Wrong results**")[1]
    assert "| pool_norm: odd sizes | 3.00e-05 | 1e-05 | yes | yes |" in wrong
    assert "| recover_norm: odd sizes | 1.00e-07 | 1e-05 | no | yes |" in wrong
    assert "| not finite | inf | 1e-05 | yes | no |" in wrong
    assert "- Seed: 5\n- Backend: xla\n" in wrong
    assert Check.section({"options": SUITE.options(), "rows": []}).filled == []
