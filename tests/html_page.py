"""Reads a page of the report, and makes tables for one."""

from html.parser import HTMLParser

from funnel_benchmarks.suite import Cell, Column, Table

VOID = {"meta"}


class Page(HTMLParser):
    """Checks that tags nest, and collects tags with their attributes, text, table rows and scripts.

    Attributes:
        tags: each start tag with its attributes, in their order.
        rows: of all tables, each a list of the text of its cells.
        text: all that a reader sees.
        scripts: the text of each script.
    """

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data + " "

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of each element of this name."""
        return [attributes for name, attributes in self.tags if name == tag]


def table_of(caption: str, heads: list[tuple[str, str]], rows: list[tuple[Cell, ...]]) -> Table:
    """A table with these cells."""
    columns = (Column(name, lambda row, place=place: row[place], note=note) for place, (name, note) in enumerate(heads))
    return Table(caption, tuple(columns), rows)
