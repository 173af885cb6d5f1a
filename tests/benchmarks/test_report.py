"""The plot's marks and the HTML page, from a result made by hand."""

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import same_color
from matplotlib.container import BarContainer, ErrorbarContainer

from funnel_benchmarks.latency.plot import draw, render
from funnel_benchmarks.latency.suite import funnel_name
from funnel_benchmarks.latency.table import conclusion, introduction, row_line
from funnel_benchmarks.plot_style import DARK, LIGHT, require_matplotlib
from funnel_benchmarks.report import render_html
from funnel_engine import FunnelConfig
from funnel_kernels.errors import ConfigError

LAYERS = (2, 8, 14)
RATIOS = (0.56, 0.73, 0.9)
IDEALS = (0.55, 0.72, 0.88)


def spread(low: float, median: float, high: float) -> dict[str, float]:
    return {"low": low, "median": median, "high": high}


def make_row(strides: tuple[int, ...], ratio: float, ideal: float, **options: Any) -> dict[str, Any]:
    funnel = FunnelConfig(strides, **options)
    return {
        "cell": f"{funnel_name(funnel)}; 2 x 512 tokens",
        "funnel": {"name": funnel_name(funnel), **dataclasses.asdict(funnel)},
        "batch": BATCH,
        "seconds": spread(0.19 * ratio, 0.2 * ratio, 0.22 * ratio) | {"samples": [0.2 * ratio] * 4},
        "baseline_seconds": spread(0.198, 0.2, 0.203) | {"samples": [0.2] * 4},
        "ratio": spread(ratio - 0.02, ratio, ratio + 0.05),
        "saving_percent": 100 * (1 - ratio),
        "ideal_ratio": ideal,
        "efficiency": ideal / ratio,
        "tokens_per_second": 1024 / (0.2 * ratio),
        "flops_per_second": 3.3e11 + len(strides) * 1e9,
        "baseline_flops": 66_000_000_000,
        "padding_waste": 0.013,
        "compile_seconds": 1.7,
        "baseline_padding_waste": 0.004,
        "baseline_compile_seconds": 2.5,
        "peak_memory_gb": {"process": 0.81 - len(strides) / 100},
    }


BATCH = {
    "name": "2 x 512 tokens", "source": "all equal", "sequences": 2, "tokens": 1024, "shortest": 512, "median": 512.0,
    "longest": 512,
}  # fmt: skip


def make_result() -> dict[str, Any]:
    model = {
        "name": "<tiny & co>",  # must be escaped in HTML
        "family": "gemma",
        "layers": 18,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "heads": 4,
        "kv_heads": 1,
        "head_dim": 128,
        "attention": "bidirectional",
        "parameters": 69_000_000,
        "weights": "random",
        "dtype": "bfloat16",
    }
    options = {
        "model": model, "batches": [BATCH], "backend": "auto", "served_by": "xla", "repeats": 2, "order": "A B B A",
        "seed": 0,
    }  # fmt: skip
    machine = {
        "cpu": "Imaginary 9000",
        "cores": 2,
        "memory_gb": 25.3,
        "platform": "Linux",
        "devices": ["cpu"],
        "python": "3.11.7",
        "jax": "0.10.2",
        "jaxlib": "0.10.2",
        "numpy": "2.4.6",
        "revision": None,
    }
    figures = zip(LAYERS, RATIOS, IDEALS, strict=True)
    rows = [make_row((1,) * layer + (2,), ratio, ideal) for layer, ratio, ideal in figures]
    return {
        "schema": 2, "suite": "latency", "started": "2026-01-02T03:04:05Z", "options": options, "machine": machine,
        "resumed": [], "complete": True, "rows": rows, "left_out": [], "errors": [],
    }  # fmt: skip


def with_other_rows() -> dict[str, Any]:
    """The same among rows of other kinds, with the first of its own kind before the others."""
    result = make_result()
    first, *rest = result["rows"]
    others = [
        make_row((1, 1, 4), 0.4, 0.33),
        make_row((1, 1, 2, 2), 0.4, 0.33),
        make_row((1, 1, 1, 2), 0.6, 0.5, pool="mean"),
        make_row((1, 1, 1, 1, 2), 0.6, 0.5, recovery="tile"),
        make_row((1, 1, 1, 2), 0.6, 0.5) | {"batch": BATCH | {"name": "1 x 4096 tokens"}},
    ]
    result["rows"] = [first, *others, *reversed(rest)]
    return result


VOID = {"meta", "img", "source", "link", "br"}


