"""Packing against a brute force that places one token at a time, written from the semantics in docs/semantics.md."""

import itertools
import math
from typing import NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funnel_engine import packing
from funnel_engine.config import FunnelConfig, ModelConfig, Rope
from funnel_kernels import ConfigError, InputError


def model(*layer_types, attention="bidirectional", causal_window=(3, 0), bidirectional_window=(2, 2)):
    return ModelConfig(
        family="gemma2",
        vocab_size=1000,
        hidden_size=8,
        intermediate_size=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        layer_types=layer_types,
        query_scale=1.0,
        attention=attention,
        max_positions=1000,
        full_rope=Rope(10_000.0),
        sliding_rope=Rope(10_000.0),
        causal_window=causal_window,
        bidirectional_window=bidirectional_window,
    )


class Row(NamedTuple):
    """A row of some stride: the sequence whose tokens it holds, and which they are."""

    sequence: int
    tokens: list[int]


def brute_rows(lengths, funnel, stride, rows):
    """All rows of one stride, `None` where a row holds no token, placed token by token."""
    total_stride = funnel.total_stride
    axis: list[tuple[int, int] | None] = []
    for sequence, length in enumerate(lengths):
        while funnel.keep_first and len(axis) % total_stride != total_stride - 1:
            axis.append(None)
        while funnel.keep_last and (len(axis) + length - 1) % total_stride:
            axis.append(None)
        axis += [(sequence, token) for token in range(length)]
        while len(axis) % total_stride:
            axis.append(None)
    assert len(axis) <= rows
    axis += [None] * (rows - len(axis))
    out: list[Row | None] = []
    for start in range(0, rows, stride):
        held = [token for token in axis[start : start + stride] if token is not None]
        assert len({sequence for sequence, _ in held}) <= 1, "a window holds rows of two sequences"
        out.append(Row(held[0][0], [token for _, token in held]) if held else None)
    return out


def brute_mask(queries, keys, layer_type, config):
    """[Nq, Nk] bool: which rows see each other, pair by pair."""
    mask = np.zeros((len(queries), len(keys)), bool)
    for (i, query), (j, key) in itertools.product(enumerate(queries), enumerate(keys)):
        if query is None or key is None or query.sequence != key.sequence:
            continue
        distance = key.tokens[0] - query.tokens[0]  # in tokens, between the first real tokens of both rows
        if config.attention == "causal" and distance > 0:
            continue
        if layer_type == "sliding":
            left, right = config.causal_window if config.attention == "causal" else config.bidirectional_window
            if not -left <= distance <= right:
                continue
        mask[i, j] = True
    return mask


def brute_position(row, index, rule):
    first, last = row.tokens[0], row.tokens[-1]
    return {"first": first, "last": last, "mid": (first + last) / 2, "compact": index}[rule]


@st.composite
def packings(draw):
    """A model, a funnel of up to two levels, and lengths."""
    layers = draw(st.lists(st.sampled_from(["full", "sliding"]), min_size=3, max_size=4))
    radius = st.integers(0, 12)
    config = model(
        *layers,
        attention=draw(st.sampled_from(["bidirectional", "causal"])),
        causal_window=(draw(radius), 0),
        bidirectional_window=(draw(radius), draw(radius)),
    )
    strides = [1] * len(layers)
    for layer in draw(st.lists(st.integers(0, len(layers) - 1), max_size=2, unique=True)):
        strides[layer] = draw(st.integers(2, 4))
    query_only = draw(st.booleans())
    kept = draw(st.sampled_from([None, "keep_first", "keep_last"]))
    funnel = FunnelConfig(
        tuple(strides),
        pool_query_only=query_only,
        keep_first=kept == "keep_first",
        keep_last=kept == "keep_last",
        positions=draw(
            st.sampled_from(["first", "last", "mid"] if query_only else ["first", "last", "mid", "compact"])
        ),
    )
    lengths = draw(st.lists(st.integers(1, 40), min_size=0, max_size=5))
    return config, funnel, np.array(lengths, np.int32), draw(st.integers(0, 3))


