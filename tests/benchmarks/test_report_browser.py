"""The report's page in a browser: pictures, sorting, widths, colours, and nothing wrong in the console."""

import html
import json
import re
import shutil
import subprocess
from typing import Any

import pytest

from funnel_benchmarks.charts import DARK, LIGHT
from funnel_benchmarks.latency.suite import Suite as Latency
from funnel_benchmarks.report.page import render_page
from funnel_benchmarks.suite import Cell, Section
from html_page import table_of
from latency_results import make_result, with_other_rows

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# Looks into frames, each of which holds the page as it is, and leaves only what it has found.
LOOK = """
const shown = (element) => element.getClientRects().length > 0;

function look(frame) {
  const page = frame.contentDocument, seen = frame.contentWindow;
  const marks = {};
  for (const element of page.querySelectorAll('svg [id*="-marks-"]')) {
    if (!shown(element.ownerSVGElement)) continue;
    const box = element.getBBox();
    marks[element.id] = box.width + box.height;
  }
  const pictures = [...page.querySelectorAll("svg")].filter(shown);
  return {
    marks,
    pictures: pictures.map((picture) => [picture.classList[0], picture.getBoundingClientRect().width]),
    overflow: page.documentElement.scrollWidth - seen.innerWidth,
    scripts: page.scripts.length,
    paper: seen.getComputedStyle(page.body).backgroundColor,
    line: seen.getComputedStyle(page.querySelector('[id$="wide-marks-0-0"] path')).stroke,
    sorted: sorted(page.querySelectorAll("table")[1]),
  };
}

function sorted(table) {
  const headings = [...table.tHead.rows[0].cells];
  const column = (index) => [...table.tBodies[0].rows].map((row) => row.cells[index].firstChild.textContent.trim());
  const states = [];
  for (const index of [0, 0, 1, 1]) {
    headings[index].querySelector("button").click();
    states.push([column(index), headings.map((heading) => heading.getAttribute("aria-sort"))]);
  }
  return states;
}

addEventListener("load", () => {
  const frames = [...document.querySelectorAll("iframe")];
  const found = JSON.stringify(frames.map(look));
  document.body.replaceChildren(found);
});
"""


def browse(tmp_path, page: str, *styles: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Opens a page in frames of these styles: what was found in each, and the lines of the console."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed: apt-get install chromium")
    frames = "".join(f'<iframe style="{style}" srcdoc="{html.escape(page)}"></iframe>' for style in styles)
    file = tmp_path / "frames.html"
    file.write_text(f'<!DOCTYPE html><meta charset="utf-8"><body>{frames}<script>{LOOK}</script></body>')
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--virtual-time-budget=5000",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    )
    command, home = [browser, *options, file.as_uri()], {"HOME": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True, env=home)
    (found,) = re.findall("<body>(.*)</body>", run.stdout, re.S)
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(found)), console


def other_section() -> Section:
    values = {"funnel 10": 3.0, "funnel 9": None, "<script>alert(1)</script>": -1.0, "w" * 300: 20.0, "funnel 2": None}
    cells = {name: Cell("-" if value is None else f"{value:g}", "below", value) for name, value in values.items()}
    rows = [(Cell(name), cell, *[Cell("1,234,567.8 GB")] * 12) for name, cell in cells.items()]
    wide = [("x" * 20, "unit")] * 12
    return Section(
        "<script>alert(1)</script>" * 5,
        "w" * 300,
        [],
        [table_of("caption " * 30, [("name", ""), ("value", ""), *wide], rows)],
        ("r" * 300,),
        {"f" * 100: "f" * 500, "Fact": "g" * 300},
    )


@pytest.fixture(scope="module")
def page() -> str:
    return render_page(
        "What was measured", [(with_other_rows(), Latency.section(with_other_rows())), (make_result(), other_section())]
    )


@pytest.fixture(scope="module")
def browsed(page, tmp_path_factory):
    """The page wide, narrow, and wide in the dark."""
    frame = "height: 900px; border: 0; width:"
    styles = (f"{frame} 1280px", f"{frame} 360px", f"{frame} 1280px; color-scheme: dark")
    return browse(tmp_path_factory.mktemp("browser"), page, *styles)


def test_nothing_is_wrong_in_the_console(browsed):
    found, console = browsed
    assert console == []
    assert [each["scripts"] for each in found] == [1, 1, 1]


def test_an_error_or_a_forbidden_request_would_be_seen_in_the_console(page, tmp_path):
    broken = page.replace('"use strict";', '"use strict"; missing();')
    _, console = browse(
        tmp_path, broken.replace("</article>", '<img src="https://example.invalid/x.png"></article>'), ""
    )
    assert any("Executing inline script violates" in line for line in console)  # another hash than the policy's
    assert any("example.invalid" in line and "violates" in line for line in console)


def test_every_mark_of_the_picture_that_fits_takes_room(browsed):
    for each, kind in zip(browsed[0], ("wide", "narrow", "wide"), strict=True):
        assert [name for name, _ in each["pictures"]] == [kind] * 2
        marks = {name.removeprefix("result-1-plot-"): size for name, size in each["marks"].items()}
        assert marks.keys() == {
            *(f"1-{kind}-marks-{mark}" for mark in ("0-0", "0-1", "0-reference-0", "1-0", "1-1")),
            *(f"2-{kind}-marks-{mark}" for mark in ("0-0", "0-1", "0-reference-0")),
        }
        assert all(size > 1 for size in marks.values())


def test_no_text_figure_or_table_makes_the_page_wider_than_its_window(browsed):
    assert [each["overflow"] <= 0 for each in browsed[0]] == [True] * 3
    widths = [each["pictures"][0][1] for each in browsed[0]]
    assert widths[0] > 700
    assert 300 < widths[1] < 360


def test_colours_follow_the_reader_s_choice(browsed):
    for each, look in zip(browsed[0], (LIGHT, LIGHT, DARK), strict=True):
        assert (each["paper"], each["line"]) == (rgb(look.paper), rgb(look.measured))


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[place : place + 2], 16)) for place in (1, 3, 5))})"


def test_a_click_sorts_and_another_turns_the_order_around(browsed):
    names = ["<script>alert(1)</script>", "funnel 2", "funnel 9", "funnel 10", "w" * 300]
    for each in browsed[0]:
        by_name, back, by_value, value_back = each["sorted"]
        assert (by_name[0], back[0]) == (names, names[::-1])
        assert by_value[0] == ["-1", "3", "20", "-", "-"]
        assert value_back[0] == ["20", "3", "-1", "-", "-"]
        assert [state[1][:2] for state in each["sorted"]] == [
            ["ascending", None],
            ["descending", None],
            [None, "ascending"],
            [None, "descending"],
        ]
