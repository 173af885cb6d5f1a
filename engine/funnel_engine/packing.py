"""Packs ragged sequences on one axis: rows, buckets, RoPE positions and key intervals. NumPy on the host, no loops.

The sequences of a batch follow each other on one axis of N rows. Every sequence starts at a multiple of the funnel's
total stride, plus `Plan.lead` rows of padding for `FunnelConfig.keep_first` and `keep_last`. So pooling is
`[N, D] -> [N / s, D]`, and no window contains rows of two sequences:

    stride 2, lengths 3 and 4          rows   a0 a1 a2 -- b0 b1 b2 b3
                                       pooled   A0    A1    B0    B1
    the same with keep_first           rows   -- a0 a1 a2 -- b0 b1 b2 b3 --
                                       pooled   A0    A1    B0    B1    B2
    the same with keep_last            rows   a0 a1 a2 -- -- b0 b1 b2 b3 --
                                       pooled   A0    A1    B0    B1    B2

The *first token* of row `r` of a sequence (its *place* in docs/semantics.md) on stride `s` is `max(0, r * s - o)`. Here
`o` is the number of rows of padding in the first window: `s - 1` for keep_first, between 0 and `s - 1` for keep_last,
and 0 otherwise. Sliding windows and causality compare first tokens, so a query sees one interval of keys.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from funnel_engine.config import Architecture, FunnelConfig, layer_steps
from funnel_kernels.errors import InputError

Ints = np.ndarray[Any, np.dtype[np.int32]]
Array = Any  # np.ndarray on the host, jax.Array inside a compiled program
IntervalKey = tuple[int, int, str]  # (query stride, key stride, layer type)

ROW_ALIGNMENT = 8  # rows, at every stride level: a TPU register is 8 rows tall
ROW_ALIGNMENT_OF_CPUS = 4  # their kernels take any number; fewer numbers of rows mean fewer programs


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to pack batches for one model and one funnel; made once, at load.

    Attributes:
        total_stride: tokens per row at the deepest level; sequences start at multiples of it.
        output_stride: tokens per row of the model's output.
        keep_first, keep_last: whether the first, or the last, token of a sequence is alone in its windows.
        positions: how a pooled row is numbered for RoPE.
        strides: the strides of all levels, ascending from 1.
        windows: for every (query stride, key stride, layer type) of a layer, the inclusive (left, right) radii in
            tokens; None is no limit.
        truncate: whether a sequence of three rows or more loses its last row at each level (Funnel-Transformer).
        token_types: whether batches contain the types of tokens.
    """

    total_stride: int
    output_stride: int
    keep_first: bool
    keep_last: bool
    positions: str
    strides: tuple[int, ...]
    windows: dict[IntervalKey, tuple[int | None, int | None]]
    truncate: bool = False
    token_types: bool = False

    def lead(self, lengths: Any) -> Any:
        """The number of rows of padding before each of these sequences; lengths are integers, in any form.

        One token begins a window at every level: the first one, the second with `keep_first`, the last with
        `keep_last`. The padding and the rows before it fill whole windows of the deepest level.
        """
        before = lengths - 1 if self.keep_last else 0 * lengths + self.keep_first
        return -before % self.total_stride

    def rows_needed(self, lengths: Any) -> Any:
        """The number of rows of stride 1 that each of these sequences needs. Longer ones need no fewer."""
        return round_up(self.lead(lengths) + lengths, self.total_stride)

    def longest(self, rows: int) -> int:
        """The number of tokens of the longest sequence that `rows` rows, a multiple of the total stride, have room for.

        With `keep_first` and `keep_last` a window contains one token, and all others can be full.
        """
        return rows - (self.total_stride - 1 if self.keep_first or self.keep_last else 0)


def make_plan(config: Architecture, funnel: FunnelConfig) -> Plan:
    """The plan of a funneled model.

    Raises:
        ConfigError: the funnel does not fit the model.
    """
    steps = layer_steps(config, funnel)
    return Plan(
        total_stride=funnel.total_stride,
        output_stride=funnel.output_stride,
        keep_first=funnel.keep_first,
        keep_last=funnel.keep_last,
        positions=funnel.positions,
        strides=tuple(sorted({1} | {step.query_stride for step in steps})),
        windows={
            (step.query_stride, step.key_stride, step.layer_type): config.window(step.layer_type) for step in steps
        },
        truncate=config.truncate and funnel.keep_first,
        token_types=config.token_types,
    )


class Level(NamedTuple):
    """The rows of one stride level."""

    real: Array  # [N / stride] bool: the row contains at least one token
    positions: Array  # [N / stride] float32: RoPE position, in tokens