def pack(config, funnel, lengths, spare=0):
    """Packs tokens 1, 2, 3, ... into the rows they need and `spare` times the total stride more."""
    plan = packing.make_plan(config, funnel)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    rows = int(plan.rows_needed(lengths).sum()) + spare * funnel.total_stride
    return plan, packing.pack(plan, np.arange(1, offsets[-1] + 1, dtype=np.int32), offsets, rows), rows


@settings(max_examples=300, deadline=None, derandomize=True)
@given(packings())
def test_a_packed_batch_is_what_brute_force_makes_of_it(packed):
    config, funnel, lengths, spare = packed
    plan, batch, rows = pack(config, funnel, lengths, spare)

    levels, stride = [1], 1
    attends = set()
    for layer_type, pool in zip(config.layer_types, funnel.strides, strict=True):
        attends.add((stride * pool, stride if funnel.pool_query_only else stride * pool, layer_type))
        stride *= pool
        levels.append(stride)
    assert set(batch.levels) == set(plan.strides) == set(levels)
    assert set(batch.intervals) == attends

    brute = {s: brute_rows(lengths, funnel, s, rows) for s in set(levels)}
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = [0 if row is None else starts[row.sequence] + row.tokens[0] + 1 for row in brute[1]]
    np.testing.assert_array_equal(batch.ids, ids)
    assert batch.ids.dtype == np.int32

    for s, level in batch.levels.items():
        np.testing.assert_array_equal(level.real, [row is not None for row in brute[s]])
        first, held_rows = packing.spans(plan, lengths, s)
        for sequence in range(len(lengths)):
            held = [i for i, row in enumerate(brute[s]) if row is not None and row.sequence == sequence]
            assert held == list(range(first[sequence], first[sequence] + held_rows[sequence]))
            expected = [brute_position(brute[s][i], index, funnel.positions) for index, i in enumerate(held)]
            np.testing.assert_array_equal(level.positions[held], expected)
        assert (level.real.dtype, level.positions.dtype) == (np.bool_, np.float32)

    for (query_stride, key_stride, layer_type), (lo, hi) in batch.intervals.items():
        expected = brute_mask(brute[query_stride], brute[key_stride], layer_type, config)
        keys = np.arange(rows // key_stride)
        np.testing.assert_array_equal((lo[:, None] <= keys) & (keys < hi[:, None]), expected)
        assert (lo >= 0).all()
        assert (hi <= rows // key_stride).all()
        assert (lo.dtype, hi.dtype) == (np.int32, np.int32)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(packings())
def test_the_kept_token_is_alone_at_every_level_and_windows_beyond_the_first_and_the_last_are_full(packed):
    config, funnel, lengths, _ = packed
    rows = int(packing.make_plan(config, funnel).rows_needed(lengths).sum())
    stride = 1
    for pool in funnel.strides:
        stride *= pool
        found = [row for row in brute_rows(lengths, funnel, stride, rows) if row]
        for sequence, length in enumerate(lengths):
            held = [len(row.tokens) for row in found if row.sequence == sequence]
            others = length - 1
            full, left_over = [stride] * (others // stride), [others % stride] if others % stride else []
            if funnel.keep_first:
                assert held == [1, *full, *left_over]
            elif funnel.keep_last:
                assert held == [*left_over, *full, 1]
            else:
                assert held == [stride] * (length // stride) + ([length % stride] if length % stride else [])


def test_the_pictures_of_the_module():
    lengths = np.array([3, 4], np.int32)
    _, batch, _ = pack(model("full", "full"), FunnelConfig.after(1), lengths)
    assert batch.ids.tolist() == [1, 2, 3, 0, 4, 5, 6, 7]
    plan, batch, _ = pack(model("full", "full"), FunnelConfig.after(1, keep_first=True), lengths)
    assert batch.ids.tolist() == [0, 1, 2, 3, 0, 4, 5, 6, 7, 0]
    assert batch.levels[2].real.tolist() == [True] * 5
    spans = packing.spans(plan, lengths, 2)
    assert (spans.first.tolist(), spans.rows.tolist()) == ([0, 2], [2, 3])
    plan, batch, _ = pack(model("full", "full"), FunnelConfig.after(1, keep_last=True), lengths)
    assert batch.ids.tolist() == [1, 2, 3, 0, 0, 4, 5, 6, 7, 0]
    spans = packing.spans(plan, lengths, 2)
    assert (spans.first.tolist(), spans.rows.tolist()) == ([0, 2], [2, 3])


def test_a_row_at_the_left_edge_of_its_window_sees_the_first_row():
    """With keep_first a pooled row's window begins before the sequence does; its place is still its first token."""
    config = model("sliding", "sliding", bidirectional_window=(3, 3))
    _, batch, _ = pack(config, FunnelConfig((4,), keep_first=True), np.array([13], np.int32))
    lo, hi = batch.intervals[4, 4, "sliding"]  # places 0, 1, 5, 9
    assert lo.tolist() == [0, 0, 2, 3]
    assert hi.tolist() == [2, 2, 3, 4]


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("length", [256, 257, 512, 513, 1025])
def test_long_windows_end_where_they_should(attention, length):
    config = model("sliding", attention=attention, causal_window=(511, 0), bidirectional_window=(256, 256))
    _, batch, _ = pack(config, FunnelConfig(), np.array([3, length], np.int32))
    lo, hi = batch.intervals[1, 1, "sliding"]
    token = np.arange(length)
    left, right = (511, 0) if attention == "causal" else (256, 256)
    np.testing.assert_array_equal(lo[3:], 3 + np.maximum(token - left, 0))
    np.testing.assert_array_equal(hi[3:], 3 + np.minimum(token + right + 1, length))


def test_a_window_without_end_hides_nothing():
    endless = 2**31 - 2  # a config may say "no window" with the largest integer
    config = model("sliding", bidirectional_window=(endless, endless))
    _, batch, _ = pack(config, FunnelConfig(), np.array([2, 5], np.int32))
    lo, hi = batch.intervals[1, 1, "sliding"]
    assert lo.tolist() == [0] * 2 + [2] * 5
    assert hi.tolist() == [2] * 2 + [7] * 5


def test_a_bucket_that_is_too_small_is_refused():
    plan = packing.make_plan(model("full", "full"), FunnelConfig.after(1, stride=4))
    ids, offsets = np.arange(9, dtype=np.int32), np.array([0, 4, 9], np.int32)
    packing.pack(plan, ids, offsets, 12)
    with pytest.raises(InputError, match="2 sequences need 12 rows, more than the 8 of the bucket"):
        packing.pack(plan, ids, offsets, 8)


def test_a_funnel_that_does_not_fit_the_model_has_no_plan():
    with pytest.raises(ConfigError, match="3 strides but the model has only 2 layers"):
        packing.make_plan(model("full", "full"), FunnelConfig((1, 1, 2)))


def test_batches_of_one_bucket_share_one_program():
    """What jit sees, names and shapes, depends on the number of rows only, not on the sequences."""
    plan = packing.make_plan(model("sliding", "full", "full"), FunnelConfig((1, 2, 2), pool_query_only=True))
    seen = set()
    for lengths in ([], [1], [32], [4, 5, 6], [1] * 8):
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        batch = packing.pack(plan, np.ones(offsets[-1], np.int32), offsets, 32)
        leaves, structure = jax.tree.flatten(batch)
        seen.add((structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)))
    assert len(seen) == 1


# Buckets and splitting.

PLANS = [
    packing.make_plan(model(*["full"] * 4), FunnelConfig(strides, **kept))
    for strides in ((), (1, 2), (3,), (2, 1, 2), (4, 2), (5, 1, 3))
    for kept in ({}, {"keep_first": True}, {"keep_last": True})
]
plans = st.sampled_from(PLANS)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(plans, st.integers(1, 20_000), st.sampled_from(["cpu", "gpu", "tpu"]))
def test_buckets_bound_the_padding(plan, max_tokens, platform):
    alignment = packing.row_alignment(platform)
    assert alignment == (4 if platform == "cpu" else 8)
    buckets = packing.row_buckets(plan, max_tokens, alignment=alignment)
    unit = alignment * plan.total_stride
    assert list(buckets) == sorted(set(buckets))
    assert all(bucket % unit == 0 for bucket in buckets)
    one_sequence = int(plan.rows_needed(np.array([max_tokens], np.int32))[0])
    assert one_sequence <= buckets[-1] < one_sequence + unit
    for smaller, bucket in itertools.pairwise((0, *buckets)):  # the least that falls into a bucket wastes the most
        least = smaller + 1
        assert bucket <= max(1.25 * least + unit, 2 * alignment)
    assert len(buckets) <= 4 * math.log2(max(buckets[-1], 16)) + 1


@settings(max_examples=200, deadline=None, derandomize=True)
@given(plans, st.integers(1, 100))
def test_longer_sequences_need_no_fewer_rows_and_the_longest_that_fits_is_known(plan, windows):
    rows = windows * plan.total_stride
    lengths = np.arange(1, rows + 2, dtype=np.int32)
    needed = plan.rows_needed(lengths)
    assert (np.diff(needed) >= 0).all()
    assert plan.longest(rows) == lengths[needed <= rows][-1]
    assert [plan.rows_needed(int(length)) for length in lengths] == needed.tolist()


@pytest.mark.parametrize("least", [1, 40, 100])
def test_buckets_are_no_smaller_than_the_shortest_sequence(least):
    plan = packing.make_plan(model("full", "full"), FunnelConfig((1, 4), keep_first=True))
    buckets = packing.row_buckets(plan, 100, least)
    assert buckets == tuple(size for size in packing.row_buckets(plan, 100) if size >= plan.rows_needed(least))
    assert buckets


def test_sequences_are_divided_by_length():
    lengths = np.array([9, 1, 40, 10, 39, 12, 100], np.int32)
    divided = [(number, index.tolist()) for number, index in packing.group_by_length([0, 10, 20, 40], lengths)]
    assert divided == [(3, [2, 6]), (2, [4]), (1, [3, 5]), (0, [0, 1])]
    assert packing.group_by_length([0], lengths)[0][1].tolist() == list(range(7))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(plans, st.lists(st.integers(1, 60), max_size=40), st.integers(75, 300))
def test_split_takes_every_sequence_once_and_fills_no_batch_beyond_its_rows(plan, lengths, max_rows):
    lengths = np.array(lengths, np.int32)
    batches = packing.split(plan, lengths, max_rows)
    order = np.concatenate([[], *batches]).astype(int)
    assert sorted(order) == list(range(len(lengths)))
    assert (np.diff(lengths[order]) <= 0).all()
    used = [int(plan.rows_needed(lengths[batch]).sum()) for batch in batches]
    assert all(0 < rows <= max_rows for rows in used)
    for rows, following in itertools.pairwise(range(len(batches))):  # a batch ends because the next did not fit
        assert used[rows] + plan.rows_needed(lengths[batches[following][:1]])[0] > max_rows


@pytest.mark.parametrize("lengths", [[9], [9, 3, 2], [3, 9, 2]])
def test_split_refuses_a_sequence_that_fits_no_batch(lengths):
    plan = packing.make_plan(model("full"), FunnelConfig())
    with pytest.raises(InputError, match="9 rows"):
        packing.split(plan, np.array(lengths, np.int32), 8)


@given(st.integers(0, 100_000))
def test_sequence_buckets_are_powers_of_four(sequences):
    bucket = packing.sequence_bucket(sequences)
    assert bucket >= max(sequences, 1)
    assert bucket == 4 ** round(math.log(bucket, 4))
    assert bucket == 1 or bucket // 4 < sequences
