"""How fast one quantity grows with another: the exponent of a power law, with its uncertainty."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from funnel_benchmarks.results import Row
from funnel_benchmarks.statistics import CONFIDENCE

FEWEST = 3  # points: two have a slope, but no uncertainty
ENGINES = {"": "with funnel", "baseline_": "no funnel"}  # what the names of an engine's figures begin with
LEAST_GROWTH = 2  # of the work from end to end: with less, an exponent says more about noise than about it


class Slope(NamedTuple):
    """An exponent inside its 95 % confidence interval."""

    low: float
    exponent: float
    high: float


class Growth(NamedTuple):
    """How the figures of one engine grow along one axis.

    Attributes:
        engine: "with funnel" or "no funnel".
        seconds: of latency over x, as `work` is of FLOPs over x.
        seconds_over_work: of latency over FLOPs.
    """

    axis: str
    engine: str
    seconds: Slope
    work: Slope
    seconds_over_work: Slope

    @property
    def flagged(self) -> bool:
        """Whether the cost surely grows faster than the work."""
        return self.seconds_over_work.low > 1


def log_log_slope(x: Sequence[float], y: Sequence[float]) -> Slope:
    """The exponent p of the power law y = c * x^p that fits best: ordinary least squares on logarithms.

    Its 95 % confidence interval is p +- t * s, where t is the 97.5 % quantile of Student's t with n - 2 degrees of
    freedom and s the standard error of the slope; exact if errors of log y are independent, normal and alike.

    Args:
        x, y: at least three positive numbers each; not all x the same.
    """
    from scipy import stats  # not with the other imports: it takes half a second

    logs, values = np.log(np.asarray(x, np.float64)), np.log(np.asarray(y, np.float64))
    around = logs - logs.mean()
    squares = float(around @ around)
    exponent = float(around @ values) / squares
    residuals = values - values.mean() - exponent * around
    freedom = len(logs) - 2
    error = np.sqrt(float(residuals @ residuals) / freedom / squares)
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * error)
    return Slope(exponent - margin, exponent, exponent + margin)


def growths(rows: Sequence[Row]) -> Iterator[Growth]:
    """The growth along each axis with points enough, on which the work grows; rows may be in any order."""
    for axis in dict.fromkeys(row["axis"] for row in rows):
        chosen = [row for row in rows if row["axis"] == axis]
        x = [row["x"] for row in chosen]
        for prefix, engine in ENGINES.items():
            seconds = [row[f"{prefix}seconds"]["median"] for row in chosen]
            work = [row[f"{prefix}flops"] for row in chosen]
            if len(chosen) >= FEWEST and max(work) >= LEAST_GROWTH * min(work):
                yield Growth(
                    axis, engine, log_log_slope(x, seconds), log_log_slope(x, work), log_log_slope(work, seconds)
                )
