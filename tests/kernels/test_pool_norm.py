"""`pool_norm`: every implementation against float64 loops, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funnel_kernels import BackendUnavailable, InputError, pool_norm
from funnel_kernels.pool_norm import POOL_NORM, reference
from option_grid import BACKENDS, DTYPES, PoolCase, each_value_once, normal, over_the_grid, refuses, target

WRITTEN = [backend for backend in BACKENDS if backend != "xla"]  # which takes the reference
ROUNDING = {"float32": 2**-24, "bfloat16": 2**-8}  # the largest relative error of rounding to a dtype


def oracle(x, real, weight, *, stride, pool, eps):
    """Float64, one window at a time: (pooled rows, normed rows)."""
    pooled, normed = [], []
    for start in range(0, len(x), stride):
        rows = [np.asarray(x[row], np.float64) for row in range(start, start + stride) if real[row]]
        if not rows:
            row = np.zeros(x.shape[1])
        elif pool == "first":
            row = rows[0]
        elif pool == "mean":
            row = sum(rows) / len(rows)
        else:
            row = rows[0]
            for other in rows[1:]:
                row = np.where(other > row, other, row)
        pooled.append(row)
        normed.append(row / np.sqrt(np.mean(row**2) + eps) * (1 + np.asarray(weight, np.float64)))
    return np.array(pooled), np.array(normed)


def jitted(case, backend):
    return jax.jit(lambda *arrays: pool_norm(*arrays, **case.options(), target=target(backend)))


def test_xla_takes_the_reference():
    assert POOL_NORM.implementation("xla", target()) == ("xla", reference.pool_norm)


@over_the_grid("pool_norm", WRITTEN)
def test_agrees_with_float64(backend, case):
    arrays = case.arrays()
    if refuses("pool_norm", backend, case):
        with pytest.raises(BackendUnavailable, match=f"{backend}: ."):
            jitted(case, backend)(*arrays)
        return
    for actual, expected in zip(jitted(case, backend)(*arrays), oracle(*arrays, **case.options()), strict=True):
        assert actual.shape == expected.shape
        assert actual.dtype == jnp.dtype(case.dtype)
        # One rounding at the end of arithmetic in float32; the norm of a mean that was rounded before is further off.
        error = np.abs(np.asarray(actual, np.float64) - expected)
        assert (error <= ROUNDING[case.dtype] * np.abs(expected) + 2e-6 * np.maximum(np.abs(expected), 1)).all()


@pytest.mark.parametrize("pool", ["max", "mean", "first"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_never_reaches_a_pooled_row(backend, pool):
    case = PoolCase(3, pool)
    x, real, weight = case.arrays()
    counts = real.reshape(-1, 3).sum(1)
    assert set(counts) == {0, 1, 2, 3}
    clean = jitted(case, backend)(x, real, weight)
    poisoned = jitted(case, backend)(np.where(real[:, None], x, np.float32(np.nan)), real, weight)
    for before, after in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(after, before)
        assert (np.asarray(after)[counts == 0] == 0).all()
        assert (np.asarray(after)[counts > 0] != 0).all()


@each_value_once(backend=BACKENDS, dtype=DTYPES)
def test_max_and_first_hand_on_the_exact_values(backend, dtype):
    case = PoolCase(2, "max", dtype)
    x, real, weight = case.arrays()
    assert real[:2].all()
    pooled, _ = jitted(case, backend)(x, real, weight)
    np.testing.assert_array_equal(pooled[0], np.maximum(x[0], x[1]))
    assert (np.asarray(pooled[0]) < 0).any()  # where 0 would have won
    pooled, _ = jitted(PoolCase(2, "first", dtype), backend)(x, real, weight)
    np.testing.assert_array_equal(pooled[0], x[0])


def valid():
    return {
        "x": jnp.asarray(normal(0, 6, 4), jnp.float32),
        "real": jnp.ones(6, bool),
        "weight": jnp.ones(4),
        "stride": 2,
        "pool": "max",
        "eps": 1e-6,
        "target": target(),
    }


def test_the_valid_call_that_the_refusals_start_from_is_served():
    assert [rows.shape for rows in pool_norm(**valid())] == [(3, 4), (3, 4)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": jnp.ones((1, 6, 4))}, r"x has shape \(1, 6, 4\); it must have 2 axes"),
        ({"x": jnp.ones((6, 4), jnp.float16)}, "x is float16; use float32 or bfloat16"),
        ({"x": jnp.ones((6, 4), jnp.int8)}, "x is int8; use float32 or bfloat16"),
        ({"real": jnp.ones(3, bool)}, r"real has shape \(3,\); it must have shape \(6,\)"),
        ({"real": jnp.ones(6, jnp.int32)}, "real is int32; it must be bool"),
        ({"weight": jnp.ones(6)}, r"weight has shape \(6,\); it must have shape \(4,\)"),
        ({"weight": jnp.ones((1, 4))}, r"weight has shape \(1, 4\)"),
        ({"weight": jnp.ones(4, jnp.float16)}, "weight is float16; use float32 or bfloat16"),
        ({"stride": 0}, "stride=0 must be positive and divide the 6 rows"),
        ({"stride": -2}, "stride=-2 must be positive and divide the 6 rows"),
        ({"stride": 4}, "stride=4 must be positive and divide the 6 rows; pad the rows"),
        ({"stride": 2.0}, "stride=2.0"),
        ({"pool": "min"}, "pool='min' must be one of max, mean, first"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(InputError, match=message):
        pool_norm(**(valid() | changed))