class Interval(NamedTuple):
    """The keys `lo[i] <= j < hi[i]` that each query row sees."""

    lo: Array  # [N / query stride] int32
    hi: Array  # [N / query stride] int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The input of `model.forward`: a pytree of arrays whose shapes only depend on the bucket."""

    ids: Array  # [N] int32; 0 in rows without a token
    levels: dict[int, Level]  # by stride
    intervals: dict[IntervalKey, Interval]
    types: Array | None = None  # [N] int32, if the model has token types; 0 in rows without a token


class Spans(NamedTuple):
    """The rows of each sequence at one stride level: `first[b] .. first[b] + rows[b] - 1`."""

    first: Ints  # [B]
    rows: Ints  # [B], the number of rows


def spans(plan: Plan, lengths: Ints, stride: int) -> Spans:
    """The rows of each sequence at one stride level if sequences of these lengths are packed in order."""
    needed = plan.rows_needed(lengths)
    starts = np.cumsum(needed, dtype=np.int32) - needed + plan.lead(lengths)  # row of the first token
    first = starts // stride
    if not plan.truncate:
        return Spans(first, (starts + lengths - 1) // stride - first + 1)
    rows, levels = lengths, plan.strides[: plan.strides.index(stride) + 1]
    for finer, coarser in itertools.pairwise(levels):  # the first row is alone, the last one is left out
        rows = np.where(rows > 2, 1 + -(-(rows - 2) // (coarser // finer)), rows).astype(np.int32)
    return Spans(first, rows)


def pack(plan: Plan, ids: Ints, offsets: Ints, rows: int, types: Ints | None = None) -> Batch:
    """Packs ragged token ids into a batch of `rows` rows.

    Args:
        ids: [total] int32, the sequences one after another; each has at least one token.
        offsets: [B + 1] int32, where each sequence begins and ends in `ids`.
        rows: a bucket that is large enough for all of them.
        types: [total] int32, the token types, if the plan has any; None is 0 for every token.

    Raises:
        InputError: the sequences need more than `rows` rows.
    """
    lengths = np.diff(offsets)
    needed = int(plan.rows_needed(lengths).sum())
    if needed > rows:
        raise InputError(f"{len(lengths)} sequences need {needed} rows, more than the {rows} of the bucket; split them")
    by_stride = {stride: LevelRows(plan, lengths, stride) for stride in plan.strides}
    packed = np.zeros((1 + plan.token_types, rows), np.int32)
    packed[0, by_stride[1].row] = ids
    if types is not None:
        packed[1, by_stride[1].row] = types
    return Batch(
        ids=packed[0],
        levels={stride: level.build(rows // stride) for stride, level in by_stride.items()},
        intervals={
            key: by_stride[key[0]].intervals(by_stride[key[1]], *window, rows // key[0])
            for key, window in plan.windows.items()
        },
        types=packed[1] if plan.token_types else None,
    )


class LevelRows:
    """The real rows of one stride level, sequence by sequence.

    Attributes:
        first, count: first row and number of rows of each sequence, [B].
        offset: number of rows of padding, of stride 1, in the first window of each sequence, [B].
        row: index of each real row on the packed axis, [R].
        row_in_sequence: index of each real row in its sequence, [R].
        first_token: index in its sequence of the first token of each real row, [R]."""

    def __init__(self, plan: Plan, lengths: Ints, stride: int):
        self.plan, self.lengths, self.stride = plan, lengths, stride
        self.first, self.count = spans(plan, lengths, stride)
        rows_before = np.cumsum(self.count) - self.count
        self.row_in_sequence = np.arange(self.count.sum(), dtype=np.int32) - self.per_row(rows_before)
        self.row = self.row_in_sequence + self.per_row(self.first)
        self.offset = plan.lead(lengths) % stride
        self.first_token = np.maximum(self.row_in_sequence * np.int32(stride) - self.per_row(self.offset), 0)

    def per_row(self, per_sequence: np.ndarray) -> Ints:
        """Repeats the number of each sequence for all of its rows."""
        return np.repeat(per_sequence.astype(np.int32), self.count)

    def build(self, rows: int) -> Level:
        real = np.zeros(rows, np.bool_)
        real[self.row] = True
        positions = np.zeros(rows, np.float32)
        positions[self.row] = self.positions()
        return Level(real, positions)

    def positions(self) -> np.ndarray:
        if self.plan.positions == "compact":
            return self.row_in_sequence
        if self.plan.positions == "first" or self.stride == 1:
            return self.first_token
        window_end = (self.row_in_sequence + 1) * np.int32(self.stride) - self.per_row(self.offset + 1)
        last = np.minimum(window_end, self.per_row(self.lengths - 1))
        return last if self.plan.positions == "last" else (self.first_token + last) * np.float32(0.5)

    def intervals(self, keys: "LevelRows", left: int | None, right: int | None, rows: int) -> Interval:
        """For each row, the rows of `keys` whose first token is at most `left` before or `right` after its own."""
        lo = first = self.per_row(keys.first)
        offset = self.per_row(keys.offset)
        if left is not None:  # the first key row whose first token is at least `first_token - left`
            beyond = -((left - offset - self.first_token) // np.int32(keys.stride))
            lo = first + np.where(self.first_token <= left, 0, beyond)
        hi = first + self.per_row(keys.count)
        if right is not None:  # one past the last key row whose first token is at most `first_token + right`
            reach = self.first_token + offset + min(right, 2**30)  # a larger radius would overflow
            hi = np.minimum(hi, first + reach // np.int32(keys.stride) + 1)
        out = Interval(np.zeros(rows, np.int32), np.zeros(rows, np.int32))
        out.lo[self.row] = lo
        out.hi[self.row] = hi
        return out


def row_buckets(plan: Plan, max_tokens: int, min_tokens: int = 1, *, alignment: int = ROW_ALIGNMENT) -> tuple[int, ...]:
    """The sizes of the packed axis that are compiled, ascending: 4, 5, 6 and 7 times each power of two.

    Each is rounded up to a multiple of `alignment` rows at the deepest level. A batch of `n` rows gets a bucket of at
    most `1.25 * n + alignment * total_stride` rows and at least `2 * alignment`: with fewer rows, weight traffic hides
    the cost of padding. The largest bucket has room for one sequence of `max_tokens` tokens, the smallest one for a
    sequence of `min_tokens`.
    """
    unit = alignment * plan.total_stride
    largest = round_up(plan.rows_needed(max_tokens), unit)
    sizes = {largest}
    scale = alignment // 2
    while 4 * scale < largest:
        sizes.update(round_up(step * scale, unit) for step in (4, 5, 6, 7))
        scale *= 2
    return tuple(sorted(size for size in sizes if plan.rows_needed(min_tokens) <= size <= largest))


def row_alignment(platform: str) -> int:
    """The alignment of the buckets for a JAX platform: "cpu", "gpu" or "tpu"."""
    return ROW_ALIGNMENT_OF_CPUS if platform == "cpu" else ROW_ALIGNMENT


def sequence_bucket(sequences: int) -> int:
    """The number of sequences for which a head is compiled, if a batch has this many: the next power of four."""
    return sequence_buckets(sequences)[-1]


def sequence_buckets(most: int) -> list[int]:
    """The buckets that batches of up to `most` sequences can need, ascending."""
    buckets = [1]
    while buckets[-1] < most:
        buckets.append(buckets[-1] * 4)
    return buckets


def group_by_length(starts: Sequence[int], lengths: Ints) -> list[tuple[int, Ints]]:
    """Divides sequences into classes by length; class `c` begins at `starts[c]` tokens, ascending from 0.

    Returns:
        The number of each class that has sequences, from the longest to the shortest, and the indices of these.
    """
    classes = np.searchsorted(starts, lengths, side="right") - 1
    return [(int(number), np.flatnonzero(classes == number).astype(np.int32)) for number in np.unique(classes)[::-1]]


def split(plan: Plan, lengths: Ints, max_rows: int) -> list[Ints]:
    """Splits sequences into batches of at most `max_rows` packed rows, longest first.

    Raises:
        InputError: one sequence needs more than `max_rows` rows.

    Returns:
        For each batch the indices of its sequences, longest first. So neighbours on the packed axis have similar
        lengths, and few key blocks contain two sequences.
    """
    order = np.argsort(-lengths, kind="stable").astype(np.int32)
    needed = plan.rows_needed(lengths[order])
    if len(order) and needed[0] > max_rows:
        raise InputError(
            f"a sequence of {lengths[order[0]]} tokens needs {needed[0]} rows, more than the {max_rows} of a batch"
        )
    ends = np.cumsum(needed, dtype=np.int64)
    batches, start, used = [], 0, 0
    while start < len(order):
        stop = int(np.searchsorted(ends, used + max_rows, side="right"))
        batches.append(order[start:stop])
        start, used = stop, int(ends[stop - 1])
    return batches


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
