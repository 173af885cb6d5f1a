"""Medians, quartiles and ratios on numbers whose answers are known; the order of interleaved samples."""

import itertools

import numpy as np
import pytest

from funnel_benchmarks import statistics
from funnel_benchmarks.statistics import Spread, interleave, quartiles, ratio, ratio_of_medians, resampled_medians


def test_quartiles_of_known_samples():
    assert quartiles([7.0, 1.0, 3.0, 5.0, 9.0]) == Spread(3.0, 5.0, 7.0)
    assert quartiles([4.0, 1.0, 2.0, 3.0]) == Spread(1.75, 2.5, 3.25)  # between samples: linear
    assert quartiles([6.0]) == Spread(6.0, 6.0, 6.0)


def test_one_slow_run_does_not_move_the_median():
    assert quartiles([1.0, 1.0, 1.0, 1.0, 100.0]) == Spread(1.0, 1.0, 1.0)


def test_ratio_is_of_the_medians_with_the_widest_bounds():
    assert ratio(Spread(2.0, 3.0, 4.0), Spread(5.0, 6.0, 8.0)) == Spread(0.25, 0.5, 0.8)


def test_the_ratio_of_constants_is_certain():
    assert ratio_of_medians([3.0, 3.0, 3.0], [2.0, 2.0]) == Spread(1.5, 1.5, 1.5)


def test_the_interval_is_that_of_all_resamples():
    """Three values can be drawn in 27 ways, two in 4: the exact distribution has few steps, and its quantiles none near
    2.5 and 97.5 per cent that a random draw could miss."""
    first, second = [1.0, 5.0, 7.0], [2.0, 4.0]
    medians = [[np.median(draw) for draw in itertools.product(each, repeat=len(each))] for each in (first, second)]
    ratios = [a / b for a, b in itertools.product(*medians)]
    low, high = np.quantile(ratios, (0.025, 0.975))
    assert ratio_of_medians(first, second) == pytest.approx((low, 5 / 3, high))


def test_the_interval_holds_the_true_ratio_as_often_as_it_says(monkeypatch):
    """200 pairs of skewed samples whose true ratio of medians is 1.2; 95 % of intervals should hold it."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    generator = np.random.default_rng(5)
    intervals = [
        ratio_of_medians(1.2 * generator.lognormal(sigma=0.3, size=25), generator.lognormal(sigma=0.3, size=31))
        for _ in range(200)
    ]
    held = sum(low <= 1.2 <= high for low, _, high in intervals)
    assert 182 <= held <= 199
    widths = [high - low for low, _, high in intervals]
    assert 0.2 < np.median(widths) < 0.7  # 4 standard errors of a ratio of medians: about 0.44


def test_more_samples_make_a_narrower_interval():
    generator = np.random.default_rng(6)
    widths = []
    for size in (10, 100, 1000):
        low, _, high = ratio_of_medians(generator.lognormal(size=size), generator.lognormal(size=size))
        widths.append(high - low)
    assert widths[0] > 2 * widths[1] > 4 * widths[2]


def test_the_same_samples_have_the_same_interval():
    samples = np.random.default_rng(7).random((2, 400)) + 1  # fine enough for chance to show
    assert ratio_of_medians(*samples) == ratio_of_medians(*samples)


def test_resamples_are_as_many_in_blocks_as_at_once(monkeypatch):
    samples = np.random.default_rng(8).random(7)
    at_once = resampled_medians(samples, np.random.default_rng(9))
    monkeypatch.setattr(statistics, "BLOCK", 7 * 1024)
    in_blocks = resampled_medians(samples, np.random.default_rng(9))
    assert at_once.shape == in_blocks.shape == (10_000,)
    np.testing.assert_array_equal(at_once[:1024], in_blocks[:1024])
    assert set(in_blocks) <= set(samples)


def test_interleave_runs_a_b_b_a_and_keeps_the_samples_apart():
    order: list[str] = []

    def take(name: str) -> float:
        order.append(name)
        return float(len(order))

    a, b = interleave(lambda: take("A"), lambda: take("B"), 3, lambda: order.append("|"))
    assert "".join(order) == "ABBA|ABBA|ABBA|"
    assert a == [1, 4, 6, 9, 11, 14]
    assert b == [2, 3, 7, 8, 12, 13]


def test_interleaving_cancels_a_steady_drift():
    """Two equal measurements that grow slower by the call have the same mean."""
    clock = iter(range(1000))
    a, b = interleave(lambda: next(clock), lambda: next(clock), 5, lambda: None)
    assert sum(a) == pytest.approx(sum(b))
