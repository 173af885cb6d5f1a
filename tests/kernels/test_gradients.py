"""Reverse-mode derivatives of every op with backend "xla": against those of the reference, and finite differences."""

import importlib
import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import option_grid as grid
from funnel_kernels import attention, checks, pool_norm, recover_norm
from option_grid import AttentionCase, Packed, normal, target


def over_the_grid(dtypes: tuple[str, ...]) -> pytest.MarkDecorator:
    """Parametrises a test by `op` and `case`; by default few cases run, in which every value of every option occurs."""
    chosen = {
        op: {name: case for name, case in cases.items() if case.dtype in dtypes and not has_integers(case)}
        for op, cases in grid.CASES.items()
    }
    return pytest.mark.parametrize(
        ("op", "case"),
        [
            pytest.param(op, case, id=f"{op}-{name}", marks=() if name in few else pytest.mark.grid)
            for op, cases in chosen.items()
            for few in (grid.few_of(cases),)
            for name, case in cases.items()
        ],
    )


def has_integers(case: Any) -> bool:
    """Whether a case has weights of 8 bits: they have no derivative, and with them no product has one."""
    return getattr(case, "weights", None) in grid.ROUNDED


def function_of(op: str, case: Any, backend: str):
    """The implementation of a backend as a function of the arrays that have a derivative, and these arrays."""
    folder = "linear" if op in ("gated_linear", "linear_add_norm", "project_heads") else op
    try:
        module = importlib.import_module(f"funnel_kernels.{folder}.{backend}")
    except ModuleNotFoundError:  # XLA compiles the reference
        module = importlib.import_module(f"funnel_kernels.{folder}.reference")
    function = getattr(module, op)
    options = case.options() if hasattr(case, "options") else {}
    if op in ("add_norm", "linear_add_norm", "post_norm"):
        options["eps"] = grid.EPS
    if "target" in inspect.signature(function).parameters:
        options["target"] = target(backend)
    if op == "gated_linear":
        options["activation"] = case.gate
    leaves, tree = jax.tree.flatten([None if array is None else array for array in case.arrays()])
    moving = [index for index, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def call(*arrays):
        every = list(leaves)
        for index, array in zip(moving, arrays, strict=True):
            every[index] = array
        return jax.tree.leaves(function(*jax.tree.unflatten(tree, every), **options))

    return call, [leaves[index] for index in moving]


def cotangents(outputs) -> list[np.ndarray]:
    return [normal(90 + index, *output.shape).astype(output.dtype) for index, output in enumerate(outputs)]


def pull_back(call, arrays):
    """The results, and the gradients of their sum with the weights `cotangents`."""

    @jax.jit
    def run(*arrays):
        outputs, transpose = jax.vjp(call, *arrays)
        return outputs, transpose([jnp.asarray(array) for array in cotangents(outputs)])

    return run(*arrays)


@over_the_grid(grid.DTYPES)
def test_agrees_with_the_reference(op, case):
    gradients = []
    for backend in ("xla", "reference"):
        call, arrays = function_of(op, case, backend)
        gradients.append(pull_back(call, arrays)[1])
    for actual, expected, array in zip(*gradients, arrays, strict=True):
        assert actual.dtype == array.dtype
        tolerance = 1e-5 if case.dtype == actual.dtype == "float32" else 2**-6
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        assert np.isfinite(actual).all()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1))


