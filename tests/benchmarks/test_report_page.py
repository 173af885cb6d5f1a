"""The report's page: its structure, from sections and results made by hand."""

import base64
import hashlib
import re

import pytest
from matplotlib.figure import Figure

from funnel_benchmarks.charts import DARK, LIGHT, Chart
from funnel_benchmarks.latency.suite import Suite as Latency
from funnel_benchmarks.measure import spread
from funnel_benchmarks.report.page import render_page
from funnel_benchmarks.suite import Cell, Section
from html_page import Page, table_of
from latency_results import make_result, with_other_rows

NASTY = "<script>alert(1)</script>\"'&$\\frac$"


class Drawing(Chart):
    """A line and bars; by colour and hatch they refer to definitions inside the picture."""

    def draw(self, look):
        return draw(look)


def draw(look):
    figure = Figure(figsize=look.inches)
    axes = figure.subplots()
    axes.plot([1, 2, 4], [3, 1, 2], color=look.measured, marker="o", label=NASTY)[0].set_gid("marks-line")
    for index, bar in enumerate(axes.bar([1, 2], [1, 2], color=look.ideal, edgecolor=look.ink, hatch="/")):
        bar.set_gid(f"marks-bar-{index}")
    axes.set_title("titled" if look.titled else NASTY)
    axes.legend()
    return figure


def make_section(name: str = "A title") -> Section:
    names = Cell(name), Cell("b", f"below {name}"), Cell("a")
    figures = Cell("5", "4 \u2013 6", 5), Cell("none"), Cell("40", value=40)
    heads = [(name, f"unit {name}"), ("figure", "")]
    return Section(
        title=name,
        summary=f"Summary of {name}",
        plots=[Drawing(f"described: {name}", f"caption: {name}", [])],
        tables=[table_of(f"table: {name}", heads, [*zip(names, figures, strict=True)])],
        reading=(f"Read {name}",),
        facts={"Fact": f"fact of {name}", name: "its name"},
    )


def of_suite(suite: str, **fields) -> dict:
    return make_result() | {"suite": suite} | fields


def page_of(*results) -> Page:
    return Page(render_page("All", results))


@pytest.fixture(scope="module")
def html() -> str:
    """Two sections of one suite around one of another."""
    return render_page(
        "All <of> it",
        [
            (of_suite("latency"), Latency.section(with_other_rows())),
            (of_suite("kernels"), make_section()),
            (of_suite("latency"), make_section(NASTY)),
        ],
    )


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_every_part_of_a_section_is_there_in_its_order(page):
    assert page.text.strip().startswith("All <of> it")
    kernels = page.text[page.text.index("\nA title\ncpu") :]
    parts = (
        "A title",
        "Imaginary 9000",
        "Summary of A title",
        "caption: A title",
        "table: A title",
        "unit A title",
        "below A title",
        "How to read this",
        "Read A title",
        "Circumstances",
        "fact of A title",
        "Versions",
    )
    places = [kernels.index(part) for part in parts]
    assert places == sorted(places)


def test_contents_link_to_all_results_with_those_of_a_suite_together(page):
    targets = [attributes["href"] for attributes in page.all("a")]
    articles = [f"#{attributes['id']}" for attributes in page.all("article")]
    assert targets == articles == ["#result-1", "#result-3", "#result-2"]
    nav = page.text[: page.text.index("Saved, beside")]
    assert [nav.count(name) for name in ("latency\n", "kernels\n", "A title", NASTY)] == [1, 1, 1, 1]


def test_a_single_result_needs_no_contents():
    assert not page_of((make_result(), make_section())).all("nav")


