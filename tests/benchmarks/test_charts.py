"""Pictures that suites declare: every mark is drawn where its number is, in the colours of the look."""

import io

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import same_color

from funnel_benchmarks.charts import DARK, LIGHT, Chart, Panel, Series, render, styled, times, whiskers

SPREADS = [{"low": low, "median": 2.0, "high": high} for low, high in ((1.5, 2.25), (1.0, 6.0))]
UP = Panel(
    [Series("first", [1, 3], SPREADS, line="-"), Series("its $work_1$", [1, 3], [7.0, 9.0], "ideal", "", "--")],
    label="size",
    value_label="latency",
    title="kind",
    references={"no funnel": 1.0},
    marked=[(2.0, "measured")],
    ticks=[1, 3],
)
ROWS = Panel(
    [
        Series(name, [0, 1, 2][:count], [0.5] * count, hollow=hollow)
        for name, count, hollow in (("a", 3, False), ("b", 2, True))
    ],
    value_label="share",
    rows=["one", "a name that is far too long for one line of the picture, and so is wrapped", "three"],
    references={"ceiling": 1.0},
)
CHART = Chart(
    "described", "caption", [UP, ROWS, UP._replace(log=True, log_values=True)], ("fact " * 40, "second"), columns=2
)
NARROW = DARK._replace(inches=(4.4, 6.6), titled=False)


def drawn(look=LIGHT):
    with styled(look):
        figure = CHART.draw(look)
        figure.draw_without_rendering()
    return figure


@pytest.fixture(scope="module")
def figure():
    return drawn()


def test_whiskers_reach_from_the_median_to_both_bounds():
    medians, (below, above) = whiskers([times(10, spread) for spread in SPREADS])
    np.testing.assert_allclose([medians, below, above], [[20, 20], [5, 10], [2.5, 40]])
    medians, none = whiskers([1.0, 3.0])
    assert (medians.tolist(), none) == ([1.0, 3.0], None)


def test_marks_are_where_their_numbers_are(figure):
    axes = figure.axes[0]
    points, _, (segments,) = axes.containers[0].lines
    np.testing.assert_allclose(points.get_xydata(), [[1, 2], [3, 2]])
    np.testing.assert_allclose([each[:, 1] for each in segments.get_segments()], [[1.5, 2.25], [1.0, 6.0]])
    lines = {line.get_gid(): line for line in axes.lines if line.get_gid()}
    assert set(lines) == {f"marks-0-{name}" for name in ("0", "1", "reference-0", "marked-0")}
    np.testing.assert_allclose(lines["marks-0-1"].get_xydata(), [[1, 7], [3, 9]])
    assert set(lines["marks-0-reference-0"].get_ydata()) == {1.0}
    assert set(lines["marks-0-marked-0"].get_xdata()) == {2.0}
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")) == ("size", "latency", "kind")
    assert (list(axes.get_xticks()), axes.get_ylim()[0]) == ([1, 3], 0)
    last = figure.axes[2]
    assert (last.get_xscale(), last.get_yscale()) == ("log", "log")


def test_rows_have_a_name_each_and_series_do_not_hide_each_other(figure):
    axes = figure.axes[1]
    names = [text.get_text().replace("\n", " ") for text in axes.get_yticklabels()]
    assert names == ROWS.rows
    heights = [marks.lines[0].get_ydata() for marks in axes.containers]
    assert [len(each) for each in heights] == [3, 2]
    assert (heights[1] - heights[0][:2] > 0.15).all()
    assert all(abs(each - np.arange(len(each))).max() < 0.5 for each in heights)
    assert axes.yaxis_inverted()
    assert [marks.lines[0].get_markerfacecolor() for marks in axes.containers] == [LIGHT.measured, LIGHT.paper]
    assert axes.get_xlabel() == "share"


@pytest.mark.parametrize("look", [LIGHT, NARROW])
def test_the_look_says_colours_width_and_whether_there_is_a_title(look, figure):
    figure = figure if look is LIGHT else drawn(look)
    assert figure.get_figwidth() == look.inches[0]
    assert same_color(figure.axes[0].lines[0].get_color(), look.measured)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == 3
    assert len({round(axes.get_position().x0, 1) for axes in panels}) == (2 if look is LIGHT else 1)
    (legend,) = figure.legends  # of all panels, each label once
    labels = [text.get_text() for text in legend.get_texts()]
    assert sorted(labels) == sorted(["first", "its $work_1$", "no funnel", "a", "b", "ceiling"])
    lines = figure.get_suptitle().splitlines()
    if look is NARROW:
        assert not lines
    else:
        assert max(map(len, lines)) <= 10.5 * look.inches[0]
        assert " ".join(lines[:-1]).split() == ["fact"] * 40
        assert lines[-1] == "second"


def test_the_png_is_a_picture_with_the_colours_of_its_marks():
    picture = matplotlib.image.imread(io.BytesIO(render(CHART, "png")), format="png")
    assert picture.shape[1] == 1200
    for colour in (LIGHT.measured, LIGHT.ideal):
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert (np.abs(picture[..., :3] - rgb).max(-1) < 0.02).sum() > 100
