"""Directions in which the work of a call can grow, and the points on them that are measured."""

import dataclasses

import numpy as np

from funnel_engine.packing import Ints

SHORTEST, PER_SEQUENCE, TOTAL = 128, 512, 4096  # tokens
MOST_SEQUENCES, SHORTEST_PART = 16, 32
DEPTHS = 5
# What grows along each axis; the rest stays as it is.
AXES = {
    "tokens": "tokens of one sequence",
    "batch": "sequences in the batch",
    "depth": "layers",
    "split": "sequences among the same tokens",
    "threads": "threads",
    "engines": "engines called at once",
}


@dataclasses.dataclass(frozen=True)
class Point:
    """What is measured at one place of an axis.

    Attributes:
        x: what grows along the axis, see `AXES`.
        sequences: in the batch.
        tokens: of each sequence.
        layers: of the model.
        threads: of an engine; None: all that the process may use.
        engines: that are called at once, by a thread each.
        calls: by all engines together.
    """

    axis: str
    x: int
    sequences: int
    tokens: int
    layers: int
    threads: int | None = None
    engines: int = 1
    calls: int = 1

    @property
    def name(self) -> str:
        return f"{self.axis} {self.x}: {self.sequences} x {self.tokens} tokens, {self.layers} layers"

    @property
    def lengths(self) -> Ints:
        """Tokens of each sequence, [sequences]."""
        return np.full(self.sequences, self.tokens, np.int32)


def points(axis: str, *, layers: int, most_tokens: int, cores: int) -> list[Point]:
    """The points of an axis, from small to large.

    Args:
        layers: of the model.
        most_tokens: of a batch, at least 128; what would be larger is left away, and axes whose batches are all of
            one size take a smaller one.
        cores: that the process may use.
    """
    most = SHORTEST * largest_power(most_tokens // SHORTEST)
    part, total = min(PER_SEQUENCE, most // MOST_SEQUENCES), min(TOTAL, most)
    if axis == "tokens":
        return [Point(axis, tokens, 1, tokens, layers) for tokens in doubling(SHORTEST, most)]
    if axis == "batch":
        return [Point(axis, sequences, sequences, part, layers) for sequences in doubling(1, MOST_SEQUENCES)]
    if axis == "depth":
        return [Point(axis, depth, 2, part, depth) for depth in depths(layers)]
    if axis == "split":
        return [Point(axis, count, count, total // count, layers) for count in doubling(1, total // SHORTEST_PART)]
    if axis == "threads":
        return [Point(axis, count, 2, part, layers, threads=count) for count in sorted({1, cores})]
    return [Point("engines", count, 2, part, layers, engines=count, calls=2) for count in (1, 2)]


def doubling(first: int, last: int) -> list[int]:
    """`first`, twice that, and so on up to `last`."""
    return [first * 2**power for power in range((last // first).bit_length())]


def largest_power(number: int) -> int:
    """The largest power of two up to a number."""
    return 1 << (number.bit_length() - 1)


def depths(layers: int) -> list[int]:
    """About five numbers of layers, evenly from 1 to all."""
    return sorted({round(depth) for depth in np.linspace(1, layers, DEPTHS)})
