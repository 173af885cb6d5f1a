"""`relative_attention`: every implementation against float64 loops, refusals, what the blocked one avoids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funnel_kernels import InputError, Record, Target, relative_attention
from option_grid import ATTENTION_TOLERANCE, Packed, RelativeCase, largest_array, over_the_grid, target


@functools.cache
def oracle(case):
    """Float64, one query at a time. Returns the output and `sum of weight * |v|`, as that of `attention`."""
    arrays = case.arrays()
    q, k, v, biases, offsets, same = (np.asarray(arrays[index], np.float64) for index in (0, 1, 2, 7, 8, 9))
    lo, hi, query_types, key_types = arrays[3:7]
    q, k, v, biases, offsets, same = (
        array.reshape(len(array), case.heads, case.head_dim) for array in (q, k, v, biases, offsets, same)
    )
    out, size = np.zeros((2, *q.shape))
    for i in range(len(q)):
        keys = np.arange(lo[i], hi[i])
        if not len(keys):
            continue
        is_same = (query_types[i] == key_types[keys]) | (query_types[i] == 2) | (key_types[keys] == 2)
        content, position, kind = (q[i] + bias for bias in biases)
        distance = case.stride * i - keys
        has_relative = np.ones(len(keys))
        if case.separate_first:
            has_relative[0] = 0
            has_relative *= case.stride * i > lo[i]
        for h in range(case.heads):
            table = offsets[:, h]
            near = np.clip(len(table) // 2 + distance, 0, len(table) - 1)
            relative = table[near] @ position[h] + same[is_same.astype(int), h] @ kind[h]
            scores = case.options()["scale"] * (k[keys, h] @ content[h] + has_relative * relative)
            weights = np.exp(scores - scores.max())
            weights = weights / weights.sum()
            out[i, h], size[i, h] = weights @ v[keys, h], weights @ np.abs(v[keys, h])
    return out.reshape(len(q), -1), size.reshape(len(q), -1)


@over_the_grid("relative_attention", ("reference", "xla", "cpu"))
def test_agrees_with_float64(backend, case):
    run = jax.jit(lambda *arrays: relative_attention(*arrays, **case.options(), target=target(backend)))
    actual, (expected, size) = run(*case.arrays()), oracle(case)
    assert actual.shape == expected.shape
    assert actual.dtype == jnp.dtype(case.dtype)
    error = np.abs(np.asarray(actual, np.float64) - expected)
    # In bfloat16 the queries are rounded once more, after a bias is added.
    tolerance = ATTENTION_TOLERANCE[case.dtype] * (1 if case.dtype == "float32" else 2)
    assert (error <= tolerance * size + 1e-30).all(), (error / np.maximum(size, 1e-30)).max()


@pytest.mark.parametrize("backend", ["triton", "tpu"])
def test_other_backends_leave_it_to_xla_and_say_so(backend):
    case, record = RelativeCase(Packed((9, 4))), Record()
    where = target(backend)
    here = Target(
        where.backend, where.platform, where.kind, where.architecture, interpret=where.interpret, record=record
    )
    actual = relative_attention(*case.arrays(), **case.options(), target=here)
    np.testing.assert_allclose(actual, oracle(case)[0], rtol=1e-5, atol=1e-5)
    assert [answer.backend for answer in record.served["relative_attention"]] == ["xla"]


def test_a_distance_counts_the_same_wherever_the_sequence_is():
    case = RelativeCase(Packed((40,), tail=300))
    q, k, v, lo, hi, query_types, key_types, *weights = case.arrays()
    moved = [np.roll(array, 257, axis=0) for array in (q, k, v, lo, hi, query_types, key_types)]
    for bound in moved[3:5]:
        bound[257:297] += 257
    run = jax.jit(lambda *arrays: relative_attention(*arrays, **case.options(), target=target("xla")))
    first, second = run(q, k, v, lo, hi, query_types, key_types, *weights), run(*moved, *weights)
    np.testing.assert_allclose(first[:40], second[257:297], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_no_array_has_a_score_for_every_pair_or_for_every_distance(stride):
    case = RelativeCase(Packed((2048,), stride, 1, align=stride))
    run = jax.jit(lambda *arrays: relative_attention(*arrays, **case.options(), target=target("xla")))
    arrays = case.arrays()
    largest = largest_array(run.lower(*arrays).compile().as_text())
    assert largest <= max(arrays[0].shape[0] * 2048 / 4, 2 * arrays[8].size)


def valid():
    case = RelativeCase(Packed((5, 3)))
    names = ("q", "k", "v", "lo", "hi", "query_types", "key_types", "biases", "offsets", "same")
    return dict(zip(names, map(jnp.asarray, case.arrays()), strict=True)) | case.options() | {"target": target()}


def test_the_valid_call_that_the_refusals_start_from_is_served():
    assert relative_attention(**valid()).shape == (8, 16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"heads": 3}, "q is 16 wide; heads=3 must be positive and divide its width"),
        ({"stride": 0}, "stride=0 must be a positive integer"),
        ({"k": jnp.ones((8, 16), jnp.bfloat16)}, "k is bfloat16; it must be float32"),
        ({"v": jnp.ones((7, 16))}, r"v has shape \(7, 16\); it must have shape \(8, 16\)"),
        ({"biases": jnp.ones((2, 16))}, r"biases has shape \(2, 16\); it must have shape \(3, 16\)"),
        ({"same": jnp.ones((3, 16))}, r"same has shape \(3, 16\)"),
        ({"offsets": jnp.ones((10, 16))}, "offsets has 10 rows; it must have an odd number"),
        ({"lo": jnp.zeros(8)}, "lo is float32; it must be int32"),
        ({"key_types": jnp.zeros(7, jnp.int32)}, r"key_types has shape \(7,\); it must have shape \(8,\)"),
        ({"k": jnp.ones((0, 16)), "v": jnp.ones((0, 16))}, "at least one row"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(changed, message):
    with pytest.raises(InputError, match=message):
        relative_attention(**(valid() | changed))