def test_only_the_page_s_own_script_may_run_and_nothing_is_loaded(html, page):
    (script,) = page.scripts
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == (f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'")
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", html)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "src"]
    assert all(attributes["href"].startswith("#") for _, attributes in page.tags if "href" in attributes)


def test_identifiers_are_unique_and_every_reference_is_to_one_of_them(html, page):
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', html)
    assert set(used) <= set(names)
    of_pictures = {name.partition("-plot-")[0] for name in used if "-plot-" in name}
    assert of_pictures == {"result-1", "result-2", "result-3"}


def test_pictures_are_drawn_wide_and_narrow_without_titles_and_described(page):
    drawings = page.all("svg")
    assert [drawing["class"] for drawing in drawings] == ["wide", "narrow"] * 4
    described = [drawing["aria-label"] for drawing in drawings[-4:]]
    assert described == [f"described: {name}" for name in (NASTY, NASTY, "A title", "A title")]
    widths = [float(drawing["viewbox"].split()[2]) for drawing in drawings]
    assert widths == [8 * 72, 4.4 * 72] * 4
    assert not [drawing for drawing in drawings if "width" in drawing]
    assert len(page.all("text")) > 100  # and so it can be selected, and read aloud
    assert "titled" not in page.text
    marks = [attributes["id"] for _, attributes in page.tags if "marks-" in attributes.get("id", "")]
    assert [name for name in marks if name.startswith("result-2-plot-1-wide-")] == [
        f"result-2-plot-1-wide-marks-{mark}" for mark in ("bar-0", "bar-1", "line")
    ]


def test_colours_of_pictures_follow_the_page(html, page):
    styles = " ".join(attributes.get("style") or "" for _, attributes in page.tags)
    for name, colour in LIGHT._asdict().items():
        if isinstance(colour, str):
            assert f"var(--{name})" in styles
            assert colour not in styles
            light, dark = re.findall(rf"--{name}: (#\w+);", html)
            assert (light, dark) == (colour, getattr(DARK, name))


def test_all_text_of_a_file_is_escaped():
    """In every place that a file can reach: nothing of it is a tag, and all of it is shown as it is."""
    machine = {"cpu": NASTY, "devices": [NASTY], NASTY: NASTY, "platform": NASTY, "revision": NASTY}
    entry = {"cell": NASTY, "reason": NASTY, "error": NASTY}
    content = of_suite(NASTY, machine=machine, left_out=[entry], errors=[entry], started=NASTY, complete=False)
    content["resumed"] = [{"started": NASTY, "machine": {NASTY: 1}, "rows": 1}]
    content["rows"] = [{"cell": NASTY, "passed": False}]
    page = Page(render_page(NASTY, [(content, make_section(NASTY)), (content, make_section(NASTY))]))
    assert len(page.all("script")) == 1
    assert {tag for tag, _ in page.tags} >= {"svg", "table", "nav", "dl"}
    assert page.text.count(NASTY) > 40
    assert page.text.count("alert") == page.text.count(NASTY)


def test_circumstances_tell_machine_versions_times_and_what_is_missing():
    content = of_suite("latency", left_out=[{"cell": "c1", "reason": "no room"}, {"cell": "c2", "reason": "no time"}])
    content["errors"] = [{"cell": "c3", "error": "ValueError: broke"}]
    content["machine"] |= {"memory_gb": None, "revision": "abc-dirty", "torch": None, "driver": "570"}
    content["resumed"] = [
        {"started": "2026-02-03T04:05:06Z", "machine": content["machine"] | {"jax": "0.11.0"}, "rows": 1},
        {"started": "2026-03-03T04:05:06Z", "machine": content["machine"] | {"numpy": None}, "rows": 2},
    ]
    content["rows"][1]["passed"] = False
    page = page_of((content | {"complete": False}, make_section()))
    for fact in (
        "Devicescpu",
        "ProcessorImaginary 9000, 2 cores\n",
        "SystemLinux\n",
        "Revisionabc-dirty\n",
        "Versionspython 3.11.7, jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6, driver 570\n",
        "Started2026-01-02T03:04:05Z\n",
        "Resumed2026-02-03T04:05:06Z, with jax 0.11.0 instead of 0.10.2",
        "2026-03-03T04:05:06Z, with numpy unknown instead of 2.4.6\n",
        "Left outc1: no roomc2: no time\n",
        "Failedc3: ValueError: broke\n",
        "Wrong results2:1 after 8; 2 x 512 tokens\n",
        "Not everything is here: the run was stopped before its end; failed: 1; wrong results: 1; left out: 2.",
    ):
        assert fact in page.text
    repeated = {"cell": "c4", "reason": "as another", "same_as": content["rows"][0]["cell"]}
    page = page_of((content | {"left_out": [*content["left_out"], repeated]}, make_section()))
    assert "left out: 2. The circumstances" in page.text
    assert "Left out, as another row says the same: 1.\n" in page.text
    nowhere = {"cell": "c5", "reason": "as another", "same_as": "c3"}  # which failed
    assert "left out: 1. The" in page_of((make_result() | {"left_out": [nowhere]}, make_section())).text
    page = page_of((make_result() | {"left_out": [repeated]}, make_section()))
    assert "Not everything" not in page.text
    assert "Left out, as another row says the same: 1.\n" in page.text
    assert "Left outc4: as another\n" in page.text
    plain = page_of((make_result(), make_section())).text
    assert not any(word in plain for word in ("Not everything", "Resumed", "Left out", "Failed", "Wrong", "Revision"))


def test_circumstances_tell_instruction_sets_and_whether_there_are_samples_enough():
    content = make_result()
    content["machine"] |= {"instruction_sets": ["avx2", "avx512_bf16"]}
    content["rows"] = [{"cell": str(count), "seconds": spread([1.0] * count)} for count in (4, 10, 20)]
    content["rows"].append({"cell": "without", "bytes": 1})
    text = page_of((content, make_section())).text
    assert "Instruction setsavx2, avx512_bf16\n" in text
    assert "Samples of each side4 to 20; fewer than 10 in 1 of 3 rows, too few to quote\n" in text
    del content["rows"][0]
    assert "Samples of each side10 to 20\n" in page_of((content, make_section())).text
    assert "Samples" not in page_of((content | {"rows": []}, make_section())).text


def test_tables_can_be_sorted_by_buttons_and_have_values_where_there_are_numbers():
    page = page_of((make_result(), make_section()))
    assert [button["type"] for button in page.all("button")] == ["button", "button"]
    assert [heading["scope"] for heading in page.all("th")] == ["col", "col"]
    assert [cell.get("data-value") for cell in page.all("td")] == [None, "5.0", None, None, None, "40.0"]
    assert [row[1].split() for row in page.rows[1:]] == [["5", "4", "\u2013", "6"], ["none"], ["40"]]
    (box,) = [each for each in page.all("div") if each.get("class") == "scroll"]
    assert (box["tabindex"], box["aria-label"]) == ("0", "table: A title")
