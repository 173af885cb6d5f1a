"""`post_norm`: against float64, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from funnel_kernels import InputError, post_norm
from option_grid import BACKENDS, EPS, POST_NORM_CASES, PostNormCase, normal, target


@pytest.mark.parametrize("case", POST_NORM_CASES.values(), ids=POST_NORM_CASES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])  # the others take the reference
def test_agrees_with_float64(backend, case):
    x, update, weight = case.arrays()
    actual = post_norm(x, update, weight, eps=EPS, target=target(backend))
    total, (factor, added) = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    if update is not None:
        total = total + np.asarray(update, np.float64)
    centred = total - total.mean(axis=1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + EPS) * (1 + factor) + added
    assert actual.dtype == jnp.dtype(case.dtype)
    rounding = 2**-8 if case.dtype == "bfloat16" else 2**-24
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=rounding, atol=4e-6)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend not in ("reference", "cpu")])
def test_without_kernels_of_their_own_backends_take_the_reference(backend):
    x, update, weight = PostNormCase(True, "bfloat16").arrays()
    ours, expected = (post_norm(x, update, weight, eps=EPS, target=target(name)) for name in (backend, "reference"))
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_large_mean_does_not_hide_the_variance(backend):
    x = (1000 + normal(4, 3, 67)).astype(np.float32)
    actual = post_norm(x, None, np.zeros((2, 67), np.float32), eps=1e-9, target=target(backend))
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
