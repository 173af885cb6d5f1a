"""What pictures share: whiskers, and what stands above them."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from funnel_benchmarks.plot_style import LIGHT, entitle, whiskers


def test_whiskers_reach_from_the_median_to_both_bounds():
    spreads = ({"low": low, "median": 2.0, "high": high} for low, high in ((1.5, 2.25), (1.0, 6.0)))
    medians, (below, above) = whiskers(spreads, 10)
    np.testing.assert_allclose([medians, below, above], [[20, 20], [5, 10], [2.5, 40]])


@pytest.mark.parametrize("inches", [4.0, 8.0])
def test_a_title_has_lines_that_fit_and_keeps_facts_apart(inches):
    figure, look = Figure(), LIGHT._replace(inches=(inches, 5.0))
    entitle(figure, look, "word " * 30, "second")
    lines = figure.get_suptitle().splitlines()
    assert max(map(len, lines)) <= 10.5 * inches
    assert " ".join(lines[:-1]).split() == ["word"] * 30
    assert lines[-1] == "second"


def test_a_look_without_titles_has_none():
    figure = Figure()
    entitle(figure, LIGHT._replace(titled=False), "fact")
    assert figure.get_suptitle() == ""
