"""Scores over units (queries, pairs, texts, sentences), which can be computed again over any resample of the units."""

import abc
import dataclasses

import numpy as np
from scipy.stats import rankdata

Floats = np.ndarray  # float64
Ints = np.ndarray


class Score(abc.ABC):
    """How good one model is on some units. Two scores of the same units can be compared, see `statistics`."""

    @property
    @abc.abstractmethod
    def units(self) -> int:
        """Their number."""

    @abc.abstractmethod
    def over(self, resamples: Ints) -> Floats:
        """The score over each resample, [R], of indices of units, [R, n]."""

    @property
    def value(self) -> float:
        """The score over all units."""
        return float(self.over(np.arange(self.units)[None])[0])


@dataclasses.dataclass(frozen=True)
class RatioOfSums(Score):
    """A sum over all units divided by another: a mean if each unit has the denominator 1.

    The F1 of spans is one too: twice the right spans, divided by the predicted and the gold spans.
    """

    numerators: Floats  # [units]
    denominators: Floats  # [units]; at least one is not 0

    @property
    def units(self) -> int:
        return len(self.numerators)

    def over(self, resamples: Ints) -> Floats:
        totals = self.denominators[resamples].sum(axis=1)
        return self.numerators[resamples].sum(axis=1) / np.where(totals == 0, 1, totals)


def mean(values: Floats) -> RatioOfSums:
    """The mean of one value for each unit."""
    return RatioOfSums(np.asarray(values, np.float64), np.ones(len(values)))


@dataclasses.dataclass(frozen=True)
class Quantile(Score):
    """The value that the part `part` of the units stays below."""

    values: Floats  # [units]
    part: float

    @property
    def units(self) -> int:
        return len(self.values)

    def over(self, resamples: Ints) -> Floats:
        return np.quantile(self.values[resamples], self.part, axis=1)


@dataclasses.dataclass(frozen=True)
class Spearman(Score):
    """The rank correlation of what a model says of each unit with what is true."""

    predicted: Floats  # [units]
    gold: Floats  # [units]

    @property
    def units(self) -> int:
        return len(self.gold)

    def over(self, resamples: Ints) -> Floats:
        return rank_correlation(self.predicted[resamples], self.gold[resamples])


@dataclasses.dataclass(frozen=True)
class MacroF1(Score):
    """The mean over the classes of F1 = 2 right / (predicted + gold); a class that does not occur does not count."""

    predicted: Ints  # [units] classes, from 0
    gold: Ints  # [units]

    @property
    def units(self) -> int:
        return len(self.gold)

    def over(self, resamples: Ints) -> Floats:
        classes = np.arange(max(self.predicted.max(), self.gold.max()) + 1)
        predicted, gold = self.predicted[:, None] == classes, self.gold[:, None] == classes  # [units, classes]
        counts = np.stack([np.bincount(resample, minlength=self.units) for resample in resamples]).astype(np.float64)
        right, found = counts @ (predicted & gold), counts @ (predicted.astype(np.float64) + gold)  # [R, classes]
        return (2 * right / np.where(found == 0, 1, found)).sum(axis=1) / (found > 0).sum(axis=1)


def rank_correlation(x: Floats, y: Floats) -> Floats:
    """Spearman correlation of each row of x and y, [R, n] -> [R]; 0 where one side is constant: it orders nothing."""
    ranks = [rankdata(values, axis=1) for values in (x, y)]
    ranks = [each - each.mean(axis=1, keepdims=True) for each in ranks]
    lengths = np.sqrt((ranks[0] ** 2).sum(axis=1) * (ranks[1] ** 2).sum(axis=1))
    return (ranks[0] * ranks[1]).sum(axis=1) / np.where(lengths == 0, 1, lengths)
