"""How sure a comparison of two models is: the paired bootstrap, and the test that a funnel loses no more than allowed.

Both models are scored on the same units, so a resample draws the same units for both: what makes a unit hard for both
cancels in the ratio (B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7, 1979).
"""

import dataclasses
import math

import numpy as np

from funnel_engine.checks import check_number
from funnel_kernels.errors import ConfigError, InputError
from funnel_training.scores import Score

CONFIDENCE = 0.95
RESAMPLES = 2000
AT_ONCE = 1_000_000  # indices that are drawn at once
LEAST_UNITS = 20  # an interval from fewer says nothing


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A model's score divided by the baseline's, and its 95 % interval."""

    low: float
    value: float
    high: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a loss is shown to stay within a bound.

    Attributes:
        kind: "within" the bound, "outside" of it, or "not shown": the interval of the ratio reaches across the bound.
        more_units: for "not shown", how many more units would decide it if they are like those at hand; None if no
            number would, because the ratio lies exactly at the bound.
    """

    kind: str
    more_units: int | None = 0


def paired_ratio(baseline: Score, other: Score, *, seed: int = 0, resamples: int = RESAMPLES) -> Ratio | None:
    """The ratio other / baseline of two scores of the same units, inside its percentile interval.

    Args:
        seed: the same seed draws the same units.

    Returns:
        None if the baseline is not above 0 over all units and in every resample: then there is nothing to lose, and a
        ratio has no meaning.

    Raises:
        InputError: there are fewer than 20 units, or the two scores have different numbers of units.
    """
    units = check_units(baseline.units)
    if other.units != units:
        raise InputError(f"the scores have {units} and {other.units} units; both must be of the same units")
    generator = np.random.default_rng(seed)
    at_once = max(1, AT_ONCE // units)
    parts = []
    for start in range(0, resamples, at_once):
        drawn = generator.integers(units, size=(min(at_once, resamples - start), units))
        parts.append(np.stack([baseline.over(drawn), other.over(drawn)]))
    below, above = np.concatenate(parts, axis=1)
    if baseline.value <= 0 or (below <= 0).any():
        return None
    low, high = np.quantile(above / below, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Ratio(float(low), other.value / baseline.value, float(high))


def check_units(units: int, what: str = "units") -> int:
    """Raises `InputError` if there are too few for an interval."""
    if units < LEAST_UNITS:
        raise InputError(f"{units} {what} are too few for a comparison; give at least {LEAST_UNITS}")
    return units


def units_needed(max_loss: float) -> int:
    """The least number of units that can show a loss to stay within a bound.

    A funnel could fail on a kind of unit that the data do not have. If none of n units shows it, such units are up to
    3 / n of all (the rule of three), so 3 / max_loss units are needed.

    Raises:
        ConfigError: the bound is not between 0 and 1.
    """
    if check_number("max_loss", max_loss) >= 1:
        raise ConfigError(f"max_loss={max_loss} must be below 1; 0.05 is five per cent")
    return math.ceil(3 / max_loss)


def judge(ratio: Ratio, units: int, max_loss: float) -> Verdict:
    """The test of non-inferiority: a loss is within the bound if the whole interval is, down to its lower end.

    "Within" also needs as many units as `units_needed` says.

    Args:
        ratio: funneled / unfunneled.
        units: the number of units that it was computed from.
        max_loss: the bound: 0.05 allows to lose 5 % of the unfunneled score.

    Raises:
        ConfigError: the bound is not between 0 and 1.
    """
    bound, least = 1 - max_loss, units_needed(max_loss)
    if ratio.high < bound:
        return Verdict("outside")
    if ratio.low >= bound and units >= least:
        return Verdict("within")
    if ratio.value == bound:
        return Verdict("not shown", None)
    # The width of an interval falls with the square root of the number of units.
    reach = ratio.value - ratio.low if ratio.value > bound else ratio.high - ratio.value
    needed = math.ceil(units * (reach / (ratio.value - bound)) ** 2)
    return Verdict("not shown", max(needed, least if ratio.value > bound else 0, units + 1) - units)
