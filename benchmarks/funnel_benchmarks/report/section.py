"""What a suite says in the report: text, plots and tables, whatever they will look like."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from funnel_benchmarks.plot_style import Look
from funnel_benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Plot(NamedTuple):
    """A picture.

    Attributes:
        draw: makes it in a look, whose width and `titled` it keeps to; it may be higher or lower. Each line or group
            of marks has a `gid` (`Artist.set_gid`) that begins with "marks-", so that the page can be checked for them.
        described: its content in words, for those who cannot see it.
        caption: the line below it.
    """

    draw: Callable[[Look], "Figure"]
    described: str
    caption: str


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        text: what stands in it.
        below: smaller, on a second line; may be empty.
        value: what its column is sorted by; None: by the text.
    """

    text: str
    below: str = ""
    value: float | None = None


def number(value: float, form: str) -> Cell:
    """A number as `format` writes it in this form, e.g. ",.1f"."""
    return Cell(format(value, form), value=value)


def spread(figure: Row, factor: float, form: str) -> Cell:
    """The median of {low, median, high}, and below it the two bounds; all times a factor, for their unit."""
    low, median, high = (factor * figure[name] for name in ("low", "median", "high"))
    return Cell(format(median, form), f"{low:{form}} \u2013 {high:{form}}", median)


class Table(NamedTuple):
    """Rows of cells.

    Attributes:
        caption: the line above it; may be empty.
        columns: titles and units (or an explanation of two words), the first column's first.
        rows: each has a cell for every column.
    """

    caption: str
    columns: tuple[tuple[str, str], ...]
    rows: list[tuple[Cell, ...]]


class Section(NamedTuple):
    """All that is said about one result.

    Attributes:
        title: what was measured.
        summary: the main finding in a sentence or two, with its figures.
        plots, tables: in this order below it.
        reading: paragraphs that say how to read them.
        facts: circumstances by name. The machine, its versions and the time are not among them: the page adds those.
    """

    title: str
    summary: str
    plots: list[Plot]
    tables: list[Table]
    reading: tuple[str, ...]
    facts: dict[str, str]
