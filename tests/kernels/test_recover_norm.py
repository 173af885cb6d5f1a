"""`recover_norm`: every implementation against float64 loops, what it writes, and what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funnel_kernels import BackendUnavailable, InputError, recover_norm
from funnel_kernels.recover_norm import RECOVER_NORM, reference
from option_grid import BACKENDS, RecoverCase, normal, over_the_grid, refuses, target

WRITTEN = [backend for backend in BACKENDS if backend != "xla"]  # which takes the reference
ROUNDING = {"float32": 2**-24, "bfloat16": 2**-8}  # the largest relative error of rounding to a dtype


def oracle(short, full, weight, *, stride, mode, site, eps):
    """Float64, one row at a time."""

    def norm(row):
        return row / np.sqrt(np.mean(row**2) + eps) * (1 + np.asarray(weight, np.float64))

    def combine(tiled, kept):
        if mode == "tile":
            return tiled
        return {"sum": tiled + kept, "mean": (tiled + kept) / 2, "max": np.where(tiled > kept, tiled, kept)}[mode]

    rows = []
    for row in range(len(short) * stride):
        tiled = np.asarray(short[row // stride], np.float64)
        kept = None if full is None else np.asarray(full[row], np.float64)
        if site == "before_norm":
            rows.append(norm(combine(tiled, kept)))
        else:
            rows.append(combine(norm(tiled), None if kept is None else norm(kept)))
    return np.array(rows)


def test_xla_takes_the_reference():
    assert RECOVER_NORM.implementation("xla", target()) == ("xla", reference.recover_norm)


@over_the_grid("recover_norm", WRITTEN)
def test_agrees_with_float64(backend, case):
    arrays = case.arrays()
    run = jax.jit(lambda *arrays: recover_norm(*arrays, **case.options(), target=target(backend)))
    if refuses("recover_norm", backend, case):
        with pytest.raises(BackendUnavailable, match=f"{backend}: ."):
            run(*arrays)
        return
    actual, expected = run(*arrays), oracle(*arrays, **case.options())
    assert actual.shape == expected.shape
    assert actual.dtype == jnp.dtype(case.dtype)
    # One rounding at the end of arithmetic in float32.
    error = np.abs(np.asarray(actual, np.float64) - expected)
    assert (error <= ROUNDING[case.dtype] * np.abs(expected) + 4e-6 * np.maximum(np.abs(expected), 1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_before_the_norm_sum_and_mean_are_the_same_up_to_eps(backend):
    case = RecoverCase(2, "sum")
    short, full, weight = case.arrays()
    options = {"stride": 2, "eps": 1e-6, "target": target(backend)}
    total = recover_norm(short, full, weight, mode="sum", **options)
    np.testing.assert_allclose(recover_norm(short, full, weight, mode="mean", **options), total, rtol=1e-5, atol=1e-6)
    after = {"site": "after_norm", **options}
    total, mean = (np.asarray(recover_norm(short, full, weight, mode=mode, **after)) for mode in ("sum", "mean"))
    np.testing.assert_allclose(2 * mean, total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["tile", "sum", "mean", "max"])
def test_the_full_length_is_written_at_most_twice(mode):
    """XLA:CPU makes one array of the combined rows and one of their norm; the tiled rows are never one of their own."""
    case = RecoverCase(4, mode, dtype="bfloat16", full_dtype="bfloat16", windows=512, width=640)
    run = jax.jit(lambda *arrays: recover_norm(*arrays, **case.options(), target=target("xla")))
    program = run.lower(*case.arrays()).compile().as_text()
    entry = re.search(r"^ENTRY .*?^}", program, re.MULTILINE | re.DOTALL).group()
    written = re.findall(r" = \w+\[(?:2048,640|512,4,640)\]\S* (?!parameter|bitcast)", entry)
    assert 1 <= len(written) <= 2


def valid():
    return {
        "short": jnp.asarray(normal(0, 3, 4), jnp.float32),
        "full": jnp.asarray(normal(1, 6, 4), jnp.float32),
        "weight": jnp.ones(4),
        "stride": 2,
        "mode": "sum",
        "eps": 1e-6,
        "target": target(),
    }


def test_the_valid_call_that_the_refusals_start_from_is_served():
    assert recover_norm(**valid()).shape == (6, 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"short": jnp.ones((1, 3, 4))}, r"short has shape \(1, 3, 4\); it must have 2 axes"),
        ({"short": jnp.ones((3, 4), jnp.float16)}, "short is float16; use float32 or bfloat16"),
        ({"full": jnp.ones(24)}, r"full has shape \(24,\); it must have 2 axes"),
        ({"full": jnp.ones((6, 4), jnp.float16)}, "full is float16; use float32 or bfloat16"),
        ({"full": jnp.ones((3, 4))}, r"full has shape \(3, 4\); it must have shape \(6, 4\)"),
        ({"full": None}, "mode='sum' needs the full-length rows"),
        ({"mode": "tile"}, "mode='tile' does not use full-length rows"),
        ({"weight": jnp.ones(6)}, r"weight has shape \(6,\); it must have shape \(4,\)"),
        ({"weight": jnp.ones(4, jnp.float16)}, "weight is float16; use float32 or bfloat16"),
        ({"stride": 0}, "stride=0 must be positive"),
        ({"stride": -1}, "stride=-1 must be positive"),
        ({"stride": 2.0}, "stride=2.0"),
        ({"mode": "concat"}, "mode='concat' must be one of tile, sum, mean, max"),
        ({"site": "inside"}, "site='inside' must be one of before_norm, after_norm"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(InputError, match=message):
        recover_norm(**(valid() | changed))
