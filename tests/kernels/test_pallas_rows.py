"""The row-wise Pallas kernels beyond the shared grid: Pallas's own interpreter, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funnel_kernels import BackendUnavailable, Target, pool_norm, recover_norm
from funnel_kernels.pallas_rows import MEMORY, windows_per_block
from funnel_kernels.target import Unsupported
from option_grid import POOL_CASES, RECOVER_CASES, refuses

TPU = Target("tpu", "tpu", "TPU v4", interpret=True)


def served(op, cases):
    """Every eleventh case, most of them such as the simulated TPU does not run; every third of these by default."""
    kept = [(name, case) for name, case in cases.items() if not refuses(op, "tpu", case)][5::11]
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=name, marks=() if index % 3 == 0 else pytest.mark.grid)
            for index, (name, case) in enumerate(kept)
        ],
    )


def assert_same(function, case):
    """Both backends, compiled, give the same up to one rounding of the result."""
    results = [
        jax.jit(lambda *arrays, target=target: function(*arrays, target=target, **case.options()))(*case.arrays())
        for target in (TPU, Target("reference"))
    ]
    tolerance = 1e-6 if case.dtype == "float32" else 2**-7
    for ours, expected in zip(*map(jax.tree.leaves, results), strict=True):
        assert ours.dtype == expected.dtype
        ours, expected = (np.asarray(array, np.float32) for array in (ours, expected))
        np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=4 * tolerance)


@served("pool_norm", POOL_CASES)
def test_pool_norm_in_the_plain_interpreter(case):
    assert_same(pool_norm, case)


@served("recover_norm", RECOVER_CASES)
def test_recover_norm_in_the_plain_interpreter(case):
    assert_same(recover_norm, case)


def test_a_window_that_does_not_fit_is_refused():
    assert windows_per_block(10_000, 1024) % 16 == 0
    with pytest.raises(
        Unsupported, match=f"16 windows, the smallest block, need {16 * MEMORY:,} bytes of vector memory"
    ):
        windows_per_block(64, MEMORY)


@pytest.mark.parametrize("width", [1, 48, 100, 127, 130])
def test_rows_that_do_not_fill_registers_are_refused(width):
    x, weight = jnp.ones((8, width)), jnp.ones(width)
    with pytest.raises(BackendUnavailable, match=f"rows are {width} wide; the width must be a multiple of 128"):
        pool_norm(x, jnp.ones(8, bool), weight, stride=2, pool="max", eps=1e-6, target=TPU)
    with pytest.raises(BackendUnavailable, match=f"rows are {width} wide; the width must be a multiple of 128"):
        recover_norm(x, None, weight, stride=2, mode="tile", eps=1e-6, target=TPU)
