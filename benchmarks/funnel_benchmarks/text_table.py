"""Tables of text, printed while they grow: columns of fixed width, and a last one that is as wide as it has to be."""

from collections.abc import Iterable

Columns = tuple[tuple[str, int], ...]  # titles and widths


def head_line(columns: Columns, last: str) -> str:
    """The titles, that of the last column too."""
    return table_line(columns, (title for title, _ in columns), last)


def table_line(columns: Columns, cells: Iterable[str], last: str) -> str:
    return " ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, columns, strict=True)) + f"  {last}"
