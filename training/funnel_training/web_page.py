"""HTML pages that need no other file. All text is escaped."""

import base64
import html
from collections.abc import Sequence

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
img { max-width: 100%; } table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; }
th, td { border-bottom: 1px solid #ccc; padding: 0.3rem 0.7rem; text-align: left; vertical-align: top; }
pre { background: #f4f4f4; padding: 0.6rem; overflow-x: auto; }
"""


def page(title: str, *parts: str) -> str:
    """The whole page; the parts are HTML."""
    title = html.escape(title)
    head = f'<head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
    return f'<!doctype html><html lang="en">{head}<body><h1>{title}</h1>{"".join(parts)}</body></html>\n'


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def paragraphs(*texts: str) -> str:
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)


def code(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def image(png: bytes, title: str) -> str:
    """A picture inside the page; the title is for those who cannot see it."""
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line('th', heads)}{''.join(line('td', row) for row in rows)}</table>"
