"""What a list of timings is reduced to: medians, quartiles, and the ratio of two of them with its uncertainty."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
BLOCK = 1_000_000  # numbers that are drawn at once


class Spread(NamedTuple):
    """A median between two bounds."""

    low: float
    median: float
    high: float


def quartiles(samples: Sequence[float]) -> Spread:
    """First quartile, median and third quartile, interpolated linearly."""
    low, median, high = np.quantile(np.asarray(samples, np.float64), (0.25, 0.5, 0.75))
    return Spread(float(low), float(median), float(high))


def ratio(numerator: Spread, denominator: Spread) -> Spread:
    """The ratio of two medians, between the least and the greatest that their quartiles allow."""
    return Spread(
        numerator.low / denominator.high, numerator.median / denominator.median, numerator.high / denominator.low
    )


def ratio_of_medians(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """The ratio of the medians of two independent samples, inside its 95 % confidence interval.

    The interval is that of the percentile bootstrap (B. Efron, "Bootstrap methods: another look at the jackknife",
    Annals of Statistics 7, 1979): each sample is drawn again from itself, with replacement and to its own size, 10,000
    times; the bounds are the 2.5 % and 97.5 % quantiles of the ratios of medians of what was drawn. It assumes nothing
    about the distribution, but that a sample's values are independent. Fewer than about ten values give too narrow an
    interval. The random numbers have a fixed seed: the same samples have the same interval.
    """
    generator = np.random.default_rng(0)
    ratios = resampled_medians(numerator, generator) / resampled_medians(denominator, generator)
    low, high = np.quantile(ratios, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Spread(float(low), float(np.median(numerator) / np.median(denominator)), float(high))


def resampled_medians(samples: Sequence[float], generator: np.random.Generator) -> np.ndarray:
    """The medians of `RESAMPLES` samples that are drawn from this one with replacement."""
    values = np.asarray(samples, np.float64)
    at_once = max(1, BLOCK // len(values))
    counts = [min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once)]
    return np.concatenate([np.median(generator.choice(values, (count, len(values))), axis=1) for count in counts])


def interleave(
    first: Callable[[], float], second: Callable[[], float], repeats: int, advance: Callable[[], object] = lambda: None
) -> tuple[list[float], list[float]]:
    """Samples two measurements in the order A B B A, `repeats` times over, so that slow drift hits both alike.

    Args:
        first, second: A and B; each measures once and returns the result.
        advance: called after each A B B A.

    Returns:
        The `2 * repeats` samples of each, in the order taken.
    """
    a, b = [], []
    for _ in range(repeats):
        a.append(first())
        b.append(second())
        b.append(second())
        a.append(first())
        advance()
    return a, b
