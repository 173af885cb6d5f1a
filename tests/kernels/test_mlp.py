"""`mlp`: its ops one after another, whatever the blocks of rows."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funnel_kernels import InputError, Target, gated_linear, linear_add_norm, mlp, prepare
from option_grid import DTYPES, EPS, normal, target

module = importlib.import_module("funnel_kernels.mlp")  # the package has the function by this name


def arrays(dtype, rows, hidden=24, width=40):
    x, normed = normal(30, 2, rows, width).astype(jnp.dtype(dtype))
    gate_up, down = normal(31, 2 * hidden, width) / width**0.5, normal(32, width, hidden) / hidden**0.5
    norm_weight, update_weight = 0.3 * normal(33, 2, width).astype(jnp.dtype(dtype))
    return x, normed, gate_up.astype(jnp.dtype(dtype)), down.astype(jnp.dtype(dtype)), norm_weight, update_weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("most_rows", [1, 3, 7, 100])
def test_blocks_of_rows_change_nothing(monkeypatch, dtype, most_rows):
    """As many rows as a block holds, fewer, and numbers that do not divide them."""
    x, normed, gate_up, down, norm_weight, update_weight = arrays(dtype, 23)
    monkeypatch.setattr(module, "HIDDEN_PER_BLOCK", 24 * most_rows)
    here = target("xla")
    options = {"update_weight": update_weight, "eps": EPS, "target": here}
    gate_up_bias, down_bias = (normal(34, size).astype(jnp.dtype(dtype)) for size in (48, 40))
    hidden = gated_linear(normed, gate_up, bias=gate_up_bias, activation="silu", target=here)
    expected = linear_add_norm(hidden, down, x, norm_weight, bias=down_bias, **options)
    biases = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
    blocks = mlp(x, normed, gate_up, down, norm_weight, activation="silu", **biases, **options)
    for ours, whole in zip(blocks, expected, strict=True):
        tolerance = 1e-5 if dtype == "float32" else 2**-7
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(whole, np.float32), rtol=tolerance, atol=4 * tolerance
        )


def test_an_accelerator_takes_all_rows_at_once(monkeypatch):
    monkeypatch.setattr(module, "HIDDEN_PER_BLOCK", 24 * 5)
    x, normed, gate_up, down, norm_weight, _ = arrays("float32", 23)
    for platform, loops in (("gpu", 0), ("tpu", 0), ("cpu", 1)):
        run = jax.make_jaxpr(lambda *a, p=platform: mlp(*a, activation="gelu_tanh", eps=EPS, target=Target("xla", p)))
        text = str(run(x, normed, gate_up, down, norm_weight))
        assert text.count("scan") + text.count("while") >= loops
        assert ("scan" in text or "while" in text) == bool(loops)


def test_packed_weights_are_taken():
    x, normed, gate_up, down, norm_weight, _ = arrays("float32", 9)
    here = target()
    packed = prepare(gate_up, parts=2, target=here), prepare(down, target=here)
    ours = mlp(x, normed, *packed, norm_weight, activation="gelu_tanh", eps=EPS, target=here)
    expected = mlp(x, normed, gate_up, down, norm_weight, activation="gelu_tanh", eps=EPS, target=target("reference"))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused():
    x, normed, gate_up, down, norm_weight, _ = arrays("float32", 4)
    with pytest.raises(InputError, match=r"weight has shape \(40, 24\); it must have shape \(40, 20\)"):
        mlp(x, normed, gate_up[:40], down, norm_weight, activation="gelu_tanh", eps=EPS, target=target())
    with pytest.raises(InputError, match=r"add has shape \(3, 40\)"):
        mlp(x[:3], normed, gate_up, down, norm_weight, activation="gelu_tanh", eps=EPS, target=target())


@pytest.mark.parametrize("rows", [1, 1024, 1025, 2500])
def test_in_blocks_is_the_function_of_every_row(rows):
    x, y = np.random.default_rng(rows).standard_normal((2, rows, 3)).astype(np.float32)
    seen = []

    def function(x, y):
        seen.append(x.shape[0])
        return 2 * x + y, y + 1

    new_x, new_y = module.in_blocks(function, 1024, jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_array_equal(new_x, 2 * x + y)
    np.testing.assert_array_equal(new_y, y + 1)
    assert seen == [rows // -(-rows // 1024) + (rows % -(-rows // 1024) > 0)]  # near-equal blocks of at most 1024 rows
