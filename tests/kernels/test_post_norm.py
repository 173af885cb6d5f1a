"""`post_norm`: against float64, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from funnel_kernels import InputError, post_norm
from option_grid import BACKENDS, EPS, normal, target


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("updated", [True, False])
def test_agrees_with_float64(backend, dtype, updated):
    x, update = 3 * normal(1, 37, 48).astype(jnp.dtype(dtype)), normal(2, 37, 48).astype(np.float32) + 0.5
    weight = 0.3 * normal(3, 2, 48).astype(np.float32)
    actual = post_norm(x, update if updated else None, weight, eps=EPS, target=target(backend))
    total = np.asarray(x, np.float64) + (update if updated else 0)
    centred = total - total.mean(axis=1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + EPS) * (1 + weight[0]) + weight[1]
    assert actual.dtype == jnp.dtype(dtype)
    rounding = 2**-8 if dtype == "bfloat16" else 2**-24
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=rounding, atol=4e-6)


def test_a_large_mean_does_not_hide_the_variance():
    x = (1000 + normal(4, 3, 64)).astype(np.float32)
    actual = post_norm(x, None, np.zeros((2, 64), np.float32), eps=1e-9, target=target())
    exact = x.astype(np.float64)
    expected = (exact - exact.mean(axis=1, keepdims=True)) / exact.std(axis=1, keepdims=True)
    np.testing.assert_allclose(actual, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": np.ones((2, 7), np.float32)}, r"weight has shape \(2, 7\)"),
        ({"update": np.ones((2, 8), np.float32)}, r"update has shape \(2, 8\)"),
        ({"update": jnp.ones((3, 8), jnp.bfloat16)}, "update is bfloat16 but x is float32"),
        ({"x": np.ones((3, 8), np.float16)}, "x is float16"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(changed, message):
    valid = {"x": np.ones((3, 8), np.float32), "update": None, "weight": np.ones((2, 8), np.float32)}
    with pytest.raises(InputError, match=message):
        post_norm(**(valid | changed), eps=EPS, target=target())