@over_the_grid(("float32",))
def test_agrees_with_finite_differences_in_float64(op, case, monkeypatch):
    """Along one random direction, by differences of fourth order; bfloat16 has the same derivative."""
    step = 1e-6 if "max" in (getattr(case, "pool", ""), getattr(case, "mode", "")) else 1e-4  # no maximum moves
    monkeypatch.setattr(checks, "FLOAT_DTYPES", (jnp.float64,))
    with jax.enable_x64(True):
        call, arrays = function_of(op, case, "xla")
        arrays = [np.asarray(array, np.float64) for array in arrays]
        directions = [normal(70 + index, *array.shape) for index, array in enumerate(arrays)]
        outputs, gradients = pull_back(call, arrays)
        assert {output.dtype for output in outputs} == {np.dtype(np.float64)}
        weights = cotangents(outputs)

        @jax.jit
        def along(distance):
            moved = call(*(array + distance * direction for array, direction in zip(arrays, directions, strict=True)))
            return sum((weight * output).sum() for weight, output in zip(weights, moved, strict=True))

        near, far = (float(along(size) - along(-size)) for size in (step, 2 * step))
        expected = (8 * near - far) / (12 * step)
        terms = [np.asarray(gradient) * direction for gradient, direction in zip(gradients, directions, strict=True)]
        actual, size = sum(term.sum() for term in terms), sum(np.abs(term).sum() for term in terms)
        size = max(size, float(np.abs(along(0.0))))  # rows that see one key have no derivative by q or k
    assert abs(actual - expected) <= 1e-10 * max(size, 10)


@pytest.mark.parametrize("ties", [2, 3])
def test_rows_that_share_a_maximum_share_its_gradient(ties):
    x = np.full((4, 3), -1.0, np.float32)
    x[:ties] = 2.0
    real = np.array([True, True, True, False])
    x[3] = 9.0  # padding never wins
    pool = partial(pool_norm, stride=4, pool="max", eps=1e-6, target=target("xla"))
    (gradient,) = jax.vjp(lambda x: pool(x, real, np.zeros(3, np.float32))[0], x)[1](np.full((1, 3), 6.0, np.float32))
    np.testing.assert_array_equal(gradient, np.repeat([6.0 / ties] * ties + [0.0] * (4 - ties), 3).reshape(4, 3))


def test_operands_that_share_a_maximum_share_its_gradient():
    rows = np.array([[1.0, -2.0], [3.0, 0.5]], np.float32)
    recover = partial(recover_norm, stride=1, mode="max", eps=1e-6, target=target("xla"))
    outputs, transpose = jax.vjp(lambda short, full: recover(short, full, np.zeros(2, np.float32)), rows, rows)
    short, full = transpose(normal(3, *outputs.shape).astype(np.float32))
    np.testing.assert_array_equal(short, full)
    assert np.abs(short).max() > 0


def gradient_program(case: AttentionCase):
    q, k, v, lo, hi = case.arrays()
    run = lambda q, k, v: attention(q, k, v, lo, hi, **case.options(), target=target("xla"))  # noqa: E731
    return jax.jit(lambda q, k, v, out: jax.vjp(run, q, k, v)[1](out)).lower(q, k, v, q).compile()


def test_memory_is_linear_in_the_rows():
    """What it needs beyond the arguments is a few times q; 8192 x 8192 scores would take 256 MB a head."""
    case = AttentionCase(Packed((8192,)), heads=4, kv_heads=1, head_dim=32)
    rows = 8192 * 4 * 32 * 4  # bytes of q
    assert gradient_program(case).memory_analysis().temp_size_in_bytes < 6 * rows


def test_blocks_that_are_not_visible_are_not_visited():
    """Keys that no query sees are NaN, and the gradients are finite; 0 times NaN would not be."""
    case = AttentionCase(Packed((256,) * 8), heads=1, kv_heads=1, head_dim=8)
    q, k, v, lo, hi = case.arrays()
    k, v = (np.where(np.arange(len(k))[:, None] < 1024, array, np.nan) for array in (k, v))
    hi = np.where(lo < 1024, hi, lo)  # the second half sees nothing, and its keys are NaN
    run = lambda q, k, v: attention(q, k, v, lo, hi, **case.options(), target=target("xla"))  # noqa: E731
    outputs, transpose = jax.vjp(run, *(jnp.asarray(array, jnp.float32) for array in (q, k, v)))
    for gradient in transpose(jnp.ones_like(outputs)):
        assert np.isfinite(gradient).all()
        assert np.abs(gradient[:1024]).max() > 0
        np.testing.assert_array_equal(gradient[1024:], 0)
