"""Scores over resamples against SciPy and scikit-learn, one resample at a time."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import f1_score

from funnel_training.scores import MacroF1, Quantile, RatioOfSums, Spearman, mean

UNITS, RESAMPLES = 40, 25


@pytest.fixture
def generator():
    return np.random.default_rng(3)


@pytest.fixture
def resamples(generator):
    return generator.integers(UNITS, size=(RESAMPLES, UNITS))


def test_spearman_with_ties(generator, resamples):
    predicted, gold = generator.normal(size=UNITS), generator.integers(0, 6, UNITS).astype(float)
    score = Spearman(predicted, gold)
    expected = [spearmanr(predicted[each], gold[each]).statistic for each in resamples]
    np.testing.assert_allclose(score.over(resamples), expected, rtol=1e-12)
    assert score.value == pytest.approx(spearmanr(predicted, gold).statistic, rel=1e-12)
    assert score.units == UNITS


def test_a_resample_whose_gold_scores_are_equal_orders_nothing():
    score = Spearman(np.array([0.1, 0.5, 0.3]), np.array([1.0, 2.0, 2.0]))
    np.testing.assert_array_equal(score.over(np.array([[1, 2, 2], [0, 1, 1]])), [0, 1])


def test_macro_f1_also_without_some_classes(generator, resamples):
    gold = generator.integers(0, 5, UNITS)
    predicted = np.where(generator.random(UNITS) < 0.6, gold, generator.integers(0, 8, UNITS))
    resamples[:, 10:] = resamples[:, :1]  # few units, so that classes are missing in some resamples
    expected = [f1_score(gold[each], predicted[each], average="macro", zero_division=0) for each in resamples]
    np.testing.assert_allclose(MacroF1(predicted, gold).over(resamples), expected, rtol=1e-12)
    assert MacroF1(predicted, gold).value == pytest.approx(f1_score(gold, predicted, average="macro"))


def test_means_ratios_and_quantiles(generator, resamples):
    values, sizes = generator.random(UNITS), generator.integers(0, 4, UNITS).astype(float)
    for each, average, ratio, low in zip(
        resamples,
        mean(values).over(resamples),
        RatioOfSums(values, sizes).over(resamples),
        Quantile(values, 0.05).over(resamples),
        strict=True,
    ):
        assert average == pytest.approx(sum(values[each]) / UNITS)
        assert ratio == pytest.approx(sum(values[each]) / sum(sizes[each]))
        assert low == pytest.approx(np.quantile(values[each], 0.05))
    assert mean(values > 0.5).value == np.count_nonzero(values > 0.5) / UNITS


def test_a_resample_with_nothing_to_divide_by_has_no_score():
    score = RatioOfSums(np.array([0.0, 2.0]), np.array([0.0, 4.0]))
    np.testing.assert_array_equal(score.over(np.array([[0, 0], [0, 1]])), [0, 0.5])