class Page(HTMLParser):
    """Checks that tags nest, and collects cells, attributes and text."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data + " "


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render_html(make_result()))


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
    assert [text.get_text() for text in below.texts] == ["44 %", "27 %", "10 %"]
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
    picture = matplotlib.image.imread(io.BytesIO(render(make_result(), "png")), format="png")
    height, width = picture.shape[:2]
    assert (width, height) == (1200, 1110)
    for colour in (LIGHT.measured, LIGHT.ideal):
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert (np.abs(picture[..., :3] - rgb).max(-1) < 0.02).sum() > 100


def test_the_page_holds_every_row(page):
    head, *rows = page.rows
    assert [name.split()[0] for name in head[:6]] == ["funnel", "ratio", "ideal", "efficiency", "saving", "latency"]
    assert [row[0].split() for row in rows] == [f"2:1 after {layer} 2 x 512 tokens".split() for layer in LAYERS]
    assert [row[1].split() for row in rows] == [
        ["0.560", "0.540", "\u2013", "0.610"],
        ["0.730", "0.710", "\u2013", "0.780"],
        ["0.900", "0.880", "\u2013", "0.950"],
    ]
    assert [row[2].strip() for row in rows] == ["0.550", "0.720", "0.880"]
    assert [row[3].strip() for row in rows] == ["0.982", "0.986", "0.978"]
    assert [row[4].strip() for row in rows] == ["44.0", "27.0", "10.0"]
    assert rows[0][5].split() == ["112.0", "106.4", "\u2013", "123.2"]
    assert rows[0][6].split() == ["200.0", "198.0", "\u2013", "203.0"]
    assert [cell.strip() for cell in rows[0][7:]] == ["9,143", "333.0", "1.3", "1.7"]
    assert all(len(row) == len(head) for row in rows)


def test_the_page_states_the_circumstances(page):
    for fact in ("<tiny & co>", "random", "Imaginary 9000", "jax 0.10.2", "2 times A B B A", "0.78 GB", "7.6 s in all"):
        assert fact in page.text


def test_the_page_needs_no_network(page):
    html = render_html(make_result())
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html)
    links = [value for name, value in page.attributes if name in ("src", "srcset", "href")]
    assert len(links) == 4  # wide and narrow, light and dark
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links)


def test_the_pictures_in_the_page_are_whole_and_in_the_right_colours(page):
    pictures = [value.partition("base64,")[2] for name, value in page.attributes if name in ("src", "srcset")]
    decoded = [base64.b64decode(text).decode() for text in pictures]
    assert all(ElementTree.fromstring(svg).tag.endswith("svg") for svg in decoded)
    colours = [DARK.measured, LIGHT.measured, DARK.measured, LIGHT.measured]
    assert all(colour in svg for colour, svg in zip(colours, decoded, strict=True))
    media = [value for name, value in page.attributes if name == "media"]
    assert ["dark" in each for each in media] == [True, False, True]
    assert ["max-width" in each for each in media] == [True, True, False]


def test_the_page_says_when_a_run_was_gone_on_with():
    result = make_result() | {"resumed": [{"started": "2026-02-03T04:05:06Z", "machine": {}, "rows": 1}]}
    assert "2026-01-02T03:04:05Z, gone on 2026-02-03T04:05:06Z" in Page(render_html(result)).text


def test_lines_of_text_have_the_same_figures():
    result = make_result()
    head = introduction(result)
    assert head[0] == "<tiny & co>: 18 layers of width 512, 69 M parameters (random), bfloat16, bidirectional"
    assert head[1:4] == [
        "2 x 512 tokens",
        "cpu; Imaginary 9000, 2 cores; backend auto, served by xla",
        "medians of 4 runs, funnel and baseline in the order A B B A",
    ]
    line = row_line(result["rows"][0])
    figures = "112.0 106.4 - 123.2 200.0 0.560 0.550 44.0 % 0.982 9,143 333.0"
    assert line.split("  2:1")[0].split() == figures.split()
    assert head[-1].index("funnel; batch") == line.index("2:1 after 2")
    assert conclusion(result)[1:] == [
        "compiling took 7.6 s beforehand; 0 compilations while timing, where a cell with any fails; padding at most "
        "1.3 % of rows; peak memory process 0.78 GB",
        "saved, beside arXiv:2504.02877 (Gemma 2B on a TPU): 44.0 % after layer 2 (paper: 44 %); 2 x 512 tokens",
    ]
    assert conclusion(result | {"rows": []}) == []


def test_without_matplotlib_there_is_one_line_with_the_remedy(monkeypatch):
    require_matplotlib()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'funnel-engine\[bench\]'"):
        require_matplotlib()
