"""A plot as part of the page: SVG in place, so that its text can be selected and its colours follow the page's."""

import io
import warnings
from html import escape
from typing import Any
from xml.etree import ElementTree

from funnel_benchmarks.charts import LIGHT, Chart, Look, styled
from funnel_benchmarks.report.style import colours

WIDE = LIGHT._replace(titled=False)
NARROW = WIDE._replace(inches=(4.4, 6.6))  # for a telephone
UNNAMED: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))
# Text stays text. Fonts: the one that lays it out, and two of its width or less.
TEXT: Any = {"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"]}


def picture(plot: Chart, name: str) -> str:
    """The plot drawn twice, wide and narrow; the page's style shows the one that fits.

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
    """The plot as a file of its own."""
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
