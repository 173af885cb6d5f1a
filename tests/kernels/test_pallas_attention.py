"""Pallas attention beyond the shared grid: its list of visits, cores that share one, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from funnel_kernels import Target, attention, pallas_calls
from funnel_kernels.attention import pallas_tpu
from funnel_kernels.attention.pallas_tpu import Sizes, Visit, decode, encode, plan_visits
from funnel_kernels.target import Unsupported
from option_grid import ATTENTION_CASES, AttentionCase, Edges, Packed, Scattered, refuses, target

CASES = {
    "16 sequences of 512": Packed((512,) * 16),
    "ragged": Packed((300, 1, 77, 600, 130), tail=90),
    "window": Packed((900, 300), left=100, right=100),
    "queries on stride 2": Packed((900, 300), 2, 1, left=100, right=30, align=2),
    "edges": Edges(),
    "scattered": Scattered(300, 700),
    "padding": Packed((100,), tail=900),
}


# Windows, strides, shared keys, a softcap and both dtypes; the simulated TPU runs more of them, with smaller blocks.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if index % 2 == 0 else pytest.mark.grid)
        for index, (name, case) in enumerate([*ATTENTION_CASES.items()][::7])
        if not refuses("attention", "tpu", case)
    ],
)
def test_agrees_with_the_reference_in_the_plain_interpreter(case):
    """With the block sizes of a TPU v5e."""
    v5e = Target("tpu", "tpu", "TPU v5 lite", interpret=True)
    arrays, options = case.arrays(), case.options()
    out = jax.jit(lambda *arrays: attention(*arrays, target=v5e, **options))(*arrays)
    wide = [np.asarray(array, np.float32) for array in arrays[:3]]
    expected = attention(*wide, *arrays[3:], target=target("reference"), **options)
    tolerance = 2e-5 if case.dtype == "float32" else 2**-6
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("heads", [(2, 1), (2, 2)], ids=["visits are shared", "heads are shared"])
def test_two_cores_write_every_row_once(interpreted_pallas, heads):
    cores = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    v4 = Target("tpu", "tpu", "TPU v4", interpret=cores)
    case = AttentionCase(Packed((200, 1, 77), left=150, right=9), heads=heads[0], kv_heads=heads[1], head_dim=128)
    out = attention(*case.arrays(), **case.options(), target=v4)
    expected = attention(*case.arrays(), **case.options(), target=target("reference"))
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=1e-4)


def visits_of(layout, block_q, block_k, cores):
    lo, hi, keys = layout.intervals()
    blocks = -(-len(lo) // block_q), -(-keys // block_k)
    plan = jax.jit(plan_visits, static_argnums=(2, 3, 4, 5))
    begin, codes = plan(jnp.asarray(lo), jnp.asarray(hi), blocks, block_q, block_k, cores)
    visits = decode(np.asarray(codes))
    return lo, hi, np.asarray(begin), Visit(*(field[: begin[-1]] for field in visits))


@pytest.mark.parametrize(("block_q", "block_k", "cores"), [(128, 128, 2), (256, 512, 1), (512, 128, 2)])
@pytest.mark.parametrize("layout", CASES.values(), ids=CASES.keys())
def test_visits_are_the_blocks_between_the_first_and_the_last_key_that_is_seen(layout, block_q, block_k, cores):
    lo, hi, begin, visits = visits_of(layout, block_q, block_k, cores)
    expected = []
    for query_block, start in enumerate(range(0, len(lo), block_q)):
        bounds = [
            (a, b) for a, b in zip(lo[start : start + block_q], hi[start : start + block_q], strict=True) if a < b
        ]
        if not bounds:
            expected.append((query_block, 0, True, True, True))
            continue
        first, last = min(a for a, _ in bounds) // block_k, (max(b for _, b in bounds) - 1) // block_k
        expected += [(query_block, block, block == first, block == last, False) for block in range(first, last + 1)]
        for block in range(first, last + 1):
            seen_by_all = all(a <= block * block_k and (block + 1) * block_k <= b for a, b in bounds)
            index = len(expected) - (last + 1 - block)
            assert visits.whole[index] == seen_by_all
    found = zip(visits.query_block, visits.key_block, visits.first, visits.last, visits.empty, strict=True)
    assert [tuple(map(int, visit)) for visit in found] == [tuple(map(int, visit)) for visit in expected]
    assert begin[0] == 0
    assert begin[-1] == len(expected)
    for cut in begin[1:-1]:  # between two query blocks, and no core without work
        assert 0 < cut < len(expected) or len(lo) <= block_q
        assert len(lo) <= block_q or visits.first[cut]


def test_packed_sequences_of_a_block_each_take_one_visit_each():
    _, _, begin, visits = visits_of(CASES["16 sequences of 512"], 512, 512, 1)
    assert begin.tolist() == [0, 16]
    assert visits.query_block.tolist() == visits.key_block.tolist() == list(range(16))
    assert visits.whole.all()


def test_two_cores_have_about_the_same_number_of_visits():
    _, _, begin, _ = visits_of(Packed((8192, *(64,) * 128)), 512, 512, 2)
    shares = np.diff(begin)
    assert shares.sum() == 16 * 16 + 16
    assert abs(shares[0] - shares[1]) <= 16


def test_a_visit_survives_its_code():
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 2**13, 100).astype(np.int32), generator.integers(0, 2**14, 100).astype(np.int32)
    visit = Visit(*map(jnp.asarray, blocks), *(jnp.asarray(generator.random(100) < 0.5) for _ in range(4)))
    for field, decoded in zip(visit, decode(encode(visit)), strict=True):
        np.testing.assert_array_equal(field, decoded)


@pytest.mark.parametrize(
    ("layout", "visited"),
    [
        (Packed((768,), left=64, right=64), range(128, 640)),
        (Packed((768,), right=0), range(512)),
        (Packed((256, 256, 256)), range(256, 512)),
    ],
    ids=["window", "causal", "packed"],
)
def test_keys_outside_the_blocks_that_are_seen_are_never_read(interpreted_pallas, layout, visited):
    case = AttentionCase(layout, heads=2, head_dim=128)
    q, k, v, lo, hi = case.arrays()
    attend = jax.jit(lambda k, v: attention(q, k, v, lo, hi, **case.options(), target=target("tpu"))[256:512])
    clean = attend(k, v)
    outside = ~np.isin(np.arange(len(k)), visited)[:, None]
    k, v = (np.where(outside, np.float32(np.nan), array) for array in (k, v))
    np.testing.assert_array_equal(attend(k, v), clean)


def shapes(rows, heads, kv_heads, head_dim, dtype=jnp.bfloat16):
    arrays = [jax.ShapeDtypeStruct((rows, count * head_dim), dtype) for count in (heads, kv_heads, kv_heads)]
    return *arrays, *[jax.ShapeDtypeStruct((rows,), jnp.int32)] * 2


@pytest.mark.parametrize(
    ("device", "rows", "heads", "head_dim", "reason"),
    [
        ("TPU v6 lite", 64, (1, 1), 512, "heads are 512 wide; the kernel supports at most 256"),
        (
            "TPU v4",
            4096,
            (32, 1),
            256,
            "32 query heads of width 256 on one key/value head need .* bytes of vector memory",
        ),
        (
            "TPU v4",
            2**17,
            (8, 1),
            256,
            "131072 queries .* need up to .* visits; the kernel supports 65536 visits.*max_batch_tokens",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(device, rows, heads, head_dim, reason):
    options = {"heads": heads[0], "kv_heads": heads[1], "scale": 1.0, "softcap": None}
    options["target"] = Target("tpu", "tpu", device)
    with pytest.raises(Unsupported, match=reason):
        jax.eval_shape(lambda *arrays: pallas_tpu.attention(*arrays, **options), *shapes(rows, *heads, head_dim))


def test_more_query_blocks_than_a_visit_can_number_are_refused():
    q, k, v, lo, hi = shapes(2**23 + 1, 1, 1, 128)
    k = v = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16)  # one key block
    options = {"heads": 1, "kv_heads": 1, "scale": 1.0, "softcap": None, "target": Target("tpu", "tpu", "TPU v6 lite")}
    with pytest.raises(Unsupported, match=r"need up to 8193 x 1 visits; .* of 8192 query blocks"):
        jax.eval_shape(lambda *arrays: pallas_tpu.attention(*arrays, **options), q, k, v, lo, hi)


@pytest.mark.parametrize("generation", pallas_calls.GENERATIONS.values(), ids=lambda generation: generation.name)
@pytest.mark.parametrize("columns", [64, 256, 512, 2048, 4096])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_sizes_are_whole_registers_and_shrink_with_the_width(generation, columns, dtype):
    sizes = pallas_tpu.rule(generation, jnp.dtype(dtype), columns)
    assert isinstance(sizes, Sizes)
    assert all(size % 128 == 0 and size >= 128 for size in sizes)
    assert sizes.block_q <= 2 * pallas_tpu.SIZES[generation.name].block_q
    assert pallas_tpu.rule(generation, jnp.dtype(dtype), 2 * columns).block_q <= sizes.block_q
