"""Results as one HTML page that needs nothing else: no network, no further files.

A result file is not trusted: all of its text is escaped, and no script runs but the page's own, whose hash the policy
names.
"""

import base64
import hashlib
import io
import warnings
from collections import defaultdict
from collections.abc import Iterable
from html import escape
from typing import Any, NamedTuple
from xml.etree import ElementTree

from funnel_benchmarks.charts import LIGHT, Chart, Look, styled
from funnel_benchmarks.report.circumstances import circumstances, repeated, warning, where_and_when
from funnel_benchmarks.report.style import SCRIPT, STYLE, colours
from funnel_benchmarks.results import Row
from funnel_benchmarks.suite import Cell, Section, Table

SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{SCRIPT_HASH}'; base-uri 'none'"

WIDE = LIGHT._replace(titled=False)
NARROW = WIDE._replace(inches=(4.4, 6.6))  # for a telephone
UNNAMED: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))
# Text stays text. Fonts: the one that lays it out, and two of its width or less.
TEXT: Any = {"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"]}


class Article(NamedTuple):
    """One result on the page.

    Attributes:
        name: its identifier on the page.
        suite, title, where: what the table of contents says of it.
        html: all of it.
    """

    name: str
    suite: str
    title: str
    where: str
    html: str


def render_page(title: str, results: Iterable[tuple[Row, Section]]) -> str:
    """The whole page.

    Args:
        results: contents of result files, and what is said about each.
    """
    return assemble(title, [article(*result, f"result-{number}") for number, result in enumerate(results, start=1)])


def article(content: Row, section: Section, name: str, file: str = "") -> Article:
    """One result: findings, plots, tables, how to read them, circumstances.

    Args:
        name: an identifier that no other article of the page has.
        file: what its file is called, if the reader is to know.
    """
    where = f"{file}; {where_and_when(content)}" if file else where_and_when(content)
    pictures = [picture(plot, f"{name}-plot-{number}") for number, plot in enumerate(section.plots, start=1)]
    warned, spared = warning(content), len(repeated(content))
    parts = [
        f'<article id="{name}">',
        f"<h2>{escape(section.title)}</h2>",
        f'<p class="quiet">{escape(where)}</p>',
        *([f'<p class="warning">{escape(warned)}</p>'] if warned else []),
        *([f'<p class="quiet">Left out, as another row says the same: {spared}.</p>'] if spared else []),
        f"<p>{escape(section.summary)}</p>",
        *pictures,
        *map(html_table, section.filled),
        *(["<h3>How to read this</h3>"] if section.reading else []),
        *(f"<p>{escape(text)}</p>" for text in section.reading),
        "<h3>Circumstances</h3>",
        facts(content, section),
        "</article>",
    ]
    return Article(name, content["suite"], section.title, where, "\n".join(parts))


def facts(content: Row, section: Section) -> str:
    """The suite's own facts, then those that all results have, as a list of terms."""
    named = [*((name, [text]) for name, text in section.facts.items()), *circumstances(content)]
    terms = [
        f"<dt>{escape(name)}</dt>" + "".join(f"<dd>{escape(text)}</dd>" for text in texts if text)
        for name, texts in named
        if any(texts)
    ]
    return "<dl>\n" + "\n".join(terms) + "\n</dl>"


def assemble(title: str, articles: Iterable[Article]) -> str:
    """The page around articles; those of one suite stand together, in the order in which suites come first."""
    suites: dict[str, list[Article]] = defaultdict(list)
    for each in articles:
        suites[each.suite].append(each)
    body = "\n".join(each.html for suite in suites.values() for each in suite)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{contents(suites)}{body}
<script>{SCRIPT}</script>
</body>
</html>
"""


def contents(suites: dict[str, list[Article]]) -> str:
    """The table of contents; none for a single article."""
    if sum(map(len, suites.values())) < 2:
        return ""
    entries = "\n".join(
        f"<li>{escape(suite)}\n<ul>\n{''.join(map(entry, articles))}</ul>\n</li>" for suite, articles in suites.items()
    )
    return f'<nav aria-label="Contents">\n<ul>\n{entries}\n</ul>\n</nav>\n'


def entry(article: Article) -> str:
    return f'<li><a href="#{article.name}">{escape(article.title)}</a> <small>{escape(article.where)}</small></li>\n'


def html_table(table: Table) -> str:
    """A table in a box of its own, which scrolls where the page is too narrow; a click on a heading sorts it."""
    head = "".join(heading(*column) for column in table.heads)
    body = "\n".join(f"<tr>{''.join(map(html_cell, cells))}</tr>" for cells in table.cells)
    caption = f"<figcaption>{escape(table.caption)}</figcaption>\n" if table.caption else ""
    label = escape(table.caption or "figures")
    return (
        f'<figure>\n{caption}<div class="scroll" role="region" aria-label="{label}" tabindex="0">\n'
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>\n</figure>"
    )


def heading(title: str, unit: str) -> str:
    return f'<th scope="col"><button type="button"><span>{escape(title)}</span>{small(unit)}</button></th>'


def html_cell(cell: Cell) -> str:
    value = "" if cell.value is None else f' data-value="{float(cell.value)}"'
    return f"<td{value}>{escape(cell.text)}{small(cell.below)}</td>"


def small(text: str) -> str:
    """A second line, in a smaller font; the line break separates the two where text alone counts."""
    return f"\n<small>{escape(text)}</small>" if text else ""


def picture(plot: Chart, name: str) -> str:
    """A chart in place as SVG, so that its text can be selected: wide and narrow; the page's style shows what fits.

    Args:
        name: begins all identifiers in it, so that no two pictures of a page share one.
    """
    wide, narrow = (svg(plot, look, kind, f"{name}-{kind}") for kind, look in (("wide", WIDE), ("narrow", NARROW)))
    return f"<figure>\n{wide}\n{narrow}\n<figcaption>{escape(plot.caption)}</figcaption>\n</figure>"


def svg(plot: Chart, look: Look, kind: str, name: str) -> str:
    """One drawing as an `<svg class="{kind}">` for HTML, which knows no namespaces."""
    root = ElementTree.fromstring(draw(plot, look))
    for element in root.iter():
        element.tag = local(element.tag)
        element.text, element.tail = (text if text and text.strip() else None for text in (element.text, element.tail))
        element.attrib = {local(key): rewritten(local(key), value, name) for key, value in element.attrib.items()}
    del root.attrib["width"], root.attrib["height"]  # the page's style says how large it is
    root.attrib |= {"class": kind, "role": "img", "aria-label": plot.described}
    return ElementTree.tostring(root, encoding="unicode")


def draw(plot: Chart, look: Look) -> bytes:
    """The chart as a file of its own."""
    import matplotlib  # not with the other imports: an optional dependency that takes a second

    buffer = io.BytesIO()
    with styled(look), matplotlib.rc_context(TEXT), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the browser has fonts of its own
        plot.draw(look).savefig(buffer, format="svg", metadata=UNNAMED)
    return buffer.getvalue()


def local(name: str) -> str:
    """A name of ElementTree without its namespace."""
    return name.rpartition("}")[2]


def rewritten(key: str, value: str, name: str) -> str:
    """An attribute's value with `name` before each identifier, and a CSS variable for each colour of the look."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href" and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    value = value.replace("url(#", f"url(#{name}-")
    if key == "style":
        for variable, colour in colours(WIDE).items():
            value = value.replace(colour, f"var(--{variable})")
    return value
