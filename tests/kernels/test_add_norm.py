"""`add_norm`: every implementation against float64 loops, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funnel_kernels import InputError, add_norm
from option_grid import BACKENDS, EPS, AddNormCase, normal, over_the_grid, target

ROUNDING = {"float32": 2**-24, "bfloat16": 2**-8}  # the largest relative error of rounding to a dtype


def norm(row, weight):
    return row / np.sqrt(np.mean(row**2) + EPS) * (1 + np.asarray(weight, np.float64))


def jitted(backend):
    def run(x, update, weight, update_weight, scale):
        options = {"update_weight": update_weight, "scale": scale}
        return add_norm(x, update, weight, **options, eps=EPS, target=target(backend))

    return jax.jit(run)


def within(actual, expected, dtype):
    """Whether it is one rounding away, after arithmetic in float32."""
    error = np.abs(np.asarray(actual, np.float64) - expected)
    return (error <= ROUNDING[dtype] * np.abs(expected) + 2e-6 * np.maximum(np.abs(expected), 1)).all()


@over_the_grid("add_norm", ["reference", "cpu"])  # the others take the reference
def test_agrees_with_float64(backend, case):
    arrays = case.arrays()
    total, normed = jitted(backend)(*arrays)
    assert total.shape == normed.shape == (case.rows, case.width)
    assert total.dtype == normed.dtype == jnp.dtype(case.dtype)
    x, update, weight, update_weight, scale = arrays
    for row in range(case.rows):
        expected = np.asarray(x[row], np.float64)
        if update is not None:
            added = np.asarray(update[row], np.float64)
            expected = expected + (added if update_weight is None else norm(added, update_weight))
            expected = expected if scale is None else expected * float(scale[0])
        assert within(total[row], expected, case.dtype)
        # The norm reads the sum as it was rounded.
        assert within(normed[row], norm(np.asarray(total[row], np.float64), weight), case.dtype)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend not in ("reference", "cpu")])
def test_without_kernels_of_their_own_backends_take_the_reference(backend):
    arrays = AddNormCase("normed", "bfloat16", "float32").arrays()
    for ours, expected in zip(jitted(backend)(*arrays), jitted("reference")(*arrays), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_the_sum_is_rounded_where_a_compiler_would_keep_more_bits():
    """XLA for GPUs leaves out a conversion to bfloat16 that another one undoes (`xla_allow_excess_precision`)."""
    arrays = AddNormCase("normed", "bfloat16", "float32").arrays()
    assert "reduce_precision" in jitted("reference").lower(*arrays).as_text()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_an_update_x_is_handed_on(backend):
    x, _, weight, _, _ = AddNormCase("none", "bfloat16").arrays()
    total, normed = jitted(backend)(x, None, weight, None, None)
    np.testing.assert_array_equal(total, x)
    np.testing.assert_array_equal(normed, jitted(backend)(x, np.zeros_like(x), weight, None, None)[1])


def valid():
    return {
        "x": jnp.asarray(normal(0, 6, 4), jnp.bfloat16),
        "update": jnp.asarray(normal(1, 6, 4), jnp.float32),
        "weight": jnp.ones(4),
        "update_weight": jnp.ones(4),
        "eps": 1e-6,
        "target": target(),
    }


def test_the_valid_call_that_the_refusals_start_from_is_served():
    assert [rows.shape for rows in add_norm(**valid())] == [(6, 4), (6, 4)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": jnp.ones((1, 6, 4))}, r"x has shape \(1, 6, 4\); it must have 2 axes"),
        ({"x": jnp.ones((6, 4), jnp.float16)}, "x is float16; use float32 or bfloat16"),
        ({"update": jnp.ones(24)}, r"update has shape \(24,\); it must have 2 axes"),
        ({"update": jnp.ones((5, 4))}, r"update has shape \(5, 4\); it must have shape \(6, 4\)"),
        ({"update": jnp.ones((6, 4), jnp.float16)}, "update is float16; use float32 or bfloat16"),
        (
            {"x": jnp.ones((6, 4)), "update": jnp.ones((6, 4), jnp.bfloat16)},
            "update is bfloat16 but x is float32; cast update",
        ),
        ({"update": None}, "update_weight is given without an update; give update too"),
        ({"weight": jnp.ones(6)}, r"weight has shape \(6,\); it must have shape \(4,\)"),
        ({"weight": jnp.ones(4, jnp.float16)}, "weight is float16; use float32 or bfloat16"),
        ({"update_weight": jnp.ones(6)}, r"update_weight has shape \(6,\); it must have shape \(4,\)"),
        ({"update": None, "update_weight": None, "scale": jnp.ones(1)}, "scale is given without an update"),
        ({"scale": jnp.ones(2)}, r"scale has shape \(2,\); it must have shape \(1,\)"),
        ({"scale": jnp.ones(1, jnp.float16)}, "scale is float16; use float32 or bfloat16"),
        ({"update_weight": jnp.ones((1, 4))}, r"update_weight has shape \(1, 4\); it must have 1 axes"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(InputError, match=message):
        add_norm(**(valid() | changed))
