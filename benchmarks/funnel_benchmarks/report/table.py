"""A table as part of the page; a click on a heading sorts it (`style.SCRIPT`)."""

from html import escape

from funnel_benchmarks.suite import Cell, Table


def html_table(table: Table) -> str:
    """The table in a box of its own, which scrolls where the page is too narrow for it."""
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
