"""A suite of benchmarks, declared once: what it measures, and how its results read.

A subclass of `Suite` names its cells and measures them. From a result file its `section` makes sentences, tables and
pictures, which are shown on a terminal (here), as Markdown (here) and on an HTML page (`report.page`).
"""

import abc
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

from rich.markup import escape
from rich.table import Table as RichTable

from funnel_benchmarks.charts import Chart
from funnel_benchmarks.results import Measurement, Results, Row


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        text: its content.
        below: smaller, on a second line; may be empty.
        value: what its column is sorted by; None: by the text.
    """

    text: str
    below: str = ""
    value: float | None = None


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        name: its title.
        cell: makes the column's cell of a row; a text is a cell without value, and None an empty one.
        unit: of its numbers.
        note: two or three words below the title, after the unit.
    """

    name: str
    cell: Callable[[Any], Cell | str | None]
    unit: str = ""
    note: str = ""


class Table(NamedTuple):
    """Rows of cells.

    Attributes:
        caption: the line above it; may be empty.
        columns: the first one names the row.
        rows: what each column makes its cell of.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: list[Any]

    @property
    def heads(self) -> list[tuple[str, str]]:
        """The title of each column, and the line below it."""
        return [(column.name, ", ".join(filter(None, (column.unit, column.note)))) for column in self.columns]

    @property
    def cells(self) -> list[list[Cell]]:
        return [[as_cell(column.cell(row)) for column in self.columns] for row in self.rows]


class Section(NamedTuple):
    """All that is said about one result.

    Attributes:
        title: what was measured.
        summary: the main finding in a sentence or two, with its figures; empty if there is none.
        plots, tables: in this order below it; tables without rows are left out.
        reading: paragraphs that say how to read them.
        facts: circumstances by name. The machine, its versions and the time are not among them: the page adds those.
    """

    title: str
    summary: str
    plots: list[Chart]
    tables: list[Table]
    reading: tuple[str, ...]
    facts: dict[str, str]

    @property
    def filled(self) -> list[Table]:
        """The tables that have rows."""
        return [table for table in self.tables if table.rows]


class Suite(abc.ABC):
    """What is measured.

    Attributes:
        name: what result files call it.
    """

    name: ClassVar[str]

    @property
    def steps(self) -> int:
        """How often a cell calls `results.advance`, at most."""
        return 1

    @abc.abstractmethod
    def options(self) -> Row:
        """Everything that a cell depends on beside its own name, as the head of a result file."""

    @abc.abstractmethod
    def cells(self, results: Results) -> Iterator[Measurement]:
        """Every cell by name, and what measures it."""

    @classmethod
    @abc.abstractmethod
    def section(cls, content: Row) -> Section:
        """How a result of this suite reads; it may have no rows yet."""


def number(value: float, form: str, factor: float = 1) -> Cell:
    """A number, times a factor for its unit, as `format` writes it in this form, e.g. ",.1f"."""
    return Cell(format(factor * value, form), value=factor * value)


def spread(figure: Row, form: str, factor: float = 1) -> Cell:
    """The median of {low, median, high}, and below it the two bounds; all times a factor, for their unit."""
    low, median, high = (factor * figure[name] for name in ("low", "median", "high"))
    return Cell(format(median, form), f"{low:{form}} \u2013 {high:{form}}", median)


def field(name: str, form: str, factor: float = 1) -> Callable[[Row], Cell | None]:
    """The cell of a field of a row: a spread or a number; empty where the row lacks the field."""

    def cell(row: Row) -> Cell | None:
        value = row.get(name)
        if value is None:
            return None
        return spread(value, form, factor) if isinstance(value, dict) else number(value, form, factor)

    return cell


def as_cell(made: Cell | str | None) -> Cell:
    return made if isinstance(made, Cell) else Cell(made or "")


def row_line(section: Callable[[Row], Section], content: Row, row: Row) -> str:
    """A row in one line, printed as soon as it is measured: every figure that a table has of it."""
    said = [
        f"{column.name} {cell.text} {column.unit}".rstrip()
        for table in section(content | {"rows": [row]}).tables
        for cells in table.cells[:1]
        for column, cell in list(zip(table.columns, cells, strict=True))[1:]
        if cell.text
    ]
    return f"{row['cell']}: {', '.join(said)}" if said else row["cell"]


def terminal_table(table: Table) -> RichTable:
    """The table for a terminal."""
    made = RichTable(title=table.caption or None, title_justify="left", title_style="bold")
    for index, head in enumerate(table.heads):
        made.add_column("\n".join(map(escape, head)), justify="right" if index else "left", vertical="top")
    for cells in table.cells:
        made.add_row(*(escape("\n".join(filter(None, (cell.text, cell.below)))) for cell in cells))
    return made


def markdown_table(table: Table) -> str:
    """The table in Markdown, for documents."""
    lines = [[in_brackets(*head) for head in table.heads], ["---"] * len(table.columns)]
    lines += [[in_brackets(cell.text, cell.below) for cell in cells] for cells in table.cells]
    text = "\n".join(f"| {' | '.join(each.replace('|', chr(92) + '|') for each in line)} |" for line in lines)
    return f"**{table.caption}**\n\n{text}" if table.caption else text


def in_brackets(text: str, below: str) -> str:
    return f"{text} ({below})" if below else text


def markdown(section: Section, further: Iterable[str] = ()) -> str:
    """A whole section in Markdown.

    Args:
        further: paragraphs that follow the tables, such as pictures.
    """
    paragraphs = [
        f"## {section.title}",
        section.summary,
        *map(markdown_table, section.filled),
        *further,
        *section.reading,
        "\n".join(f"- {name}: {text}" for name, text in section.facts.items() if text),
    ]
    return "\n\n".join(filter(None, paragraphs)) + "\n"
