"""The paired bootstrap against SciPy's, its coverage on known distributions, and the verdict."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from funnel_engine import ConfigError, InputError
from funnel_training import statistics
from funnel_training.scores import Spearman, mean
from funnel_training.statistics import Ratio, Verdict, judge, paired_ratio


def pair(units: int, seed: int, loss: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Scores of two models that find the same units hard."""
    generator = np.random.default_rng(seed)
    hard = generator.beta(2, 2, units)
    return hard, hard * (1 - loss) + 0.05 * generator.normal(size=units)


def test_the_interval_is_that_of_scipy():
    baseline, other = pair(200, seed=0)
    ratio = paired_ratio(mean(baseline), mean(other), resamples=20_000)
    expected = bootstrap(
        (other, baseline),
        lambda x, y, axis: x.mean(axis=axis) / y.mean(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert ratio.value == pytest.approx(other.mean() / baseline.mean())
    width = expected.high - expected.low
    assert (ratio.low, ratio.high) == pytest.approx(tuple(expected), abs=0.05 * width)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """200 experiments; the true ratio is 0.9. The count is within four standard deviations of 95 %."""
    covered = 0
    for seed in range(200):
        ratio = paired_ratio(*map(mean, pair(60, seed)), resamples=500)
        covered += ratio.low <= 0.9 <= ratio.high
    assert 178 <= covered <= 200


def test_pairing_narrows_the_interval():
    baseline, other = pair(200, seed=1)
    paired = paired_ratio(mean(baseline), mean(other))
    mixed = paired_ratio(mean(baseline), mean(np.random.default_rng(0).permutation(other)))
    assert paired.value == pytest.approx(mixed.value)
    assert 3 * (paired.high - paired.low) < mixed.high - mixed.low


def test_a_model_equals_itself_and_a_seed_repeats(monkeypatch):
    baseline, other = pair(50, seed=2)
    assert paired_ratio(mean(baseline), mean(baseline)) == Ratio(1, 1, 1)
    first = paired_ratio(mean(baseline), mean(other), seed=4)
    assert first == paired_ratio(mean(baseline), mean(other), seed=4) != paired_ratio(mean(baseline), mean(other))
    monkeypatch.setattr(statistics, "AT_ONCE", 130)  # two resamples at a time
    assert first == paired_ratio(mean(baseline), mean(other), seed=4)


def test_spearman_is_computed_again_for_each_resample():
    generator = np.random.default_rng(6)
    gold = generator.normal(size=80)
    near, far = gold + 0.3 * generator.normal(size=80), gold + generator.normal(size=80)
    ratio = paired_ratio(Spearman(near, gold), Spearman(far, gold))
    assert ratio.value == pytest.approx(Spearman(far, gold).value / Spearman(near, gold).value)
    assert ratio.low < ratio.value < ratio.high < 1


def test_there_is_no_ratio_to_a_baseline_that_may_be_nothing():
    generator = np.random.default_rng(7)
    gold = generator.normal(size=40)
    assert paired_ratio(Spearman(generator.normal(size=40), gold), Spearman(gold, gold)) is None
    assert paired_ratio(mean(np.zeros(40)), mean(np.ones(40))) is None
    assert paired_ratio(Spearman(-gold, gold), Spearman(-gold, gold)) is None


def test_too_few_units_are_refused():
    with pytest.raises(InputError, match="19 units are too few for a comparison; give at least 20"):
        paired_ratio(mean(np.ones(19)), mean(np.ones(19)))
    with pytest.raises(InputError, match="20 and 21 units"):
        paired_ratio(mean(np.ones(20)), mean(np.ones(21)))


@pytest.mark.parametrize(
    ("ratio", "units", "verdict"),
    [
        (Ratio(0.96, 0.97, 0.98), 500, Verdict("within")),
        (Ratio(0.95, 0.97, 0.99), 500, Verdict("within")),
        (Ratio(1.01, 1.02, 1.03), 500, Verdict("within")),
        (Ratio(0.90, 0.92, 0.94), 500, Verdict("outside")),
        # The lower end is 0.04 below the value and must come to 0.02: four times as many units.
        (Ratio(0.93, 0.97, 1.01), 500, Verdict("not shown", 1500)),
        # The value is 0.01 below the bound, and the upper end 0.03 above the value: nine times as many.
        (Ratio(0.91, 0.94, 0.97), 100, Verdict("not shown", 800)),
        (Ratio(0.90, 0.95, 1.00), 100, Verdict("not shown", None)),
        # Nothing is lost on 20 units, but 60 are needed before 5 % of units of another kind would show.
        (Ratio(1.0, 1.0, 1.0), 20, Verdict("not shown", 40)),
        (Ratio(1.0, 1.0, 1.0), 60, Verdict("within")),
    ],
)
def test_the_verdict(ratio, units, verdict):
    assert judge(ratio, units, 0.05) == verdict


def test_as_many_more_units_as_the_verdict_says_decide_it():
    """Units like those at hand: the same ones again and again, a quarter more than said, as a resample is random."""
    decided = []
    for seed in range(12):
        baseline, other = pair(40, seed, loss=0.05)
        first = judge(paired_ratio(mean(baseline), mean(other)), 40, 0.05)
        if first.kind == "not shown" and first.more_units < 20_000:
            units = 40 + round(1.25 * first.more_units)
            baseline, other = np.resize(baseline, units), np.resize(other, units)
            decided.append(judge(paired_ratio(mean(baseline), mean(other)), units, 0.05).kind)
    assert set(decided) == {"within", "outside"}


def test_a_bound_is_a_part():
    for bound in (0, 1, 1.5, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="max_loss="):
            judge(Ratio(0.9, 0.95, 1.0), 100, bound)
