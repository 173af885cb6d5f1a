"""Packed sequences as attention sees them: numbers of rows, and the key interval of every query row."""

from typing import NamedTuple

import numpy as np

from funnel_engine.packing import Ints, LevelRows, Plan

Window = tuple[int | None, int | None]  # inclusive radii (left, right) in tokens; None is without limit


class Layout(NamedTuple):
    """Query row `i` of `queries` sees key rows `lo[i] <= j < hi[i]` of `keys`."""

    queries: int
    keys: int
    lo: Ints  # [queries]
    hi: Ints  # [queries]

    @property
    def pairs(self) -> int:
        """Query-key pairs that are seen."""
        return int(np.maximum(self.hi.astype(np.int64) - self.lo, 0).sum())


def packed(lengths: Ints, *, stride: int = 1, window: Window = (None, None), padding: int = 0) -> Layout:
    """Sequences end to end, their queries on `stride`, their keys on stride 1, then `padding` windows of no token."""
    plan = Plan(
        total_stride=stride,
        output_stride=stride,
        keep_first=False,
        keep_last=False,
        positions="first",
        strides=(1, stride),
        windows={},
    )
    keys = int(plan.rows_needed(lengths).sum()) + padding * stride
    queries = keys // stride
    interval = LevelRows(plan, lengths, stride).intervals(LevelRows(plan, lengths, 1), *window, queries)
    return Layout(queries, keys, interval.lo, interval.hi)


def scattered(generator: np.random.Generator, queries: int, keys: int) -> Layout:
    """Intervals at random, about a third of them empty."""
    lo = generator.integers(0, keys, queries)
    hi = np.minimum(lo + generator.integers(-keys // 2, keys, queries), keys)
    return Layout(queries, keys, lo.astype(np.int32), np.maximum(hi, 0).astype(np.int32))


def equal(tokens: int, length: int) -> Ints:
    """Lengths of as many sequences of `length` as make `tokens` tokens."""
    return np.full(tokens // length, length, np.int32)


def up_to(tokens: int, lengths: Ints) -> Ints:
    """As many of `lengths` as hold `tokens` tokens in all; the last is cut short."""
    ends = np.cumsum(lengths, dtype=np.int64)
    count = int(np.searchsorted(ends, tokens)) + 1
    taken = lengths[:count].copy()
    taken[-1] -= ends[count - 1] - tokens
    return taken
