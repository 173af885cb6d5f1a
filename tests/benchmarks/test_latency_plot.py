"""The pictures of a result, by their marks, from a result made by hand."""

import io
from functools import partial

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import same_color
from matplotlib.container import BarContainer, ErrorbarContainer

from funnel_benchmarks.latency.plot import draw, draw_efficiency
from funnel_benchmarks.plot_style import DARK, LIGHT, render
from latency_results import IDEALS, LAYERS, RATIOS, make_result, with_other_rows


def legend_of(axes) -> set[str]:
    return {text.get_text() for text in axes.get_legend().get_texts()}


@pytest.mark.parametrize("make", [make_result, with_other_rows])
def test_the_upper_panel_has_measured_and_ideal_ratios_of_rows_like_the_first(make):
    above, _ = draw(make()).axes
    (measured,) = [each for each in above.containers if isinstance(each, ErrorbarContainer)]
    points, _, (whiskers,) = measured.lines
    np.testing.assert_allclose(points.get_xydata(), np.transpose([LAYERS, RATIOS]))
    for segment, layer, ratio in zip(whiskers.get_segments(), LAYERS, RATIOS, strict=True):
        np.testing.assert_allclose(segment, [[layer, ratio - 0.02], [layer, ratio + 0.05]])
    (ideal,) = [line for line in above.lines if line.get_label() == "ideal (FLOPs)"]
    np.testing.assert_allclose(ideal.get_xydata(), np.transpose([LAYERS, IDEALS]))
    (without,) = [line for line in above.lines if line.get_label() == "no funnel"]
    assert set(without.get_ydata()) == {1.0}
    assert legend_of(above) == {"no funnel", "ideal (FLOPs)", "measured (quartiles)"}
    assert above.get_ylim()[0] == 0
    assert above.get_ylim()[1] > 1


def test_the_lower_panel_has_the_savings():
    _, below = draw(make_result()).axes
    (bars,) = [each for each in below.containers if isinstance(each, BarContainer)]
    np.testing.assert_allclose([bar.get_height() for bar in bars], [44, 27, 10])
    np.testing.assert_allclose([bar.get_x() + bar.get_width() / 2 for bar in bars], LAYERS)
    assert [text.get_text() for text in below.texts] == ["44", "27", "10"]
    (ideal,) = [line for line in below.lines if line.get_label() == "ideal (FLOPs)"]
    np.testing.assert_allclose(ideal.get_ydata(), [45, 28, 12])
    assert list(below.get_xticks()) == list(LAYERS)
    assert "2:1" in below.get_xlabel()


def test_labels_stand_clear_of_bars_and_marks():
    """Drawn to the pixel: a label that lay on its bar or on the ideal's mark could not be read."""
    figure = draw(make_result())
    figure.canvas.draw()
    _, below = figure.axes
    for text, ratio, ideal in zip(below.texts, RATIOS, IDEALS, strict=True):
        highest = below.transData.transform((0, 100 * (1 - min(ratio, ideal))))[1]
        assert text.get_window_extent().y0 > highest


@pytest.mark.parametrize("look", [LIGHT, DARK])
def test_colours_are_those_of_the_look(look):
    figure = draw(make_result(), look)
    above, below = figure.axes
    assert same_color(below.patches[0].get_facecolor(), look.measured)
    (ideal,) = [line for line in above.lines if line.get_label() == "ideal (FLOPs)"]
    assert same_color(ideal.get_color(), look.ideal)


def test_the_title_names_model_shape_dtype_and_machine():
    title = draw(make_result()).get_suptitle()
    for part in ("<tiny & co>", "18 layers of width 512", "bfloat16", "2 x 512 tokens", "Imaginary 9000", "2 cores"):
        assert part in title
    assert draw(make_result(), LIGHT._replace(titled=False)).get_suptitle() == ""


def test_one_row_is_enough_for_a_plot():
    result = make_result()
    result["rows"] = result["rows"][:1]
    assert len(draw(result).axes[1].patches) == 1


def test_the_png_is_a_picture_with_the_colours_of_its_marks():
    picture = matplotlib.image.imread(io.BytesIO(render(partial(draw, make_result()), "png")), format="png")
    height, width = picture.shape[:2]
    assert (width, height) == (1200, 1110)
    for colour in (LIGHT.measured, LIGHT.ideal):
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert (np.abs(picture[..., :3] - rgb).max(-1) < 0.02).sum() > 100


def test_efficiency_has_a_mark_with_its_range_for_every_row():
    content = with_other_rows()
    (axes,) = draw_efficiency(content).axes
    names = list(dict.fromkeys(row["funnel"]["name"] for row in content["rows"]))
    assert [text.get_text().replace("\n", " ") for text in axes.get_yticklabels()] == names
    seen = {}
    for marks in axes.containers:
        points, _, (whiskers,) = marks.lines
        for (efficiency, place), segment in zip(points.get_xydata(), whiskers.get_segments(), strict=True):
            seen[names[round(place)], marks.get_label()] = (efficiency, *segment[:, 0])
    assert seen.keys() == {(row["funnel"]["name"], row["batch"]["name"]) for row in content["rows"]}
    for row in content["rows"]:
        bounds = [row["ideal_ratio"] / row["ratio"][bound] for bound in ("median", "high", "low")]
        np.testing.assert_allclose(seen[row["funnel"]["name"], row["batch"]["name"]], bounds)
    assert axes.yaxis_inverted()


def test_batches_have_marks_of_their_own_and_do_not_hide_each_other():
    batches = [{"name": f"batch {index}"} for index in range(3)]
    rows = [row | {"batch": row["batch"] | batch} for row in make_result()["rows"] for batch in batches]
    (axes,) = draw_efficiency(make_result() | {"rows": rows}).axes
    lines = [marks.lines[0] for marks in axes.containers]
    assert len({line.get_marker() for line in lines}) == 3
    assert [line.get_markerfacecolor() for line in lines] == [LIGHT.measured, LIGHT.paper, LIGHT.measured]
    heights = np.array([line.get_ydata() for line in lines])
    assert (np.diff(heights, axis=0) > 0.15).all()
    assert np.abs(heights - np.arange(3)).max() < 0.5


@pytest.mark.parametrize("look", [LIGHT, DARK._replace(inches=(4.4, 6.6), titled=False)])
def test_pictures_keep_to_the_width_of_the_look_and_name_their_marks(look):
    for figure in (draw(with_other_rows(), look), draw_efficiency(with_other_rows(), look)):
        assert figure.get_size_inches()[0] == look.inches[0]
        assert len([artist for artist in figure.findobj() if (artist.get_gid() or "").startswith("marks-")]) >= 3
